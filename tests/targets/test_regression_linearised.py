"""The closed-form linearisation of regressions is autograd's gradient and Hessian, in any coordinates."""

import numpy as np
import pandas as pd
import pytest
import torch

from hsivi_cli.targets.regression import regression_density
from hsivi_cli.targets.whiten import whiten

RNG = np.random.default_rng(5)
N = 50
F = pd.DataFrame({"x": RNG.normal(size=N), "w": RNG.normal(size=N), "g": RNG.choice(list("abcd"), N)})
F["h"] = RNG.integers(1, 8, N)
F["y"] = F["x"] + RNG.normal(size=N)
F["k"] = RNG.poisson(np.exp(0.3 * F["x"]))
F["n"] = 7
F["s"] = RNG.binomial(7, 0.4, N)
F["b"] = (RNG.random(N) < 0.5) * 1
MODELS = [
    ("y ~ x + w", "gaussian", []),
    ("y ~ x", "gaussian", ["sigma=inverse_gamma(2,1)", "x=student_t(3,0,1)", "Intercept=cauchy(0,2)"]),
    ("y ~ x + w", "gaussian", ["sigma=lognormal(0,1)", "w=flat"]),
    ("b ~ x + w", "bernoulli", []),
    ("p(s, n) ~ x", "binomial", ["b=normal(0.5,2)"]),
    ("k ~ x * w", "poisson", []),
    ("y ~ x + (1 | g)", "gaussian", ["sd=gamma(2,3)"]),
    ("k ~ x + (x + w | g) + (1 | h)", "poisson", ["sd=half_cauchy(1)"]),
    ("b ~ x + (0 + x | g) + (w | h)", "bernoulli", ["sd=exponential(1)"]),
    ("p(s, n) ~ (x + w | h)", "binomial", []),
]


def points(density, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(n, density.dim, dtype=torch.float64, generator=generator)


def expected(density, z, v):
    point = z.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(density.log_prob(point).sum(), point, create_graph=True)
    (product,) = torch.autograd.grad((gradient * v).sum(), point)
    return gradient.detach(), product


@pytest.mark.parametrize(("formula", "family", "priors"), MODELS)
@pytest.mark.parametrize("whitened", ["no", "diagonal", "dense"])
def test_gradient_and_hessian_products_are_autograds(formula, family, priors, whitened):
    density = regression_density(F, formula, family, priors)
    if whitened != "no":
        root = torch.eye(density.dim, dtype=torch.float64) + 0.3 * points(density, density.dim, 3).tril()
        root.diagonal().abs_()
        scale = root if whitened == "dense" else root.diagonal().clone()
        density = whiten(density, points(density, 1, 4)[0], scale)
    assert density.linearise is not None
    z, v = points(density, 5), points(density, 5, 1)
    gradient, product = density.linearise(z.numpy())
    by_autograd, second = expected(density, z, v)
    unit = 1 + float(second.abs().max())
    torch.testing.assert_close(torch.from_numpy(gradient), by_autograd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.from_numpy(product(v.numpy())) / unit, second / unit, rtol=1e-10, atol=1e-10)
    # the same numbers again: nothing was overwritten
    torch.testing.assert_close(torch.from_numpy(product(v.numpy())) / unit, second / unit, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("formula", "family", "priors"), MODELS)
def test_at_one_point_any_number_of_rows_has_a_product(formula, family, priors):
    density = regression_density(F, formula, family, priors)
    z = points(density, 1)
    assert density.linearise is not None
    hessian = torch.from_numpy(density.linearise(z.numpy())[1](np.eye(density.dim)))
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-9)
    v = points(density, 1, 1)
    second = expected(density, z, v)[1]
    torch.testing.assert_close(v @ hessian, second, rtol=1e-9, atol=1e-9)


def test_models_without_a_closed_form_leave_it_to_autograd():
    assert regression_density(F, "y ~ x", "student-t").linearise is None
    assert regression_density(F, "k ~ x", "negative-binomial").linearise is None
    assert regression_density(F, "y ~ x", "gaussian", ["x=exponential(1)"]).linearise is None
    assert regression_density(F, "y ~ x", "gaussian", ["sigma=uniform(0,9)"]).linearise is None

"""Group effects against torch's LKJ and autograd: densities, gradients, second derivatives, and draws of the prior."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import LKJCholesky
from torch.distributions.transforms import CorrCholeskyTransform

from hsivi_cli.targets import regression_model
from hsivi_cli.targets.group_effects import Correlations
from hsivi_cli.targets.regression import regression_density

RNG = np.random.default_rng(8)
N = 60
F = pd.DataFrame({"x": RNG.normal(size=N), "w": RNG.normal(size=N), "s": RNG.choice(list("abcd"), N)})
F["h"] = RNG.integers(1, 13, N)
F["y"] = F["x"] + RNG.normal(size=N)
F["k"] = RNG.poisson(np.exp(0.3 * F["x"]))
F["b"] = (RNG.random(N) < 0.5) * 1


@pytest.mark.parametrize("q", [2, 3, 5])
@pytest.mark.parametrize("eta", [0.7, 2.0])
def test_correlations_are_torchs_lkj(q, eta):
    law = Correlations(q, eta)
    y = torch.randn(7, q * (q - 1) // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(q))
    transform = CorrCholeskyTransform()
    factor = transform(y)
    torch.testing.assert_close(law.factor(y), factor, rtol=1e-12, atol=1e-12)
    lkj = LKJCholesky(q, torch.tensor(eta, dtype=torch.float64))
    expected = lkj.log_prob(factor) + transform.log_abs_det_jacobian(y, factor)
    torch.testing.assert_close(law.log_density(y), expected, rtol=1e-11, atol=1e-11)
    # E det is the ratio of the normalisers at eta + 1 and eta (torch's own draws miss it for q > 2)
    factors = law.factor(law.sample(20_000, torch.Generator().manual_seed(1)))
    found = factors.diagonal(dim1=1, dim2=2).prod(1) ** 2
    above = LKJCholesky(q, torch.tensor(eta + 1, dtype=torch.float64))
    one = factor[:1]
    log_det = 2 * one.diagonal(dim1=1, dim2=2).log().sum(1)
    expected = (lkj.log_prob(one) - above.log_prob(one) + log_det).exp()
    assert abs(float(found.mean() - expected)) < 5 * float(found.std()) / len(found) ** 0.5


def test_correlations_far_out_stay_finite():
    law = Correlations(3, 2.0)
    y = torch.tensor([[400.0, -400.0, 30.0]], dtype=torch.float64)
    assert bool(torch.isfinite(law.log_density(y)).all())
    assert bool(torch.isfinite(law.score(y, torch.ones(1, 3, 3, dtype=torch.float64))).all())


MODELS = [
    ("k ~ x + (x | s)", "negative-binomial"),
    ("y ~ x + (1 | s)", "gaussian"),
    ("y ~ x + (x + w | s) + (1 | h)", "student-t"),
    ("k ~ (0 + x | s) + (w | h)", "poisson"),
    ("b ~ x + (s | h)", "bernoulli"),
]


@pytest.mark.parametrize(("formula", "family"), MODELS)
@pytest.mark.parametrize("pieces", [False, True])
def test_gradient_and_its_derivative_are_autograds(formula, family, pieces, monkeypatch):
    density = regression_density(F, formula, family)
    assert density.analytic_gradient is not None
    generator = torch.Generator().manual_seed(0)
    z = 0.7 * torch.randn(5, density.dim, dtype=torch.float64, generator=generator).requires_grad_(True)
    direction = torch.randn(5, density.dim, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad(density.log_prob(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((expected * direction).sum(), z)
    if pieces:  # computed again on the way back, a few rows at a time
        monkeypatch.setattr(regression_model, "_CHUNK", 8)
        monkeypatch.setattr(regression_model, "_GRAPH", 16)
        (again,) = torch.autograd.grad(density.log_prob(z).sum(), z, create_graph=True)
        torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad((again * direction).sum(), z)[0], second, rtol=1e-9, atol=1e-9)
    found = density.gradient(z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad((found * direction).sum(), z)[0], second, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(density.gradient(z.detach()), expected.detach(), rtol=1e-10, atol=1e-10)

"""Regressions against Stan programs written out in torch, closed-form evidence, quadrature, and invariances."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats
from torch import distributions as D

from hsivi_cli.errors import InputError
from hsivi_cli.targets.regression import regression_density

RNG = np.random.default_rng(2)
N = 60
F = pd.DataFrame({"x": RNG.normal(size=N) * 3 + 100, "w": RNG.exponential(size=N), "age": RNG.integers(1, 4, N)})
F["y"] = 5 + 0.4 * F["x"] + F["w"] + 2 * RNG.normal(size=N)
F["b"] = (RNG.random(N) < 0.4) * 1
F["count"] = RNG.poisson(2, N)
F["k"], F["n"] = RNG.binomial(7, 0.4, N), 7
F["g"] = RNG.choice(list("abcd"), N)
X, W = torch.tensor(F[["x", "w"]].to_numpy()).T
ONE = torch.ones(N, dtype=torch.float64)
Y, B, COUNT, K = (torch.tensor(F[c].to_numpy(float)) for c in ("y", "b", "count", "k"))
AGE = {level: torch.tensor(F["age"].to_numpy() == level) for level in (2, 3)}
FLAT = ["b=flat", "Intercept=flat"]


def points(density, n=20, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(n, density.dim, dtype=torch.float64, generator=generator)


def log_jacobian(density, z):
    """log |d constrain / dz| at each row, for densities whose names are as many as their coordinates."""

    def stacked(row):
        return torch.stack([value[0] for value in density.constrain(row[None]).values()])

    return torch.stack([torch.linalg.slogdet(torch.autograd.functional.jacobian(stacked, row))[1] for row in z])


def half(law):
    return lambda x: law.log_prob(x) + math.log(2)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def normal(location, scale):
    return D.Normal(number(location), number(scale))


# each entry: formula, family, priors, and the Stan program as a function of the named parameters
PROGRAMS = {
    "kidiq": (
        "y ~ x",
        "gaussian",
        [*FLAT, "sigma=half_cauchy(2.5)"],
        lambda p: (
            D.Normal(p["Intercept"] + p["x"] * X, p["sigma"]).log_prob(Y).sum(1)
            + D.HalfCauchy(number(2.5)).log_prob(p["sigma"][:, 0])
        ),
    ),
    "nes": (
        "y ~ x + C(age) + w",
        "gaussian",
        [*FLAT, "sigma=flat"],
        lambda p: (
            D.Normal(
                p["Intercept"] + p["x"] * X + p["w"] * W + p["C(age)[2]"] * AGE[2] + p["C(age)[3]"] * AGE[3],
                p["sigma"],
            )
            .log_prob(Y)
            .sum(1)
        ),
    ),
    "blr": (
        "y ~ 0 + x + w",
        "gaussian",
        ["b=normal(0,10)", "sigma=normal(0,10)"],
        lambda p: (
            D.Normal(p["x"] * X + p["w"] * W, p["sigma"]).log_prob(Y).sum(1)
            + normal(0.0, 10.0).log_prob(torch.cat([p["x"], p["w"]], 1)).sum(1)
            + half(normal(0.0, 10.0))(p["sigma"][:, 0])
        ),
    ),
    "bounded": (
        "y ~ x + w",
        "gaussian",
        ["x=gamma(2,3)", "w=uniform(-1,2)", "Intercept=cauchy(0,9)", "sigma=uniform(0.5,40)"],
        lambda p: (
            D.Normal(p["Intercept"] + p["x"] * X + p["w"] * W, p["sigma"]).log_prob(Y).sum(1)
            + D.Gamma(2.0, number(3.0)).log_prob(p["x"][:, 0])
            - math.log(3)
            - math.log(39.5)
            + D.Cauchy(0.0, number(9.0)).log_prob(p["Intercept"][:, 0])
        ),
    ),
    "bounded intercept": (
        "y ~ x",
        "gaussian",
        ["Intercept=lognormal(1,2)", "x=student_t(3,0,2)", "sigma=exponential(0.2)"],
        lambda p: (
            D.Normal(p["Intercept"] + p["x"] * X, p["sigma"]).log_prob(Y).sum(1)
            + D.LogNormal(number(1.0), 2.0).log_prob(p["Intercept"][:, 0])
            + D.StudentT(number(3.0), 0.0, 2.0).log_prob(p["x"][:, 0])
            + D.Exponential(number(0.2)).log_prob(p["sigma"][:, 0])
        ),
    ),
    "logistic": (
        "b ~ x + w",
        "bernoulli",
        ["b=normal(0,2.5)", "Intercept=normal(0,5)"],
        lambda p: (
            D.Bernoulli(logits=p["Intercept"] + p["x"] * X + p["w"] * W).log_prob(B).sum(1)
            + normal(0.0, 2.5).log_prob(torch.cat([p["x"], p["w"]], 1)).sum(1)
            + normal(0.0, 5.0).log_prob(p["Intercept"][:, 0])
        ),
    ),
    "binomial": (
        "p(k, n) ~ w",
        "binomial",
        FLAT,
        lambda p: D.Binomial(7, logits=p["Intercept"] + p["w"] * W).log_prob(K).sum(1),
    ),
    "poisson": (
        "count ~ x + offset(log(w))",
        "poisson",
        FLAT,
        lambda p: D.Poisson((p["Intercept"] + p["x"] * X + W.log()).exp()).log_prob(COUNT).sum(1),
    ),
    "counts": (
        "count ~ w",
        "negative-binomial",
        [*FLAT, "phi=gamma(2,0.1)"],
        lambda p: (
            D.NegativeBinomial(p["shape"], logits=p["Intercept"] + p["w"] * W - p["shape"].log()).log_prob(COUNT).sum(1)
            + D.Gamma(2.0, number(0.1)).log_prob(p["shape"][:, 0])
        ),
    ),
    "robust": (
        "y ~ x",
        "student-t",
        [*FLAT, "sigma=half_cauchy(2.5)", "nu=gamma(2,0.1)"],
        lambda p: (
            D.StudentT(p["nu"], p["Intercept"] + p["x"] * X, p["sigma"]).log_prob(Y).sum(1)
            + D.HalfCauchy(number(2.5)).log_prob(p["sigma"][:, 0])
            + D.Gamma(2.0, number(0.1)).log_prob(p["nu"][:, 0])
        ),
    ),
    "default": (
        "y ~ x + w",
        "gaussian",
        [],
        lambda p: (
            D.Normal(p["Intercept"] + p["x"] * X + p["w"] * W, p["sigma"]).log_prob(Y).sum(1)
            + normal(0.0, float(2.5 * Y.std() / X.std())).log_prob(p["x"][:, 0])
            + normal(0.0, float(2.5 * Y.std() / W.std())).log_prob(p["w"][:, 0])
            + normal(float(Y.mean()), float(2.5 * Y.std())).log_prob(
                (p["Intercept"] + p["x"] * X.mean() + p["w"] * W.mean())[:, 0]
            )
            + D.Exponential(1 / Y.std()).log_prob(p["sigma"][:, 0])
        ),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_log_density_is_the_stan_programs_up_to_the_jacobian(name):
    formula, family, priors, program = PROGRAMS[name]
    density = regression_density(F, formula, family, priors)
    z = points(density)
    named = {key: value[:, None] for key, value in density.constrain(z).items()}
    expected = program(named) + log_jacobian(density, z)
    torch.testing.assert_close(density.log_prob(z), expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradient_and_its_derivative_are_autograds(name):
    formula, family, priors, _ = PROGRAMS[name]
    density = regression_density(F, formula, family, priors)
    assert density.analytic_gradient is not None
    z = points(density, 5).requires_grad_(True)
    direction = points(density, 5, 1.0).flip(0)
    (expected,) = torch.autograd.grad(density.log_prob(z).sum(), z, create_graph=True)
    found = density.gradient(z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)
    twice = [torch.autograd.grad((g * direction).sum(), z)[0] for g in (found, expected)]
    torch.testing.assert_close(twice[0], twice[1], rtol=1e-9, atol=1e-8)


def test_pointwise_log_likelihood_sums_and_large_blocks_change_nothing(monkeypatch):
    from hsivi_cli.targets import regression_model

    for formula, family in (
        ("count ~ x + w", "negative-binomial"),
        ("y ~ x", "student-t"),
        ("y ~ w + (w | g)", "gaussian"),
    ):
        density = regression_density(F, formula, family)
        z = points(density, 6, 0.5).requires_grad_(True)
        value, gradient = density.log_prob(z), density.gradient(z)
        with monkeypatch.context() as patch:  # pieces of a few rows, computed again on the way back
            patch.setattr(regression_model, "_CHUNK", 8)
            patch.setattr(regression_model, "_GRAPH", 16)
            torch.testing.assert_close(density.log_prob(z), value)
            torch.testing.assert_close(density.gradient(z), gradient)
            (found,) = torch.autograd.grad(density.gradient(z).pow(2).sum(), z)
        (expected,) = torch.autograd.grad(gradient.pow(2).sum(), z)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        # a response that only the likelihood sees tells it apart from the prior
        changed = density.predictive.condition(density.predictive.observed + 1)
        parts = [d.predictive.log_likelihood(z).sum(1) for d in (changed, density)]
        torch.testing.assert_close(changed.log_prob(z) - value, parts[0] - parts[1])


def gaussian_integral(log_prob, z):
    """log of the integral over all coordinates of a function whose logarithm is quadratic."""
    hessian = torch.autograd.functional.hessian(lambda row: log_prob(row[None])[0], z)
    slope = torch.autograd.functional.jacobian(lambda row: log_prob(row[None])[0], z)
    step = torch.linalg.solve(-hessian, slope)
    top = log_prob(z[None])[0] + 0.5 * slope @ step
    return top + 0.5 * len(z) * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(-hessian)[1]


def test_evidence_given_sigma_is_the_closed_form():
    priors = ["Intercept=normal(1,20)", "x=normal(0,2)", "w=normal(-1,3)", "sigma=lognormal(0,1)"]
    density = regression_density(F, "y ~ x + w", "gaussian", priors)
    design = torch.stack([ONE, X, W], 1)
    mean = design @ torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    for last in (-3.0, 0.0, 4.0):
        tail = torch.tensor([last], dtype=torch.float64)
        found = gaussian_integral(
            lambda row, tail=tail: density.log_prob(torch.cat([row, tail.expand(len(row), 1)], 1)),
            torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64),
        )
        z = torch.cat([torch.zeros(3, dtype=torch.float64), tail])[None].requires_grad_(True)
        sigma = density.constrain(z)["sigma"]
        (slope,) = torch.autograd.grad(sigma.sum(), z)
        covariance = (
            sigma.detach() ** 2 * torch.eye(N)
            + design @ torch.diag(torch.tensor([400.0, 4.0, 9.0]).double()) @ design.T
        )
        law = D.MultivariateNormal(mean, covariance)
        expected = law.log_prob(Y) + D.LogNormal(ONE[0] * 0, 1.0).log_prob(sigma.detach())[0] + slope[0, 3].log()
        assert abs(float(found - expected)) < 1e-8


def test_evidence_of_an_intercept_by_quadrature():
    density = regression_density(F, "b ~ 1", "bernoulli", ["Intercept=student_t(4,0,2)"])
    points_ = torch.linspace(-60, 60, 200_001, dtype=torch.float64)[:, None]
    found = float(torch.logsumexp(density.log_prob(points_), 0)) + math.log(120 / 200_000)
    ones, zeros = int(B.sum()), int(N - B.sum())

    def integrand(a):
        return math.exp(-ones * math.log1p(math.exp(-a)) - zeros * math.log1p(math.exp(a))) * stats.t(4, 0, 2).pdf(a)

    assert abs(found - math.log(integrate.quad(integrand, -15, 15, points=[-1, 0], epsabs=0)[0])) < 1e-6


@pytest.mark.parametrize("formula", ["y ~ x + w", "y ~ w + (w | g)", "y ~ 1 + (1 | g)"])
def test_prior_draws_have_the_prior_density(formula):
    """Stein: for draws of a density p, E[p'(z)] = 0 and E[z_i p_i'(z)] = -1 with p' the gradient of its logarithm."""
    density = regression_density(F, formula, "student-t", ["x=gamma(3,2)", "nu=uniform(2,30)"][("x" not in formula) :])
    z = density.predictive.prior(20_000, torch.Generator().manual_seed(7)).requires_grad_(True)
    log_prior = density.log_prob(z) - density.predictive.log_likelihood(z).sum(1)
    (score,) = torch.autograd.grad(log_prior.sum(), z)
    z = z.detach()
    for values, expected in ((score, 0.0), (z * score, -1.0)):
        error = (values.mean(0) - expected).abs() / (values.std(0) / len(z) ** 0.5)
        assert bool((error < 5).all()), error


def test_simulations_follow_the_likelihood_and_condition_keeps_the_priors():
    density = regression_density(F, "y ~ x + w", "gaussian")
    z = points(density, 1, 0.5)
    draws = density.predictive.simulate(z.expand(4000, -1), torch.Generator().manual_seed(1))
    value = density.constrain(z)
    eta = value["Intercept"] + value["x"] * X + value["w"] * W
    assert bool(((draws.mean(0) - eta).abs() < 5 * value["sigma"] / 4000**0.5).all())
    # twice the response: the same priors, so its density differs by the likelihood alone
    other = density.predictive.condition(2 * Y)
    laws = [D.Normal(eta, value["sigma"]).log_prob(response).sum() for response in (Y, 2 * Y)]
    torch.testing.assert_close(other.log_prob(z) - density.log_prob(z), (laws[1] - laws[0])[None])
    assert density.predictive.prior is not None
    assert regression_density(F, "y ~ x", "gaussian", ["x=flat"]).predictive.prior is None


def test_units_of_the_data_change_the_density_by_a_constant_only():
    """Posteriors with default priors do not depend on the units of x, and that of the coefficients scales with them."""
    metres = F.assign(x=(F["x"] - 50) * 1000)
    a, b = regression_density(F, "y ~ x + w", "gaussian"), regression_density(metres, "y ~ x + w", "gaussian")
    z = points(a)
    torch.testing.assert_close(a.log_prob(z), b.log_prob(z), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(a.constrain(z)["x"], b.constrain(z)["x"] * 1000, rtol=1e-7, atol=1e-9)


# bounded coefficients keep their own axes
@pytest.mark.parametrize("name", [name for name in PROGRAMS if "bounded" not in name])
def test_coordinates_start_at_the_data_and_are_of_order_one(name):
    formula, family, priors, _ = PROGRAMS[name]
    density = regression_density(F, formula, family, priors)
    hessian = torch.autograd.functional.hessian(lambda row: density.log_prob(row[None])[0], density.initial)
    eigenvalues = torch.linalg.eigvalsh(-hessian)
    assert float(eigenvalues.max()) < 10
    assert float(eigenvalues.min()) > 0.02


def test_group_effects_are_the_hierarchical_model():
    density = regression_density(F, "y ~ x + (w | g)", "gaussian", [*FLAT, "sigma=exponential(1)", "sd=normal(0,3)"])
    z = points(density, 8, 1.0)
    p = density.constrain(z)
    codes = torch.tensor(pd.factorize(F["g"], sort=True)[0])
    r = torch.stack([torch.stack([p[f"r_g[{v},{t}]"] for t in ("Intercept", "w")], 1) for v in "abcd"], 1)
    sd = torch.stack([p["sd_g[Intercept]"], p["sd_g[w]"]], 1)
    rho = p["cor_g[Intercept,w]"]
    eta = p["Intercept"][:, None] + p["x"][:, None] * X + r[:, codes, 0] + r[:, codes, 1] * W
    correlation = torch.eye(2).double() + rho[:, None, None] * torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    covariance = sd[:, :, None] * correlation * sd[:, None, :]
    law = D.MultivariateNormal(torch.zeros(2).double(), covariance[:, None])
    expected = D.Normal(eta, p["sigma"][:, None]).log_prob(Y).sum(1) + law.log_prob(r).sum(1)
    expected = expected + half(normal(0.0, 3.0))(sd).sum(1) + D.Exponential(ONE[0]).log_prob(p["sigma"])
    # LKJ(2) for two terms: (1 - rho^2) / B, with B = 4 / 3
    expected = expected + (1 - rho**2).log() - math.log(4 / 3)
    torch.testing.assert_close(density.log_prob(z), expected + log_jacobian(density, z), rtol=1e-9, atol=1e-8)


def test_facts_names_and_the_default_formula():
    density = regression_density(F[["x", "w", "b"]], None, None)
    assert density.facts[0].startswith("formula b ~ x + w")
    assert "family bernoulli (a guess" in density.facts[1]
    assert any(
        fact.startswith("prior Intercept ~ normal(0, 2.5) (default, on the intercept at") for fact in density.facts
    )
    odd = F.rename(columns={"x": "sigma", "w": "Intercept"})
    names = list(regression_density(odd, "y ~ sigma + Intercept", "gaussian").constrain(torch.zeros(1, 4).double()))
    assert names == ["Intercept", "b[sigma]", "b[Intercept]", "sigma"]
    stated = ["sigma=half_cauchy(2)", "b[sigma]=normal(0,7)", "b=normal(0,9)"]
    facts = regression_density(odd, "y ~ sigma + Intercept", "gaussian", stated).facts
    assert facts[-3:] == (
        "prior b[sigma] ~ normal(0, 7)",
        "prior b[Intercept] ~ normal(0, 9)",
        "prior sigma ~ half_cauchy(2)",
    )
    gap = F.assign(x=F["x"].where(F.index != 3))
    assert "1 of 60 rows dropped for missing values" in regression_density(gap, "y ~ x", "gaussian", [], "drop").facts
    with pytest.raises(InputError, match="missing"):
        regression_density(gap, "y ~ x", "gaussian")


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ("q=flat", 'no parameter "q" here: choose from Intercept, b, x, sigma'),
        ("shape=exponential(1)", "no parameter"),
        ("x=lkj(2)", "lkj is for correlations"),
        ("sigma=uniform(-2,-1)", "sigma is positive"),
        ("cor=lkj(2)", "no parameter"),
    ],
)
def test_priors_that_fit_nothing(prior, words):
    with pytest.raises(InputError, match=words):
        regression_density(F, "y ~ x", "gaussian", [prior])


def test_a_gaussian_fit_does_not_cost_more_with_more_rows():
    rows = 200_000
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=rows)})
    frame["y"] = frame["x"] + rng.normal(size=rows)
    density = regression_density(frame, "y ~ x", "gaussian", [*FLAT, "sigma=flat"])
    z = points(density, 3, 1.0)
    p = density.constrain(z)
    eta = p["Intercept"][:, None] + p["x"][:, None] * torch.tensor(frame["x"].to_numpy())
    direct = D.Normal(eta, p["sigma"][:, None]).log_prob(torch.tensor(frame["y"].to_numpy())).sum(1)
    value = density.log_prob(z)
    # the Jacobian is that of an affine map and a logarithm, so differences between points are the likelihood's
    expected = direct + p["sigma"].log()
    torch.testing.assert_close(value - value[0], expected - expected[0], rtol=1e-8, atol=1e-6)
    with torch.profiler.profile(profile_memory=True) as profile:
        density.log_prob(z)
    assert max(event.cpu_memory_usage for event in profile.events()) < 10_000  # bytes; one column has 1.6 million

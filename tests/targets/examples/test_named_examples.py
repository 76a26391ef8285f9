"""The named examples: derivatives, independent transcriptions with torch.distributions, evidences, exact draws."""

import dataclasses
import math

import pandas as pd
import pytest
import torch
from torch.distributions import Bernoulli, Binomial, Gamma, HalfCauchy, LogNormal, MultivariateNormal, Normal

from hsivi_cli.errors import InputError
from hsivi_cli.targets.examples import EXAMPLES, brownian, conditioned_diffusion, example_density, lorenz, seeds
from hsivi_cli.targets.examples.logistic import standardise

DRAWS = torch.Generator().manual_seed(7)
TABLE = pd.DataFrame(
    {
        "one": torch.randn(30, generator=DRAWS).double().numpy() * 3 + 1,
        "constant": [0.1] * 30,
        "two": torch.rand(30, generator=DRAWS).double().numpy(),
        "y": (torch.arange(30) % 3 == 0).long().numpy(),
    }
)
ANALYTIC = ["eight-schools", "logistic", "brownian", "lorenz", "seeds", "conditioned-diffusion"]
EXACT = [name for name in EXAMPLES if name not in ("logistic", "lorenz", "seeds", "conditioned-diffusion")]


def example(name):
    return example_density(name, TABLE if name == "logistic" else None)


def points(density, n, scale=0.5):
    z = scale * torch.randn(n, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return z if density.initial is None else density.initial + 0.01 * z


@pytest.mark.parametrize("name", ANALYTIC)
def test_gradient_and_its_derivative_are_autograds(name):
    density = example(name)
    by_autograd = dataclasses.replace(density, analytic_gradient=None)
    z = points(density, 4).requires_grad_(True)
    found, expected = density.gradient(z), by_autograd.gradient(z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    second = [torch.autograd.grad((g * direction).sum(), z)[0] for g in (found, expected)]
    torch.testing.assert_close(second[0], second[1], rtol=1e-8, atol=1e-8)


def transcribed(name, z):
    """Log joint of one unconstrained point, written anew."""
    if name == "logistic":
        y = torch.tensor(TABLE["y"].to_numpy()).double()
        features = torch.tensor(TABLE[["one", "constant", "two"]].to_numpy())
        x = torch.ones(30, 4, dtype=torch.float64)
        x[:, 1:] = features - features.mean(0)
        x[:, 1] /= features[:, 0].std(correction=0)
        x[:, 3] /= features[:, 2].std(correction=0)
        x[:, 2] = 0
        return Normal(0.0, 1.0).log_prob(z).sum() + Bernoulli(logits=x @ z).log_prob(y).sum()
    if name == "eight-schools":
        t, mu, tau = z[:8], z[8], z[9].exp()
        y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
        sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
        prior = Normal(0, 1).log_prob(t).sum() + Normal(0, 5).log_prob(mu) + HalfCauchy(5).log_prob(tau) + z[9]
        return prior + Normal(mu + tau * t, sigma).log_prob(y).sum()
    if name == "brownian":
        inner, outer = torch.log1p(z[0].exp()), torch.log1p(z[1].exp())
        total = LogNormal(0, 2).log_prob(inner) + LogNormal(0, 2).log_prob(outer) + z[:2].sigmoid().log().sum()
        x = z[2:]
        total = total + Normal(0, inner).log_prob(x[0])
        for t in range(1, 30):
            total = total + Normal(x[t - 1], inner).log_prob(x[t])
        for t, y in zip([*range(10), *range(20, 30)], brownian.OBSERVED, strict=True):
            total = total + Normal(x[t], outer).log_prob(y)
        return total
    if name == "seeds":
        weight, b, log_tau = dict(zip(("a0", "a1", "a12", "a2"), z[:4], strict=True)), z[4:25], z[25]
        total = Gamma(0.01, 0.01).log_prob(log_tau.exp()) + log_tau + Normal(0, 10).log_prob(z[:4]).sum()
        total = total + Normal(0, (-log_tau / 2).exp()).log_prob(b).sum()
        for i in range(21):
            x1, x2 = seeds.X1[i], seeds.X2[i]
            logit = weight["a0"] + weight["a1"] * x1 + weight["a2"] * x2 + weight["a12"] * x1 * x2 + b[i]
            total = total + Binomial(seeds.SEEDS[i], logits=logit).log_prob(seeds.GERMINATED[i])
        return total
    if name == "lorenz":
        s = z.reshape(30, 3)
        total = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(s[0])
        for t in range(29):
            x, y, height = s[t]
            slope = torch.stack([10 * (y - x), x * (28 - height) - y, x * y - 8 * height / 3])
            total = total + Normal(s[t] + 0.02 * slope, 0.1 * math.sqrt(0.02)).log_prob(s[t + 1]).sum()
        for t, o in zip([*range(10), *range(20, 30)], lorenz.OBSERVED, strict=True):
            total = total + Normal(s[t, 0], 1).log_prob(o)
        return total
    total, x = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step in range(100):
        total = total + Normal(x + 0.01 * 10 * x * (1 - x**2) / (1 + x**2), 0.1).log_prob(z[step])
        x = z[step]
        if (step + 1) % 5 == 0:
            total = total + Normal(x, 0.1).log_prob(conditioned_diffusion.OBSERVED[(step + 1) // 5 - 1])
    return total


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ANALYTIC)
def test_log_joint_is_the_published_model(name):
    density = example(name)
    z = points(density, 3)
    expected = torch.stack([transcribed(name, row) for row in z])
    torch.testing.assert_close(density.log_prob(z), expected, rtol=1e-12, atol=1e-10)


def stein_scores(z, gradient):
    """z-scores of `E grad = 0` and of `E z_i grad_i = -1`, which hold for draws of the density alone."""
    moments = torch.cat([gradient, z * gradient + 1], 1)
    return moments.mean(0) / (moments.std(0) / math.sqrt(len(z)))


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_obey_steins_identity(name):
    density = example(name)
    z = density.exact_draws(20_000, torch.Generator().manual_seed(11))
    score = stein_scores(z, density.gradient(z).detach())
    assert score.abs().max() < 5
    shifted = z.clone()
    shifted[:, 0] *= 1.15  # a sampler off by 15 % must be seen
    assert stein_scores(shifted, density.gradient(shifted).detach()).abs().max() > 5


@pytest.mark.parametrize("name", ["eight-schools", "logistic", "brownian", "lorenz", "conditioned-diffusion"])
def test_prior_draws_come_from_the_prior(name):
    density = example(name)
    z = density.predictive.prior(20_000, torch.Generator().manual_seed(12)).requires_grad_(True)
    log_prior = density.log_prob(z) - density.predictive.log_likelihood(z).sum(1)
    gradient = torch.autograd.grad(log_prior.sum(), z)[0]
    assert stein_scores(z.detach(), gradient).abs().max() < 5


@pytest.mark.parametrize("name", ANALYTIC)
def test_simulated_responses_come_from_the_likelihood(name):
    """The likelihood's score has mean zero over its own responses; and another response is another posterior."""
    density = example(name)
    z = points(density, 1)
    responses = density.predictive.simulate(z.expand(300, -1), torch.Generator().manual_seed(13))
    assert responses.shape == (300, len(density.predictive.observed))
    scores = torch.stack([density.predictive.condition(y).gradient(z)[0] - density.gradient(z)[0] for y in responses])
    # minus the observed response's own score
    own = torch.autograd.functional.jacobian(lambda p: density.predictive.log_likelihood(p).sum(), z)[0, :]
    scores = scores + own
    error = scores.std(0) / math.sqrt(300)
    moving = error > 1e-12
    assert moving.any()
    assert (scores.mean(0)[moving] / error[moving]).abs().max() < 5
    same = density.predictive.condition(density.predictive.observed)
    torch.testing.assert_close(same.log_prob(z), density.log_prob(z))


@pytest.mark.usefixtures("double")
def test_brownian_evidence_by_dense_covariances():
    """The scales' quadrature with the path integrated out through the 20 x 20 covariance of the observations."""
    times = torch.tensor([*range(1, 11), *range(21, 31)])
    walk = torch.minimum(times[:, None], times).double()
    axis = torch.linspace(-11, 4, 121)
    inner, outer = torch.meshgrid(axis, axis, indexing="ij")
    covariance = (2 * inner).exp()[..., None, None] * walk + (2 * outer).exp()[..., None, None] * torch.eye(20)
    factor = torch.linalg.cholesky(covariance)
    likelihood = MultivariateNormal(torch.zeros(20), scale_tril=factor).log_prob(brownian.OBSERVED)
    joint = likelihood + Normal(0, 2).log_prob(inner) + Normal(0, 2).log_prob(outer)
    log_z = float(joint.reshape(-1).logsumexp(0) + 2 * (axis[1] - axis[0]).log())
    assert abs(log_z - 1.18775) < 1e-4
    assert abs(example("brownian").log_z - log_z) < 1e-4
    assert abs(brownian.log_evidence(brownian.OBSERVED) - example("brownian").log_z) < 1e-6


@pytest.mark.usefixtures("double")
def test_eight_schools_evidence_over_mu_and_tau():
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu, log_tau = torch.linspace(-35, 35, 401), torch.linspace(-16, 9, 501)
    spread = torch.sqrt(sigma**2 + (2 * log_tau).exp()[:, None, None])
    joint = Normal(mu[:, None], spread).log_prob(y).sum(-1) + Normal(0, 5).log_prob(mu)
    joint = joint + (HalfCauchy(5).log_prob(log_tau.exp()) + log_tau)[:, None]
    log_z = joint.reshape(-1).logsumexp(0) + (mu[1] - mu[0]).log() + (log_tau[1] - log_tau[0]).log()
    assert abs(float(log_z) - example("eight-schools").log_z) < 1e-5


def test_lorenz_starts_at_the_mode():
    density = example("lorenz")
    mode = density.initial[None]
    hessian = torch.autograd.functional.jacobian(lambda z: density.gradient(z[None])[0], mode[0])
    step = torch.linalg.solve(hessian, density.gradient(mode)[0])
    assert torch.linalg.eigvalsh(-hessian)[0] > 0
    assert (density.gradient(mode)[0] @ step).abs() < 0.01  # twice what Newton's step would still gain, in nats
    # the log evidence by Laplace's method, as the note has it: -29.21
    laplace = density.log_prob(mode) + 45 * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(-hessian)[1]
    assert abs(float(laplace) + 29.21) < 0.01


def test_conditioned_diffusion_observations_come_from_their_seed():
    torch.testing.assert_close(
        conditioned_diffusion.OBSERVED, conditioned_diffusion.synthetic(2022), rtol=0, atol=5.001e-5
    )


def test_standardised_columns():
    x = standardise(torch.tensor(TABLE[["one", "constant"]].to_numpy()))
    assert (x[:, 0] == 1).all()
    assert (x[:, 2] == 0).all()
    torch.testing.assert_close(x[:, 1].square().mean(), torch.tensor(1.0).double())


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("nope", None, "choose from eight-schools"),
        ("logistic", None, "needs a data file"),
        ("seeds", TABLE, "brings its own data"),
        ("logistic", TABLE[["y"]], "one more at least"),
        ("logistic", TABLE.assign(y=TABLE["y"] + 1), "holds 2"),
        ("logistic", TABLE.assign(one="a"), "'one' is not numeric"),
        ("logistic", TABLE.assign(one=TABLE["one"].where(TABLE.index != 4)), "in row 5"),
        ("logistic", TABLE[:1], "two rows"),
        ("eight-schools", TABLE, "needs a column 'sigma'"),
        ("eight-schools", pd.DataFrame({"y": [1.0], "sigma": [0.0]}), "not positive"),
    ],
)
def test_bad_input_is_one_line(name, data, line):
    with pytest.raises(InputError) as err:
        example_density(name, data)
    assert line in str(err.value)
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_names_what_the_user_sees(name):
    density = example(name)
    values = density.constrain(points(density, 2))
    assert all(len(value) == 2 and value.dtype == torch.float64 for value in values.values())
    assert density.log_prob(points(density, 2)).shape == (2,)
    assert density.facts
    assert torch.isfinite(density.gradient(torch.zeros(1, density.dim, dtype=torch.float64))).all()

"""The example models for simulation-based inference: prior, likelihood and simulator of each are of one mind."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_t

from hsivi_cli.targets.amortised import load_amortised
from hsivi_cli.targets.user_model import load_user_model, model_maker

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "models"
NAMES = ("bernoulli_glm", "gaussian_linear", "hierarchical_gaussian", "image_decoder", "slcp", "two_moons")
SMOOTH = tuple(name for name in NAMES if name != "two_moons")  # densities without jumps
N = 4000


def table(name):
    return pd.read_csv(SHIPPED / f"{name}.csv")


@pytest.fixture(scope="module")
def targets():
    return {name: load_amortised(SHIPPED / f"{name}.py", table(name)) for name in NAMES}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def vanishes(statistic):
    """Whether the mean of independent rows is zero, all columns within 4.5 standard errors."""
    error = statistic.std(0) / math.sqrt(len(statistic))
    return bool((statistic.mean(0).abs() <= 4.5 * error).all())


def test_the_list_is_whole():
    assert set(NAMES) == {path.stem for path in SHIPPED.glob("*.py") if "--method smc-wake" in path.read_text()}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_an_observation_that_the_prior_can_make(name, targets):
    target = targets[name]
    assert target.facts == (), "a model that ships must be batched and twice differentiable"
    assert (
        f"hsivi fit-posterior {name}.csv --model {name}.py --method smc-wake --amortize"
        in (SHIPPED / f"{name}.py").read_text()
    )
    assert target.observed.shape == table(name).shape
    assert len(target.observed) >= 20
    z = target.sample_prior(1000, generator())
    found = target.log_likelihood(z.expand(len(target.observed), -1, -1), target.observed)
    assert bool(torch.isfinite(found).any(1).all())
    assert not bool((found == torch.inf).any())


@pytest.mark.parametrize("name", NAMES)
def test_the_first_row_is_fitted_without_amortisation(name, targets):
    model = model_maker(SHIPPED / f"{name}.py")(table(name))
    assert torch.equal(model.observed, targets[name].observed[0])


@pytest.mark.parametrize("row", [1, 7, 50])
def test_two_moons_load_where_the_middle_of_the_box_is_impossible(row):
    rows = table("two_moons").sort_values("x1").reset_index(drop=True)
    density = load_user_model(SHIPPED / "two_moons.py", rows.iloc[[row]])
    assert len(density.facts) == 1


@pytest.mark.parametrize("name", NAMES)
def test_prior_draws_have_the_density_of_the_prior(name, targets):
    """E score = 0 and E z score = -1, in the unconstrained coordinates, under the law whose score it is."""
    z = targets[name].sample_prior(N, generator(1)).requires_grad_(True)
    (score,) = torch.autograd.grad(targets[name].log_prior(z).sum(), z)
    assert vanishes(score)
    assert vanishes(z.detach() * score + 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_prior_integrates_to_one(name, targets):
    """Importance sampling from a wider Student t; evidences are wrong by what the normaliser is wrong by."""
    drawn = targets[name].sample_prior(N, generator(1)).numpy()
    wider = multivariate_t(drawn.mean(0), np.atleast_2d(np.cov(drawn.T)), df=6, seed=0)
    z = np.asarray(wider.rvs(20_000)).reshape(20_000, -1)
    weight = np.exp(targets[name].log_prior(torch.from_numpy(z)).numpy() - wider.logpdf(z))
    assert weight.mean() == pytest.approx(1, abs=4.5 * weight.std() / math.sqrt(len(z)))
    assert weight.std() < 3


@pytest.mark.parametrize("name", SMOOTH)
def test_simulations_have_the_density_of_the_likelihood(name, targets):
    """E grad_z log p(x | z) = 0 for x ~ p(x | z), whatever z."""
    target = targets[name]
    z = target.sample_prior(N, generator(2))
    x = target.simulate(z, generator(3))
    points = z[:, None].clone().requires_grad_(True)
    (score,) = torch.autograd.grad(target.log_likelihood(points, x).sum(), points)
    # weighed down where scales nearly vanish, or the sum is theirs alone; a function of z keeps the mean at zero
    size = 1 + target.log_likelihood(z[:, None], target.simulate(z, generator(4))).abs()
    assert vanishes(score[:, 0] / size**2)
    assert vanishes(z * score[:, 0] / size)  # what is too flat or too steep cancels in the mean of a symmetric prior


@pytest.mark.parametrize("name", [name for name in SMOOTH if name != "bernoulli_glm"])
def test_simulations_have_the_scale_of_the_likelihood(name, targets):
    """Stein: E grad_x log p(x | z) . (x - c) = -N, the mean simulation of z as c."""
    target = targets[name]
    z = target.sample_prior(N, generator(2))
    x = target.simulate(z, generator(3)).requires_grad_(True)
    (slope,) = torch.autograd.grad(target.log_likelihood(z[:, None], x).sum(), x)
    other = target.simulate(z, generator(4))
    assert vanishes((slope * (x.detach() - other)).sum(1) + x.shape[1])


def test_two_moons_have_evidence_and_entropy_of_the_exact_density(targets):
    """p(x) = 1/2 where every preimage is in the box, two crescents of half the mass each, entropy -3.656."""
    target, side = targets["two_moons"], 700
    edge = torch.linspace(-1, 1, side + 1, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    theta = torch.cartesian_prod(middle, middle)
    x = torch.tensor([[0.0, 0.0], [-0.3, 0.2]]).double()
    z = torch.logit((theta + 1) / 2)
    log_joint = target.log_likelihood(z.expand(2, -1, -1), x) - math.log(4)
    cell = (2 / side) ** 2
    evidence = log_joint.exp().sum(1) * cell
    torch.testing.assert_close(evidence, torch.full((2,), 0.5).double(), rtol=5e-3, atol=0)
    posterior = (log_joint - evidence.log()[:, None]).exp()
    upper = (posterior * (theta.sum(1) > 0)).sum(1) * cell
    torch.testing.assert_close(upper, torch.full((2,), 0.5).double(), rtol=1e-3, atol=0)
    entropy = -(posterior * posterior.clamp_min(1e-300).log()).sum(1) * cell
    torch.testing.assert_close(entropy, torch.full((2,), -3.656).double(), rtol=0, atol=5e-3)
    spread = (posterior * theta.sum(1).abs()).sum(1) * cell
    torch.testing.assert_close(spread, torch.tensor([0.4437, 0.8678]).double(), rtol=0, atol=1e-3)


def test_two_moons_simulate_what_they_say(targets):
    """The likelihood integrates to one over x, and simulations have its mean log density."""
    target, theta = targets["two_moons"], torch.tensor([[0.3, -0.6]]).double()
    z = torch.logit((theta + 1) / 2)
    centre = torch.tensor([0.25 - 0.3 / math.sqrt(2), -0.9 / math.sqrt(2)]).double()
    axis = torch.linspace(-0.16, 0.16, 401, dtype=torch.float64)
    x = centre + torch.cartesian_prod(axis, axis)
    mass = target.log_likelihood(z.expand(len(x), 1, 2), x)[:, 0].exp() * (axis[1] - axis[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1, abs=5e-3)
    drawn = target.simulate(z.expand(N, 2), generator(5))
    found = target.log_likelihood(z.expand(N, 1, 2), drawn)[:, 0]
    assert bool(torch.isfinite(found).all())
    assert float(found.mean()) == pytest.approx(3.656 + math.log(2), abs=4.5 * float(found.std()) / math.sqrt(N))
    assert vanishes(drawn - (mass[:, None] * x).sum(0) / mass.sum())


def test_the_linear_gaussian_has_the_known_posterior(targets):
    target = targets["gaussian_linear"]
    exact = torch.distributions.Normal(target.observed[:, None] / 2, torch.tensor(0.05, dtype=torch.float64).sqrt())
    z = exact.sample((5,))[:, :, 0].transpose(0, 1)
    log_evidence = (
        torch.distributions.Normal(0.0, torch.tensor(0.2, dtype=torch.float64).sqrt()).log_prob(target.observed).sum(1)
    )
    found = target.log_prior(z) + target.log_likelihood(z, target.observed) - exact.log_prob(z).sum(2)
    torch.testing.assert_close(found, log_evidence[:, None].expand(-1, 5), rtol=1e-10, atol=1e-10)


def test_four_modes_of_slcp_are_the_same(targets):
    target, z = targets["slcp"], torch.randn(1, 10, 5, generator=generator(), dtype=torch.float64)
    x = target.observed[:1]
    for signs in ((1, 1, -1, 1, 1), (1, 1, 1, -1, 1)):
        torch.testing.assert_close(
            target.log_likelihood(z * torch.tensor(signs), x), target.log_likelihood(z, x), rtol=1e-9, atol=1e-9
        )

"""HMC: the integrator is reversible and preserves volume, and moves leave their target invariant."""

import math

import pytest
import torch
from scipy import stats

from hsivi_cli.transitions.hmc import Trajectory, adapt_step, hmc_move, leapfrog, start_chains

SCALE = torch.tensor([[0.7, 0.0], [-0.4, 1.3]], dtype=torch.float64)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def banana(z):
    return -0.5 * z[:, 0] ** 2 - 0.5 * (z[:, 1] - z[:, 0] ** 2) ** 2


def gradient_of(log_prob):
    return torch.func.vmap(torch.func.grad(lambda z: log_prob(z[None])[0]))


BANANA_GRADIENT = gradient_of(banana)


@pytest.mark.parametrize("scale", [None, SCALE, SCALE.diagonal()], ids=["identity", "dense", "diagonal"])
def test_leapfrog_is_reversible(scale):
    z, momentum = draws(6, 2), draws(6, 2, seed=1)
    trajectory = Trajectory(0.2, 7, scale=scale)
    step = torch.linspace(0.1, 0.3, 6, dtype=torch.float64)[:, None]
    z1, p1, slope = leapfrog(z, momentum, BANANA_GRADIENT(z), BANANA_GRADIENT, step, trajectory)
    assert float((z1 - z).abs().min()) > 1e-3
    torch.testing.assert_close(slope, BANANA_GRADIENT(z1))
    z2, p2, _ = leapfrog(z1, -p1, slope, BANANA_GRADIENT, step, trajectory)
    torch.testing.assert_close(z2, z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(-p2, momentum, rtol=1e-11, atol=1e-11)


def test_leapfrog_preserves_volume_and_nearly_the_energy():
    trajectory = Trajectory(0.1, 5, scale=SCALE)
    step = torch.full((1, 1), 0.1, dtype=torch.float64)

    def flow(state):
        z, momentum = state[None, :2], state[None, 2:]
        z, momentum, _ = leapfrog(z, momentum, BANANA_GRADIENT(z), BANANA_GRADIENT, step, trajectory)
        return torch.cat([z, momentum], 1)[0]

    start = draws(4)
    assert abs(float(torch.autograd.functional.jacobian(flow, start).det()) - 1) < 1e-12

    def energy(state):
        return float(-banana(state[None, :2]) + 0.5 * (state[2:] ** 2).sum())

    assert 1e-9 < abs(energy(flow(start)) - energy(start)) < 0.02


def moved_far(z, log_prob, trajectory, moves, seed=5):
    gradient = gradient_of(log_prob)
    generator = torch.Generator().manual_seed(seed)
    chains, acceptance = start_chains(z, log_prob, gradient), []
    for _ in range(moves):
        moved = hmc_move(chains, log_prob, gradient, trajectory, generator)
        chains = moved.chains
        acceptance.append(float(moved.acceptance.mean()))
    torch.testing.assert_close(chains.log_prob, log_prob(chains.z))
    torch.testing.assert_close(chains.gradient, gradient(chains.z))
    return chains.z, sum(acceptance) / moves


@pytest.mark.parametrize("leapfrogs", [1, 4], ids=["mala", "hmc"])
def test_a_gaussian_stays_what_it_is(leapfrogs):
    # a step so large that a third is rejected: without the accept step the variance would be off by a fifth
    z, acceptance = moved_far(draws(100_000, 1), lambda z: -0.5 * z[:, 0] ** 2, Trajectory(1.6, leapfrogs), 5)
    assert 0.5 < acceptance < 0.95
    assert stats.kstest(z[:, 0].numpy(), "norm").pvalue > 1e-3
    assert abs(float((z**2).mean()) - 1) < 4 * math.sqrt(2 / 100_000)


def test_a_non_gaussian_target_is_reached_and_kept():
    # log of a Gamma(3) variable: skewed, one tail exponential, the other doubly so
    z, _ = moved_far(0.1 * draws(8_000, 1), lambda z: 3 * z[:, 0] - z[:, 0].exp(), Trajectory(0.8, 3), 40)
    assert stats.kstest(z[:, 0].exp().numpy(), stats.gamma(3).cdf).pvalue > 1e-3


def test_without_rejections_the_same_check_fails():
    z, momentum = draws(20_000, 1), draws(20_000, 1, seed=1)
    step = torch.full((20_000, 1), 1.6, dtype=torch.float64)
    z, _, _ = leapfrog(z, momentum, -z, lambda z: -z, step, Trajectory(1.6, 1))
    assert stats.kstest(z[:, 0].numpy(), "norm").pvalue < 1e-6


def test_detailed_balance_between_two_halves():
    # started in the target, as many chains cross zero upwards as downwards
    log_prob = lambda z: 3 * z[:, 0] - z[:, 0].exp()  # noqa: E731
    law = torch.distributions.Gamma(torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = law.sample((40_000, 1)).log()
    end, _ = moved_far(start, log_prob, Trajectory(0.9, 2, jitter=0.5), 1)
    for lower, upper in ((0.5, 1.5), (1.0, 1.2)):
        up = int(((start < lower) & (end > upper)).sum())
        down = int(((start > upper) & (end < lower)).sum())
        assert up > 500
        assert abs(up - down) < 4 * math.sqrt(up + down)


def test_chains_that_leave_the_finite_numbers_stay_where_they_were():
    def log_prob(z):
        return torch.where(z[:, 0] > 0, -z[:, 0], torch.nan)

    def gradient(z):
        return torch.where(z > 0, -torch.ones_like(z), torch.nan)

    z = torch.full((500, 1), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    moved = hmc_move(start_chains(z, log_prob, gradient), log_prob, gradient, Trajectory(1.0, 2), generator)
    stayed = moved.chains.z[:, 0] == 0.5
    assert bool(stayed.any())
    assert bool((~stayed).any())
    assert bool((moved.chains.z > 0).all())
    assert bool((moved.acceptance[moved.divergent] == 0).all())
    assert bool(moved.divergent.any())


def test_the_step_adapts_to_its_target_acceptance():
    log_prob = lambda z: -0.5 * (z**2).sum(1)  # noqa: E731
    gradient = lambda z: -z  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    for step in (0.05, 30.0):
        chains = start_chains(draws(1000, 20), log_prob, gradient)
        for i in range(1, 60):
            moved = hmc_move(chains, log_prob, gradient, Trajectory(step, 3), generator)
            chains, step = moved.chains, adapt_step(step, moved.acceptance, i)
        assert abs(1 / float((1 / moved.acceptance.clamp_min(0.01)).mean()) - 0.8) < 0.1

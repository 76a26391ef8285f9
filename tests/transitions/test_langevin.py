"""The walks against plain loops that follow the paper line by line, and the ways in which they collapse to each other.

The target is a small logistic regression; the loops below share no code with the package but the network.
"""

import math

import pytest
import torch
from torch.distributions import Normal

from hsivi_cli.bridges.geometric import DiagonalGaussian, geometric_bridge, schedule
from hsivi_cli.networks.residual_score import ResidualScore
from hsivi_cli.transitions.controlled import controlled_walk
from hsivi_cli.transitions.langevin import (
    euler_refresh,
    euler_walk,
    exact_refresh,
    log_momentum_ratio,
    mixed_refresh,
    overdamped_walk,
    underdamped_walk,
    undo_leapfrog,
)

K, N, D = 5, 6, 4


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = seeded(30, D), (seeded(30, seed=1) > 0).double()


def log_target(z):
    logits = z @ X.T
    return (Y * logits - torch.nn.functional.softplus(logits)).sum(1) - 0.5 * z.square().sum(1)


def target_gradient(z):
    return (Y - (z @ X.T).sigmoid()) @ X - z


class Case:
    """Parameters that want gradients, and noise."""

    def __init__(self, overdamped, transitions=K, step=0.05):
        self.mean, self.log_scale = 0.3 * seeded(D, seed=2), 0.2 * seeded(D, seed=3)
        self.increments = seeded(transitions + 1, seed=4).exp()
        self.step = step * (0.3 * seeded(transitions, 1, 1, seed=5)).exp()
        self.a = torch.full((transitions, 1, 1), 0.3, dtype=torch.float64)
        rows = transitions + (overdamped == "controlled")
        self.network = ResidualScore(D if overdamped else 2 * D, D, rows, torch.Generator().manual_seed(6))
        self.network.factor.data.fill_(0.8)
        self.leaves = (self.mean, self.log_scale, self.increments, self.step, self.a)
        for leaf in self.leaves:
            leaf.requires_grad_(True)
        self.start, self.rho, self.noise = seeded(N, D, seed=7), seeded(N, D, seed=8), seeded(transitions, N, D, seed=9)

    def bridge(self):
        reference = DiagonalGaussian(self.mean, self.log_scale)
        return geometric_bridge(reference, target_gradient, schedule(self.increments, len(self.noise)))

    @property
    def z(self):
        return self.mean + self.log_scale.exp() * self.start

    def position_score(self, z):
        return self.network(z)

    def phase_score(self, z, rho):
        return self.network(torch.cat([z, rho], 2))

    def at(self, k, *inputs):
        """Row k of the network, by the full batch: slow and plain."""
        x = torch.cat(inputs, 1)
        return self.network(x.expand(len(self.network.embedding), -1, -1))[k]

    def gradients(self, value):
        parameters = (*self.leaves, *self.network.parameters())
        found = torch.autograd.grad(value.mean(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def log_normal(x, mean, variance):
    return Normal(mean, variance.sqrt()).log_prob(x).sum(1)


def plain_overdamped(case, score=None):
    z, bridge, total = case.z, case.bridge(), 0
    for k, (e, xi) in enumerate(zip(case.step[:, 0, 0], case.noise, strict=True)):
        forward = z + e * bridge.gradient(k, z)
        new = forward + (2 * e).sqrt() * xi
        backward = new + e * bridge.gradient(k, new) + (e * score(k, new) if score else 0)
        total = total + log_normal(z, backward, 2 * e) - log_normal(new, forward, 2 * e)
        z = new
    return z, total


def plain_controlled(case):
    z, bridge, total = case.z, case.bridge(), 0
    for k, (e, xi) in enumerate(zip(case.step[:, 0, 0], case.noise, strict=True)):
        forward = z + e * (bridge.gradient(k, z) + case.at(k, z))
        new = forward + (2 * e).sqrt() * xi
        backward = new + e * (bridge.gradient(k, new) - case.at(k + 1, new))
        total = total + log_normal(z, backward, 2 * e) - log_normal(new, forward, 2 * e)
        z = new
    return z, total


def plain_underdamped(case, forward, backward, score=None):
    """`forward(a)` gives the mean's factor and the variance, `backward(a)` those and the score's factor."""
    z, rho, bridge, total = case.z, case.rho, case.bridge(), 0
    for k, (d, a, xi) in enumerate(zip(case.step[:, 0, 0], case.a[:, 0, 0], case.noise, strict=True)):
        keep, variance = forward(a)
        fresh = keep * rho + variance.sqrt() * xi
        half = fresh + d / 2 * bridge.gradient(k, z)
        new = z + d * half
        keep_back, variance_back, push = backward(a)
        mean_back = keep_back * fresh + (push * score(k, z, fresh) if score else 0)
        total = total + log_normal(rho, mean_back, variance_back) - log_normal(fresh, keep * rho, variance)
        z, rho = new, half + d / 2 * bridge.gradient(k, new)
    return z, total, rho


def plain_euler(case, score=None):
    z, rho, bridge, total = case.z, case.rho, case.bridge(), 0
    for k, (d, a, xi) in enumerate(zip(case.step[:, 0, 0], case.a[:, 0, 0], case.noise, strict=True)):
        force = d * bridge.gradient(k, z)
        new_rho = (1 - a) * rho + force + (2 * a).sqrt() * xi
        back = (1 - a) * new_rho - force + (2 * a * score(k, z, new_rho) if score else 0)
        total = total + log_normal(rho, back, 2 * a) - log_normal(new_rho, (1 - a) * rho + force, 2 * a)
        z, rho = z + d * new_rho, new_rho
    return z, total, rho


def euler_both(a):
    return 1 - a, 2 * a


def walks():
    """name -> (case, the package's walk, the plain one)"""
    over, under, controlled = Case(True), Case(False), Case("controlled")
    bridged = over.bridge, under.bridge, controlled.bridge

    def ours(refresh, score):
        return lambda: underdamped_walk(
            under.start, under.rho, bridged[1](), under.step, refresh(under.a), under.noise, score
        )

    def exact(a):
        return a, 1 - a**2

    return {
        "ula": (
            over,
            lambda: overdamped_walk(over.start, bridged[0](), over.step, over.noise),
            lambda: plain_overdamped(over),
        ),
        "mcd": (
            over,
            lambda: overdamped_walk(over.start, bridged[0](), over.step, over.noise, over.position_score),
            lambda: plain_overdamped(over, over.at),
        ),
        "cmcd": (
            controlled,
            lambda: controlled_walk(
                controlled.start, bridged[2](), controlled.step, controlled.noise, controlled.network
            ),
            lambda: plain_controlled(controlled),
        ),
        "uha": (
            under,
            ours(exact_refresh, None),
            lambda: plain_underdamped(under, exact, lambda a: (a, 1 - a**2, 0)),
        ),
        "ldvi": (
            under,
            ours(euler_refresh, under.phase_score),
            lambda: plain_underdamped(under, euler_both, lambda a: (1 - a, 2 * a, 2 * a), under.at),
        ),
        "mixed": (
            under,
            ours(mixed_refresh, under.phase_score),
            lambda: plain_underdamped(
                under, lambda a: ((-a).exp(), 1 - (-2 * a).exp()), lambda a: (1 - a, 2 * a, 2 * a), under.at
            ),
        ),
        "exact": (
            under,
            ours(exact_refresh, under.phase_score),
            lambda: plain_underdamped(under, exact, lambda a: (a, 1 - a**2, 2 * (1 - a)), under.at),
        ),
        "uha-em": (
            under,
            lambda: euler_walk(under.start, under.rho, bridged[1](), under.step, under.a, under.noise),
            lambda: plain_euler(under),
        ),
        "ldvi-em": (
            under,
            lambda: euler_walk(
                under.start, under.rho, bridged[1](), under.step, under.a, under.noise, under.phase_score
            ),
            lambda: plain_euler(under, under.at),
        ),
    }


WALKS = walks()


@pytest.mark.parametrize("name", WALKS)
def test_walk_and_its_adjoint_agree_with_a_plain_loop_under_autograd(name):
    case, ours, plain = WALKS[name]
    walk, (z, total, *momentum) = ours(), plain()
    torch.testing.assert_close(walk.z, z, atol=1e-12, rtol=0)
    torch.testing.assert_close(walk.log_ratio, total, atol=1e-10, rtol=0)
    torch.testing.assert_close(walk.target_gradient, target_gradient(z), atol=1e-12, rtol=0)
    value, expected = log_target(walk.z) + walk.log_ratio, log_target(z) + total
    if momentum:
        torch.testing.assert_close(walk.momentum, momentum[0], atol=1e-12, rtol=0)
        value = value + log_momentum_ratio(case.rho, walk.momentum)
        expected = expected + log_momentum_ratio(case.rho, momentum[0])
    for a, b in zip(case.gradients(value), case.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours().log_ratio, walk.log_ratio, atol=1e-12, rtol=0)


def numbers(value, count=K):
    return torch.full((count, 1, 1), value, dtype=torch.float64)


def test_ula_is_uha_without_memory():
    case, d = Case(True), 0.3
    ula = overdamped_walk(case.start, case.bridge(), numbers(d * d / 2), case.noise)
    uha = underdamped_walk(case.start, case.rho, case.bridge(), numbers(d), exact_refresh(numbers(0.0)), case.noise)
    ratio = uha.log_ratio + log_momentum_ratio(case.rho, uha.momentum)
    torch.testing.assert_close(ratio, ula.log_ratio, atol=1e-9, rtol=0)
    assert ula.log_ratio.abs().min() > 0.1


def test_mcd_is_ula_until_its_network_wakes_up():
    case = Case(True)
    ula = overdamped_walk(case.start, case.bridge(), case.step, case.noise)
    awake = overdamped_walk(case.start, case.bridge(), case.step, case.noise, case.position_score)
    case.network.factor.data.zero_()
    asleep = overdamped_walk(case.start, case.bridge(), case.step, case.noise, case.position_score)
    assert torch.equal(asleep.log_ratio, ula.log_ratio)
    assert (awake.log_ratio - ula.log_ratio).abs().min() > 1e-3


def test_mcd_is_the_underdamped_framework_without_memory():
    """Theorem 4.2: momenta N(0, I) forward, `N(c_k(z_k), I)` backward with `c_{k+1}(z) = -sqrt(e / 2) S_k(z)`."""
    case, d = Case(True), 0.25
    e = d * d / 2
    mcd = overdamped_walk(case.start, case.bridge(), numbers(e), case.noise, case.position_score)
    uha = underdamped_walk(case.start, case.rho, case.bridge(), numbers(d), exact_refresh(numbers(0.0)), case.noise)
    z, total, momentum, bridge = case.z, 0, case.rho, case.bridge()
    c = torch.zeros_like(z)  # c_1: any would do, its two terms cancel
    first = log_normal(momentum, c, torch.ones(()).double())
    for k, fresh in enumerate(case.noise):
        total = total + log_normal(momentum, c, torch.ones(()).double())
        total = total - log_normal(fresh, torch.zeros_like(z), torch.ones(()).double())
        half = fresh + d / 2 * bridge.gradient(k, z)
        z = z + d * half
        momentum = half + d / 2 * bridge.gradient(k, z)
        c = -math.sqrt(e / 2) * case.at(k, z)
    total = total + log_normal(momentum, c, torch.ones(()).double()) - first
    torch.testing.assert_close(z, uha.z, atol=1e-12, rtol=0)
    torch.testing.assert_close(total, mcd.log_ratio, atol=1e-9, rtol=0)


def test_uha_telescopes():
    """An exact refresh is reversible at N(0, I): only the leapfrog steps are left in the weight."""
    case, d, eta = Case(False), 0.2, 0.7
    walk = underdamped_walk(case.start, case.rho, case.bridge(), numbers(d), exact_refresh(numbers(eta)), case.noise)
    z, rho, bridge, total = case.z, case.rho, case.bridge(), 0
    for k, xi in enumerate(case.noise):
        fresh = eta * rho + math.sqrt(1 - eta**2) * xi
        half = fresh + d / 2 * bridge.gradient(k, z)
        z = z + d * half
        rho = half + d / 2 * bridge.gradient(k, z)
        total = total + log_momentum_ratio(fresh, rho)
    ratio = walk.log_ratio + log_momentum_ratio(case.rho, walk.momentum)
    torch.testing.assert_close(ratio, total, atol=1e-9, rtol=0)


def test_ldvi_without_a_score_nears_uha_as_the_damping_goes_to_zero():
    case, d = Case(False), 0.05
    gaps = []
    for a in (5e-2, 5e-3, 5e-5):
        shared = case.start, case.rho, case.bridge(), numbers(d)
        ldvi = underdamped_walk(*shared, euler_refresh(numbers(a)), case.noise)
        uha = underdamped_walk(*shared, exact_refresh(numbers(1 - a)), case.noise)
        ratios = [walk.log_ratio + log_momentum_ratio(case.rho, walk.momentum) for walk in (ldvi, uha)]
        gaps.append((ratios[0] - ratios[1]).abs().max().item())
    assert gaps[0] > 5 * gaps[1] > 200 * gaps[2]


def test_leapfrog_can_be_undone_and_preserves_volume():
    case, d = Case(False, transitions=1), torch.tensor(0.3, dtype=torch.float64)
    bridge = case.bridge()

    def leap(state):
        z, rho = state[:, :D], state[:, D:]
        half = rho + d / 2 * bridge.gradient(0, z)
        new = z + d * half
        return torch.cat([new, half + d / 2 * bridge.gradient(0, new)], 1)

    state = torch.cat([case.z, case.rho], 1).detach()
    end = leap(state)
    start = torch.cat(undo_leapfrog(end[:, :D], end[:, D:], bridge, 0, d), 1)
    torch.testing.assert_close(start, state, atol=1e-12, rtol=0)
    jacobian = torch.autograd.functional.jacobian(lambda row: leap(row[None])[0], state[0])
    torch.testing.assert_close(torch.linalg.det(jacobian), torch.ones(()).double(), atol=1e-12, rtol=0)
    still = underdamped_walk(case.start, case.rho, bridge, numbers(0.3, 1), exact_refresh(numbers(0.6, 1)), case.noise)
    refreshed = undo_leapfrog(still.z, still.momentum, bridge, 0, d)
    torch.testing.assert_close(refreshed[0], case.z, atol=1e-12, rtol=0)
    torch.testing.assert_close(refreshed[1], 0.6 * case.rho + 0.8 * case.noise[0], atol=1e-12, rtol=0)

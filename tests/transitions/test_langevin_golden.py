"""A Gaussian target and linear scores make log w a quadratic form in the noise, so that its moments are closed form.

`E log w` must have the values of the specification, and `E exp(log w)` must be Z: any wrong sign, factor or index in a
backward or forward kernel breaks one of the two.
"""

import math

import pytest
import torch

from hsivi_cli.bridges.geometric import DiagonalGaussian, geometric_bridge, schedule
from hsivi_cli.transitions.controlled import controlled_walk
from hsivi_cli.transitions.langevin import (
    euler_refresh,
    euler_walk,
    exact_refresh,
    log_momentum_ratio,
    mixed_refresh,
    overdamped_walk,
    underdamped_walk,
)

LOG_Z, MEAN, SCALE, K = 1.3, 1.0, 0.5, 4
CZ, CR, C0 = (
    torch.tensor(row, dtype=torch.float64)[:, None, None]
    for row in ((0.3, -0.2, 0.1, 0.05), (0.15, 0.1, -0.1, 0.2), (0.2, -0.1, 0.05, 0.1))
)


def log_target(z):
    return LOG_Z - 0.5 * ((z[:, 0] - MEAN) / SCALE) ** 2 - math.log(SCALE) - 0.5 * math.log(2 * math.pi)


def target_gradient(z):
    return (MEAN - z) / SCALE**2


def reference():
    return DiagonalGaussian(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def bridge(count=K):
    betas = schedule(torch.ones(min(count, 32) + 1, dtype=torch.float64), count)
    return geometric_bridge(reference(), target_gradient, betas)


def each(value, count=K):
    return torch.full((count, 1, 1), value, dtype=torch.float64)


def moments(log_weight, size):
    """Mean, sd and log E exp of a quadratic form in `size` standard normals, and the eigenvalues of `I - H`.

    `log_weight` maps (m, size) to (m,); its gradient is linear, so its differences are the Hessian.
    """
    point = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().requires_grad_(True)
    value = log_weight(point)
    gradients = torch.autograd.grad(value.sum(), point)[0]
    gradient, hessian, value = gradients[0], gradients[1:] - gradients[0], value[0].item()
    mean = value + 0.5 * hessian.trace().item()
    sd = math.sqrt((gradient @ gradient + 0.5 * (hessian @ hessian).trace()).item())
    rest = torch.eye(size, dtype=torch.float64) - hessian
    eigenvalues = torch.linalg.eigvalsh(rest)
    log_mean = value + 0.5 * (gradient @ torch.linalg.solve(rest, gradient)).item()
    return mean, sd, log_mean - 0.5 * eigenvalues.abs().log().sum().item(), eigenvalues


def weight(z_start, walk, first=None):
    log_weight = log_target(walk.z) - reference().log_prob(z_start) + walk.log_ratio
    return log_weight if first is None else log_weight + log_momentum_ratio(first, walk.momentum)


def rows(u, first):
    """Noise of the start (and the momentum), then of the transitions, from the columns of u (m, size)."""
    columns = u.T[:, :, None]
    return *columns[:first], columns[first:]


def overdamped(score=None, e=0.05, count=K):
    def log_weight(u):
        z, noise = rows(u, 1)
        return weight(z, overdamped_walk(z, bridge(count), each(e, count), noise, score))

    return log_weight, count + 1


def leapfrog(d, refresh, score=None, count=K):
    def log_weight(u):
        z, rho, noise = rows(u, 2)
        walk = underdamped_walk(z, rho, bridge(count), each(d, count), refresh(count), noise, score)
        return weight(z, walk, rho)

    return log_weight, count + 2


def euler(score=None, d=0.2, gamma=2.0):
    def log_weight(u):
        z, rho, noise = rows(u, 2)
        walk = euler_walk(z, rho, bridge(), each(d), each(gamma * d), noise, score)
        return weight(z, walk, rho)

    return log_weight, K + 2


class LinearControl:
    """`u_k(z) = slope_k z + shift_k`."""

    def __init__(self, slopes, shifts):
        self.slopes, self.shifts = (
            torch.tensor(row, dtype=torch.float64)[:, None, None].requires_grad_(True) for row in (slopes, shifts)
        )

    def __call__(self, z, first=0):
        rows = slice(first, first + len(z))
        return self.slopes[rows] * z + self.shifts[rows]

    def linearise(self, k, z):
        slope, shift = self.slopes[k].detach().numpy(), self.shifts[k].detach().numpy()
        return slope * z + shift, lambda rows: slope * rows

    def parameters(self):
        return self.slopes, self.shifts


def controlled(e=0.05, slopes=(0.4, -0.7, 0.2, 0.5, -0.3), shifts=(0.6, 0.1, -0.5, 0.3, 0.8)):
    def log_weight(u):
        z, noise = rows(u, 1)
        walk = controlled_walk(z, bridge(), each(e), noise, LinearControl(slopes, shifts))
        return weight(z, walk)

    return log_weight, K + 1


def plain():
    return lambda u: log_target(u) - reference().log_prob(u), 1


def uha(count):
    return exact_refresh(each(0.6, count))


def ldvi(count):
    return euler_refresh(each(0.4, count))


def position_score(z):
    return CZ * z + C0


def phase_score(z, rho):
    return CZ * z + CR * rho + C0


GOLDEN = {
    "vi": (plain(), -1.5068528194, None),
    "ula": (overdamped(), -0.6426959821, 3.368763),
    "mcd": (overdamped(position_score), -0.6580948169, 3.371222),
    "uha": (leapfrog(0.4, uha), 0.1710587458, 2.180481),
    "ldvi without a score": (leapfrog(0.2, ldvi), -0.8759734647, 3.667737),
    "ldvi": (leapfrog(0.2, ldvi, phase_score), -0.9427636292, 3.632507),
    "uha-em": (euler(), -0.6538321969, 3.272518),
    "ldvi-em": (euler(phase_score), -0.6227387587, 3.095668),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_moments_and_unbiased_weight(name):
    form, golden_mean, golden_sd = GOLDEN[name]
    mean, sd, log_mean, eigenvalues = moments(*form)
    assert mean == pytest.approx(golden_mean, abs=1e-9)
    assert golden_sd is None or sd == pytest.approx(golden_sd, abs=1e-6)
    assert eigenvalues.min() > 0
    assert log_mean == pytest.approx(LOG_Z, abs=1e-12)


OTHERS = {
    "mixed refresh": leapfrog(0.2, lambda n: mixed_refresh(each(0.4, n)), phase_score),
    "exact refresh with a score": leapfrog(0.4, uha, phase_score),
    "cmcd": controlled(),
    "cmcd, large steps and controls": controlled(0.2, slopes=(1.5, -1.0, 0.5, 0.8, -1.2)),
    "ldvi, a different step each": leapfrog(
        0.2, lambda n: euler_refresh(torch.linspace(0.1, 0.7, n).double()[:, None, None])
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_walks_are_unbiased_too(name):
    _, _, log_mean, eigenvalues = moments(*OTHERS[name])
    assert eigenvalues.min() > 0
    assert log_mean == pytest.approx(LOG_Z, abs=1e-12)


def test_a_bound_is_below_the_evidence_whatever_the_score():
    for form in (*(row[0] for row in GOLDEN.values()), *OTHERS.values()):
        assert moments(*form)[0] < LOG_Z


def broken_ldvi(break_weight=lambda log_weight, walk: log_weight, score=None):
    """The LDVI row of the golden table with its weight, or the states its score is given, broken."""
    d, a = each(0.2), each(0.4)

    def log_weight(u):
        z, rho, noise = rows(u, 2)
        see = phase_score if score is None else lambda at, fresh: score(at, fresh, noise)
        walk = underdamped_walk(z, rho, bridge(), d, euler_refresh(a), noise, see)
        return break_weight(weight(z, walk, rho), walk)

    return log_weight, K + 2


def test_broken_weights_are_noticed():
    """Negative controls with the values of the specification: the checks above do fail when they should."""
    last = broken_ldvi(lambda w, walk: w + 0.5 * walk.momentum.square().sum(1) + 0.5 * math.log(2 * math.pi))
    _, _, log_mean, eigenvalues = moments(*last)  # no final momentum term: the mean does not even exist, so that
    assert eigenvalues.min() < 1e-12  # the specification's 21.996 is the logarithm of a rounding error
    assert log_mean > LOG_Z + 10

    stale = broken_ldvi(score=lambda z, rho, noise: phase_score(z, (rho - math.sqrt(0.8) * noise) / 0.6))
    assert moments(*stale)[2] == pytest.approx(1.6086, abs=1e-4)  # rho before the refresh fed to the score

    swapped = broken_ldvi(lambda w, walk: w - 2 * walk.log_ratio)
    assert moments(*swapped)[3].min() < 0  # E exp(log w) does not exist

    def later(z, rho, noise):
        gradient = torch.stack([bridge().gradient(k, at) for k, at in enumerate(z)])
        return phase_score(z + 0.2 * (rho + 0.1 * gradient), rho)

    mean, _, log_mean, _ = moments(*broken_ldvi(score=later))
    assert log_mean == pytest.approx(LOG_Z, abs=1e-12)  # another valid backward kernel: only the golden mean tells
    assert mean == pytest.approx(-0.9460, abs=1e-4)


GAPS = {
    "uha": (lambda n: leapfrog(0.4, uha, count=n), (1.12894, 0.66494, 0.37527, 0.20313)),
    "ula": (lambda n: overdamped(count=n), (1.94270, 1.51267, 1.06132, 0.68428)),
    "ldvi": (lambda n: leapfrog(0.2, ldvi, count=n), (2.17597, 1.48800, 0.86233, 0.51648)),
}


@pytest.mark.parametrize("name", GAPS)
def test_gap_closes_as_bridges_are_added(name):
    form, golden = GAPS[name]
    gaps = [LOG_Z - moments(*form(4 * 2**i))[0] for i in range(len(golden))]
    assert gaps == pytest.approx(list(golden), abs=2e-5)

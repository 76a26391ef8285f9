"""Brownian motion with unknown scales and a missing middle (Sountsov et al. 2020, Inference Gym).

`a_inn, a_obs ~ LogNormal(0, 2)`, `x_1 ~ N(0, a_inn)`, `x_t ~ N(x_{t-1}, a_inn)`, `y_t ~ N(x_t, a_obs)` for t = 1..10
and 21..30. Unconstrained order: u_inn, u_obs, x_1..x_30 with `a = softplus(u)`. Given the scales the path is Gaussian,
so a Kalman filter on a grid of scales gives the evidence and exact draws.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from hsivi_cli.targets.density import Batch, Density, Predictive
from hsivi_cli.targets.examples.common import LOG_2PI, normal_log_density, rand, randn, softplus_inverse

TIMES = 30
SEEN = torch.tensor([*range(10), *range(20, 30)])
# fmt: off
OBSERVED = torch.tensor([
    0.21592641, 0.118771404, -0.07945447, 0.037677474, -0.27885845, -0.1484156, -0.3250906, -0.22957903, -0.44110894,
    -0.09830782, -0.8786016, -0.83736074, -0.7384849, -0.8939254, -0.7774566, -0.70238715, -0.87771565, -0.51853573,
    -0.6948214, -0.6202789,
], dtype=torch.float64)
# fmt: on
LOG_SCALE_SD = 2.0
LOG_Z = 1.187749


def example() -> Density:
    """The published observations; its log evidence is known exactly."""
    return brownian_density(OBSERVED, LOG_Z)


def brownian_density(y: Float[Tensor, " 20"], log_z: float | None = None) -> Density:
    """The model given 20 observations `y` at the times SEEN."""

    def split(z: Batch) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"], Float[Tensor, "n 30"]]:
        scale = softplus(z[:, :2], threshold=40)
        return scale[:, :1], scale[:, 1:], z[:, 2:]

    def constrain(z: Batch) -> dict[str, Tensor]:
        inner, outer, x = split(z)
        return {"a_inn": inner[:, 0], "a_obs": outer[:, 0], "x": x}

    def log_likelihood(z: Batch) -> Float[Tensor, "n 20"]:
        _, outer, x = split(z)
        return normal_log_density(y, x[:, SEEN], outer)

    def log_prob(z: Batch) -> Float[Tensor, " n"]:
        inner, outer, x = split(z)
        log_scale = torch.log(torch.cat([inner, outer], 1))
        # log-normal density of the scale, and the Jacobian of softplus
        scales = normal_log_density(log_scale, 0.0, LOG_SCALE_SD) - log_scale + logsigmoid(z[:, :2])
        return scales.sum(1) + normal_log_density(_moves(x), 0.0, inner).sum(1) + log_likelihood(z).sum(1)

    def gradient(z: Batch) -> Batch:
        inner, outer, x = split(z)
        moves, misses = _moves(x), y - x[:, SEEN]
        pull = -moves / inner**2
        by_x = pull - torch.cat([pull[:, 1:], torch.zeros_like(inner)], 1)
        by_x = by_x.index_add(1, SEEN, misses / outer**2)
        squares = torch.cat([moves.square().sum(1, keepdim=True), misses.square().sum(1, keepdim=True)], 1)
        counts = torch.tensor([TIMES, len(y)], dtype=z.dtype)
        scale = torch.cat([inner, outer], 1)
        by_scale = (squares / scale**2 - counts - 1 - torch.log(scale) / LOG_SCALE_SD**2) / scale
        return torch.cat([by_scale * torch.sigmoid(z[:, :2]) + torch.sigmoid(-z[:, :2]), by_x], 1)

    def simulate(z: Batch, generator: torch.Generator) -> Float[Tensor, "n 20"]:
        _, outer, x = split(z)
        return x[:, SEEN] + outer * randn(len(z), len(y), generator=generator)

    return Density(
        "brownian",
        TIMES + 2,
        log_prob,
        constrain,
        gradient,
        Predictive(y, simulate, log_likelihood, _prior, brownian_density),
        ("prior: a_inn, a_obs ~ lognormal(0, 2); x is a random walk with steps of sd a_inn",),
        log_z,
        _exact_sampler(y),
    )


def _moves(x: Float[Tensor, "n 30"]) -> Float[Tensor, "n 30"]:
    return torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)


def _prior(n: int, generator: torch.Generator) -> Batch:
    scale = torch.exp(LOG_SCALE_SD * randn(n, 2, generator=generator))
    x = torch.cumsum(scale[:, :1] * randn(n, TIMES, generator=generator), 1)
    return torch.cat([softplus_inverse(scale), x], 1)


def _filter(
    y: Float[Tensor, " 20"], inner: Float[Tensor, " m"], outer: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " m"], list[Float[Tensor, " m"]], list[Float[Tensor, " m"]]]:
    """Kalman filter for `m` pairs of scales: log likelihood, filtered means and variances at the 30 times."""
    seen = {int(t): value for t, value in zip(SEEN, y, strict=True)}
    log_likelihood = torch.zeros_like(inner)
    mean, variance = torch.zeros_like(inner), torch.zeros_like(inner)
    means, variances = [], []
    for time in range(TIMES):
        variance = variance + inner**2
        if time in seen:
            total = variance + outer**2
            miss = seen[time] - mean
            log_likelihood = log_likelihood - 0.5 * (miss**2 / total + torch.log(total) + LOG_2PI)
            mean, variance = mean + variance / total * miss, variance * outer**2 / total
        means.append(mean)
        variances.append(variance)
    return log_likelihood, means, variances


def scales_posterior(
    y: Float[Tensor, " 20"], points: int = 601, low: float = -12.0, high: float = 4.0
) -> tuple[Float[Tensor, " points"], Float[Tensor, "points points"]]:
    """A grid of log scales and the log joint of (log a_inn, log a_obs) and `y` on it, the path integrated out."""
    axis = torch.linspace(low, high, points, dtype=torch.float64)
    inner, outer = torch.meshgrid(axis, axis, indexing="ij")
    log_likelihood, _, _ = _filter(y, torch.exp(inner).reshape(-1), torch.exp(outer).reshape(-1))
    prior = normal_log_density(inner, 0.0, LOG_SCALE_SD) + normal_log_density(outer, 0.0, LOG_SCALE_SD)
    return axis, log_likelihood.reshape(points, points) + prior


def log_evidence(y: Float[Tensor, " 20"]) -> float:
    """Log evidence by the trapezium rule over both log scales, spectrally accurate."""
    axis, log_joint = scales_posterior(y)
    return float(torch.logsumexp(log_joint.reshape(-1), 0)) + 2 * math.log(float(axis[1] - axis[0]))


def _exact_sampler(y: Float[Tensor, " 20"]) -> Callable[[int, torch.Generator], Batch]:
    def draw(n: int, generator: torch.Generator) -> Batch:
        axis, log_joint = scales_posterior(y)
        step, points = float(axis[1] - axis[0]), len(axis)
        cell = torch.multinomial(torch.softmax(log_joint.reshape(-1), 0), n, replacement=True, generator=generator)
        index = torch.stack([cell // points, cell % points], 1)
        # hat functions on the grid: the density's bilinear interpolation
        scale = torch.exp(axis[index] + step * (rand(n, 2, generator=generator) - rand(n, 2, generator=generator)))
        _, means, variances = _filter(y, scale[:, 0], scale[:, 1])
        path = [means[-1] + variances[-1].sqrt() * randn(n, generator=generator)]
        for mean, variance in zip(means[-2::-1], variances[-2::-1], strict=True):
            gain = variance / (variance + scale[:, 0] ** 2)
            noise = randn(n, generator=generator)
            path.append(mean + gain * (path[-1] - mean) + (gain * scale[:, 0] ** 2).sqrt() * noise)
        return torch.cat([softplus_inverse(scale), torch.stack(path[::-1], 1)], 1)

    return draw

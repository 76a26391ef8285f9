"""Shapes in two dimensions whose densities are normalised (log Z = 0) and whose exact draws are known.

Banana, multimodal and x-shaped are those of SIVI via score matching and KSIVI (Yu & Zhang 2023; Cheng et al. 2024).
Checkerboard, rings and swissroll usually come as samples without a density; the densities here are our own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from hsivi_cli.targets.density import Batch, Density
from hsivi_cli.targets.examples.common import LOG_2PI, rand, randn

BANANA_CORRELATION = 0.9
CROSS_VARIANCE, CROSS_COVARIANCE = 2.0, 1.8
MODES = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
# lower left corners of the eight squares of side 2 on [-4, 4]^2; an edge is a logistic step of this scale
CORNERS = torch.tensor([[x, y] for x in (-4, -2, 0, 2) for y in (-4, -2, 0, 2) if (x + y) % 4 == 0]).double()
SIDE, EDGE = 2.0, 0.05
RADII = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
RING_SD = 0.15
SPIRAL_SD = 0.15
SPIRAL_ANGLES = 1.5 * math.pi + 3 * math.pi * (torch.arange(200, dtype=torch.float64) + 0.5) / 200
SPIRAL = 0.28 * torch.stack([SPIRAL_ANGLES * torch.cos(SPIRAL_ANGLES), SPIRAL_ANGLES * torch.sin(SPIRAL_ANGLES)], 1)


@dataclass(frozen=True)
class _Toy:
    log_prob: Callable[[Batch], Float[Tensor, " n"]]
    draw: Callable[[int, torch.Generator], Batch]
    fact: str


def toy_density(name: str) -> Density:
    """The toy called `name`, one of TOYS."""
    toy = TOYS[name]
    return Density(name, 2, toy.log_prob, lambda x: {"x": x}, facts=(toy.fact,), log_z=0.0, exact_draws=toy.draw)


def _correlated_log_density(x: Float[Tensor, "n 2"], variance: float, covariance: float) -> Float[Tensor, " n"]:
    """Centred Gaussian with equal variances."""
    determinant = variance**2 - covariance**2
    square = variance * x.square().sum(1) - 2 * covariance * x[:, 0] * x[:, 1]
    return -0.5 * square / determinant - LOG_2PI - 0.5 * math.log(determinant)


def _correlated(
    n: int, variance: float, covariance: float | Float[Tensor, " n"], draws: torch.Generator
) -> Float[Tensor, "n 2"]:
    e = randn(n, 2, generator=draws)
    slope = torch.as_tensor(covariance / variance, dtype=torch.float64)
    first = math.sqrt(variance) * e[:, 0]
    return torch.stack([first, slope * first + torch.sqrt(variance * (1 - slope**2)) * e[:, 1]], 1)


def _banana_log_prob(x: Batch) -> Float[Tensor, " n"]:
    """(x_1, x_1^2 + x_2 + 1) is Gaussian; the map's Jacobian is 1."""
    straight = torch.stack([x[:, 0], x[:, 0] ** 2 + x[:, 1] + 1], 1)
    return _correlated_log_density(straight, 1.0, BANANA_CORRELATION)


def _banana_draw(n: int, generator: torch.Generator) -> Batch:
    v = _correlated(n, 1.0, BANANA_CORRELATION, generator)
    return torch.stack([v[:, 0], v[:, 1] - v[:, 0] ** 2 - 1], 1)


def _equal_gaussians_log_prob(x: Batch, centres: Float[Tensor, "k 2"], sd: float) -> Float[Tensor, " n"]:
    # |x - c|^2 multiplied out: one matrix product instead of an (n, k, 2) array
    square = x.square().sum(1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(1)
    return torch.logsumexp(-0.5 * square / sd**2, 1) - LOG_2PI - math.log(sd**2 * len(centres))


def _equal_gaussians_draw(n: int, generator: torch.Generator, centres: Float[Tensor, "k 2"], sd: float) -> Batch:
    which = torch.randint(len(centres), (n,), generator=generator)
    return centres[which] + sd * randn(n, 2, generator=generator)


def _cross_log_prob(x: Batch) -> Float[Tensor, " n"]:
    rising = _correlated_log_density(x, CROSS_VARIANCE, CROSS_COVARIANCE)
    falling = _correlated_log_density(x, CROSS_VARIANCE, -CROSS_COVARIANCE)
    return torch.logaddexp(rising, falling) - math.log(2)


def _cross_draw(n: int, generator: torch.Generator) -> Batch:
    sign = 2.0 * torch.randint(2, (n,), generator=generator).double() - 1
    return _correlated(n, CROSS_VARIANCE, CROSS_COVARIANCE * sign, generator)


def _checkerboard_log_prob(x: Batch) -> Float[Tensor, " n"]:
    """Uniform on the squares plus logistic noise: along each axis `[sigmoid(u) - sigmoid(v)] / side`, where u and v are
    the distances from the two edges; and `sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - e^(v - u))`."""
    u = (x[:, None, :] - CORNERS) / EDGE
    v = u - SIDE / EDGE
    squares = (logsigmoid(u) + logsigmoid(-v)).sum(2)
    normaliser = 2 * (math.log1p(-math.exp(-SIDE / EDGE)) - math.log(SIDE)) - math.log(len(CORNERS))
    return torch.logsumexp(squares, 1) + normaliser


def _checkerboard_draw(n: int, generator: torch.Generator) -> Batch:
    which = torch.randint(len(CORNERS), (n,), generator=generator)
    noise = torch.logit(rand(n, 2, generator=generator), eps=1e-16)
    return CORNERS[which] + SIDE * rand(n, 2, generator=generator) + EDGE * noise


def _ring_masses() -> Float[Tensor, " k"]:
    """`integral of 2 pi r exp(-(r - R)^2 / 2 s^2) dr` over r > 0, for each ring."""
    ratio = RADII / RING_SD
    gauss = RING_SD * math.sqrt(2 * math.pi) * torch.special.ndtr(ratio)
    return 2 * math.pi * (RING_SD**2 * torch.exp(-0.5 * ratio**2) + RADII * gauss)


def _rings_log_prob(x: Batch) -> Float[Tensor, " n"]:
    """Proportional to `sum_k exp(-(|x| - R_k)^2 / 2 s^2)`: each ring's mass is near its circumference."""
    # the tiny number keeps the gradient finite at the origin, where the density is e^-22 of its height
    radius = torch.sqrt(x.square().sum(1, keepdim=True) + 1e-24)
    return torch.logsumexp(-0.5 * ((radius - RADII) / RING_SD) ** 2, 1) - torch.log(_ring_masses().sum())


def _rings_draw(n: int, generator: torch.Generator) -> Batch:
    """The radius has density proportional to `r exp(-(r - R)^2 / 2 s^2)`: normal draws, thinned by r / (R + 8 s)."""
    ring = torch.multinomial(_ring_masses(), n, replacement=True, generator=generator)
    radius = torch.full((n,), -1.0, dtype=torch.float64)
    while bool((missing := radius < 0).any()):
        centre = RADII[ring[missing]]
        proposal = centre + RING_SD * randn(len(centre), generator=generator)
        kept = rand(len(centre), generator=generator) * (centre + 8 * RING_SD) < proposal
        radius[missing] = torch.where(kept, proposal, radius[missing])
    angle = 2 * math.pi * rand(n, generator=generator)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1)


TOYS: dict[str, _Toy] = {
    "banana": _Toy(
        _banana_log_prob, _banana_draw, "(x1, x1^2 + x2 + 1) is Gaussian with unit variances and correlation 0.9"
    ),
    "multimodal": _Toy(
        lambda x: _equal_gaussians_log_prob(x, MODES, 1.0),
        lambda n, generator: _equal_gaussians_draw(n, generator, MODES, 1.0),
        "equal parts of normal((-2, 0), I) and normal((2, 0), I)",
    ),
    "x-shaped": _Toy(
        _cross_log_prob, _cross_draw, "equal parts of two centred Gaussians, variances 2, covariances 1.8 and -1.8"
    ),
    "checkerboard": _Toy(
        _checkerboard_log_prob, _checkerboard_draw, "uniform on 8 squares of side 2, plus logistic noise of scale 0.05"
    ),
    "rings": _Toy(_rings_log_prob, _rings_draw, "rings of radius 1, 2.5 and 4, each a ridge of sd 0.15"),
    "swissroll": _Toy(
        lambda x: _equal_gaussians_log_prob(x, SPIRAL, SPIRAL_SD),
        lambda n, generator: _equal_gaussians_draw(n, generator, SPIRAL, SPIRAL_SD),
        "200 equal Gaussians of sd 0.15 at 0.28 t (cos t, sin t), t from 1.5 pi to 4.5 pi",
    ),
}

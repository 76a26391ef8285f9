"""The best full-rank Gaussian in hundreds of dimensions, by Newton steps on its natural parameters.

At the maximum of the ELBO the precision is `-E H` and `E g = 0`, expectations under the Gaussian itself (Opper and
Archambeau 2009, eqs 10-11); the step `P <- (1 - rho) P - rho E H`, `m <- m + rho P^-1 E g` is a natural gradient's
(variational online Newton, Khan and Rue 2023, arXiv 2107.04562). Where a mode is a poor guide, as in hierarchical
models, this still ends where the mass is, and it takes a dozen Hessians where a sample average of the ELBO takes
thousands of gradients to see a factor of d (d + 1) / 2 entries.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.methods.laplace import gaussian_at, hessian_at
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.whiten import Affine

ITERATIONS = 40
HALVINGS = 8
PAIRS, HESSIANS = 4, 2000  # mirrored pairs of Hessians a step, fewer where dimensions times pairs exceed the second


@dataclass(frozen=True)
class _Point:
    """A Gaussian, its ELBO on the fixed draws up to a constant, and the mean gradient there."""

    location: Float[Tensor, " d"]
    scale: Float[Tensor, "d d"]
    precision: Float[Tensor, "d d"]
    elbo: float
    slope: Float[Tensor, " d"]


def variational_newton(density: Density, starts: list[Affine], u: Float[Tensor, "n d"], seed: int = 0) -> Affine:
    """Maximise the ELBO on the fixed draws `u`, from the start whose ELBO is the highest; it never falls below that.

    Stops where a step gains next to nothing, for lack of improvement, or after `ITERATIONS`.
    """
    at = max((_at_start(density, start, u) for start in starts), key=lambda point: point.elbo)
    generator = torch.Generator().manual_seed(seed)
    pairs = max(1, min(PAIRS, HESSIANS // density.dim))
    rho = 0.5
    for _ in range(ITERATIONS):
        half = torch.randn(pairs, density.dim, generator=generator, dtype=torch.float64)
        hessian = _mean_hessian(density, at, torch.cat([half, -half]))
        if not bool(hessian.isfinite().all()):
            break
        rho = min(1.0, 2 * rho)
        moved = _step(density, at, hessian, rho, u)
        for _ in range(HALVINGS):
            if moved.elbo > at.elbo:
                break
            rho /= 2
            moved = _step(density, at, hessian, rho, u)
        if not moved.elbo > at.elbo:
            break
        gain, at = moved.elbo - at.elbo, moved
        if rho == 1.0 and gain < 1e-3 * density.dim:
            break
    return Affine(at.location, at.scale)


def _at_start(density: Density, start: Affine, u: Tensor) -> _Point:
    scale = start.scale.diag() if start.scale.ndim == 1 else start.scale
    for _ in range(HALVINGS):  # too wide for the target: narrower until every draw is inside
        if math.isfinite(_elbo(density, start.location, scale, u)[0]):
            break
        scale = scale / 2
    inverse = torch.linalg.solve_triangular(scale, torch.eye(len(scale), dtype=scale.dtype), upper=False)
    return _Point(start.location, scale, inverse.T @ inverse, *_elbo(density, start.location, scale, u))


def _step(density: Density, at: _Point, hessian: Tensor, rho: float, u: Tensor) -> _Point:
    precision, scale = gaussian_at(rho * hessian - (1 - rho) * at.precision)
    location = at.location + rho * (scale @ (scale.T @ at.slope))
    return _Point(location, scale, precision, *_elbo(density, location, scale, u))


def _elbo(density: Density, location: Tensor, scale: Tensor, u: Tensor) -> tuple[float, Tensor]:
    heights, gradient = density.value_and_gradient(location + u @ scale.T)
    value = float(heights.mean() + scale.diagonal().log().sum())
    slope = gradient.mean(0)
    return (value if math.isfinite(value) and bool(slope.isfinite().all()) else -math.inf), slope


def _mean_hessian(density: Density, at: _Point, u: Tensor) -> Tensor:
    total = torch.zeros_like(at.precision)
    for z in at.location + u @ at.scale.T:
        total += hessian_at(density, z)
    return total / len(u)

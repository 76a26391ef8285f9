"""Where a fit starts: the Gaussian of the mode, or one that spans all modes that a search has found."""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from hsivi_cli.methods.gaussian_vi import GaussianFit, fit_gaussian
from hsivi_cli.methods.laplace import Mode, climb_all, find_mode, gaussian_at, hessian_at, require_proper
from hsivi_cli.targets.density import Density

SEARCHED = 30  # dimensions up to which wide climbs pay: beyond, no random start is near another mode
FAR = (5.0, 20.0)  # standard deviations of the mode from which wide climbs start
ALONG = (4.0, 8.0, 12.0)  # standard deviations along each principal axis, in few dimensions
AXES_SEARCHED = 5
PAIRS = 3  # at each of these distances
NEGLIGIBLE = math.log(1e-4)  # of the highest mode's mass


def find_start(density: Density, seed: int) -> tuple[GaussianFit, int]:
    """The Gaussian whose coordinates a method works in, and the number of modes it spans.

    Raises InputError for an improper posterior.
    """
    searched = density.dim <= SEARCHED and density.responses <= 100_000
    mode = find_mode(density, random_starts=8 if searched else 3, seed=seed)
    require_proper(mode, density)
    if mode.kind != "mode":
        return fit_gaussian(density, "full-rank", mode, seed), 1
    points = [mode.location, *mode.others]
    if searched:
        points += _wide_climbs(density, mode, seed)
    bumps = _bumps(density, mode, points)
    if len(bumps) > 1:
        return _spanning(bumps), len(bumps)
    return fit_gaussian(density, "full-rank", mode, seed), 1


def raw_start(dim: int) -> GaussianFit:
    """N(0, I): the coordinates as they are."""
    zero, one = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    return GaussianFit(zero, one, math.nan, math.nan, "full-rank")


def _wide_climbs(density: Density, mode: Mode, seed: int) -> list[Float64[Tensor, " d"]]:
    """Summits above points far around the mode: mirrored pairs in random directions, and along the principal axes."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.cat([far * torch.randn(PAIRS, density.dim, generator=generator, dtype=torch.float64) for far in FAR])
    if density.dim <= AXES_SEARCHED:
        u = torch.cat([u, *(far * torch.eye(density.dim, dtype=torch.float64) for far in ALONG)])
        rotation = torch.linalg.svd(mode.scale_tril).Vh  # rows: the principal axes in the coordinates of u
        u[-len(ALONG) * density.dim :] = u[-len(ALONG) * density.dim :] @ rotation
    starts = mode.location + torch.cat([u, -u]) @ mode.scale_tril.T
    starts = starts[density.log_prob(starts).isfinite()]
    if not len(starts):
        return []
    summits = climb_all(density, starts)
    return [summit.z for summit in summits if summit.converged and bool(summit.z.isfinite().all())]


def _bumps(
    density: Density, mode: Mode, points: list[Float64[Tensor, " d"]]
) -> list[tuple[float, Float64[Tensor, " d"], Float64[Tensor, "d d"]]]:
    """Laplace's log mass, location and factor of every distinct maximum with some mass, the first given first."""
    found: list[tuple[float, Tensor, Tensor]] = []
    for z in points:
        apart = [
            torch.linalg.solve_triangular(factor, (z - at)[:, None], upper=False).norm() for _, at, factor in found
        ]
        if any(float(distance) < 1.0 for distance in apart):
            continue
        hessian = hessian_at(density, z)
        if found and not float(torch.linalg.eigvalsh(hessian).max()) < 0:
            continue  # a climb from a point of symmetry may end on a saddle
        factor = mode.scale_tril if not found else gaussian_at(hessian)[1]
        mass = float(density.log_prob(z[None])) + float(factor.diagonal().log().sum())
        found.append((mass, z, factor))
    most = max(mass for mass, _, _ in found)
    return [bump for bump in found if bump[0] > most + NEGLIGIBLE]


def _spanning(bumps: list[tuple[float, Float64[Tensor, " d"], Float64[Tensor, "d d"]]]) -> GaussianFit:
    """The Gaussian with the moments of the mixture of all bumps, equally weighted: none must be missed."""
    points = torch.stack([z for _, z, _ in bumps])
    centred = points - points.mean(0)
    within = torch.stack([factor @ factor.T for _, _, factor in bumps]).mean(0)
    covariance = within + centred.T @ centred / len(bumps)
    return GaussianFit(points.mean(0), torch.linalg.cholesky(covariance), math.nan, math.nan, "full-rank")

"""The mode of a density and the Gaussian there (Laplace's approximation), and whether there is one at all."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.methods.ascent import ascend
from hsivi_cli.targets.density import Density

Kind = Literal["mode", "unbounded", "improper"]

LARGE = 1e8  # responses times dimensions above which one start has to do
LARGE_HESSIAN = 2e8  # the same for responses times squared dimensions
SANE = 1e18  # ratio of the coordinates' scales at a mode that makes sense in float64
FLOOR = 1e-10  # least curvature kept, relative to the largest, in coordinates of unit curvature
RUNAWAY = 1e15  # a log density above which a climb is given up
DISTANCES = (1e2, 1e4, 1e7)  # standard deviations; a proper density falls between two of these


@dataclass(frozen=True)
class Mode:
    """The highest point found: `location` (d,), and the Gaussian there, `scale_tril` (d, d) with `scale_tril
    scale_tril^T` the inverse of `precision`, minus the Hessian made positive definite.

    `kind` is "mode" (a proper local maximum), "unbounded" (the density keeps rising: no mode, it may still be
    integrable) or "improper" (it stays level for ever in some direction, which `message` describes). `others` are
    further local maxima, (m, d), the highest first, and `others_log_prob` their heights.
    """

    location: Float[Tensor, " d"]
    log_prob: float
    precision: Float[Tensor, "d d"]
    scale_tril: Float[Tensor, "d d"]
    converged: bool
    kind: Kind
    message: str
    others: Float[Tensor, "m d"]
    others_log_prob: Float[Tensor, " m"]

    @property
    def log_z(self) -> float:
        """Laplace's log evidence, `log_prob + d/2 log 2 pi - 1/2 log det precision`."""
        dim = len(self.location)
        return self.log_prob + 0.5 * dim * math.log(2 * math.pi) + float(self.scale_tril.diagonal().log().sum())


@dataclass(frozen=True)
class Summit:
    """Where one climb ended."""

    z: Tensor
    log_prob: float
    hessian: Tensor
    converged: bool


def find_mode(
    density: Density, start: Float[Tensor, " d"] | None = None, random_starts: int = 3, seed: int = 0
) -> Mode:
    """Climb by L-BFGS, then by damped Newton steps, from `start` or `density.initial`, from 0 and from random points.

    Every start is climbed; the highest summit is the mode. Raises InputError if the density is finite at no start.
    """
    z, converged, hessian, log_prob = _best_summits(density, start, random_starts, seed)
    precision, scale_tril = gaussian_at(hessian[0])
    kind, message = _judge(density, z[0], log_prob[0], precision, converged[0])
    others = [i for i in range(1, len(z)) if converged[i] and _distinct(z[i], z[:i], scale_tril)]
    return Mode(
        location=z[0],
        log_prob=log_prob[0],
        precision=precision,
        scale_tril=scale_tril,
        converged=converged[0] and kind == "mode",
        kind=kind,
        message=message,
        others=torch.stack([z[i] for i in others]) if others else z[0].new_zeros(0, density.dim),
        others_log_prob=torch.tensor([log_prob[i] for i in others], dtype=torch.float64),
    )


def require_proper(mode: Mode, density: Density) -> None:
    """Raise InputError with the reason if `find_mode` found the posterior improper."""
    if mode.kind == "improper":
        raise InputError(
            f"the posterior of {density.name} is improper: {mode.message}; give proper priors, or remove the cause "
            "(collinear columns, a response separated perfectly, more coefficients than rows)"
        )


def hessian_at(density: Density, z: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
    """Hessian of the log density at one point: `linearise` of all unit vectors, or the gradient differentiated.

    Where autograd fails or is not finite, central differences of the gradient.
    """
    dim = density.dim
    rows = min(dim, max(1, 20_000_000 // (density.responses + dim)))
    eye = torch.eye(dim, dtype=torch.float64)
    if density.linearise is not None:
        with np.errstate(all="ignore"):
            product = density.linearise(z.detach()[None].numpy())[1]
            hessian = torch.from_numpy(np.concatenate([product(part.numpy()) for part in eye.split(rows)]))
        return (hessian + hessian.T) / 2
    pieces = []
    for first in range(0, dim, rows):
        point = z.expand(min(rows, dim - first), dim).clone().requires_grad_(True)
        with torch.enable_grad():
            gradient = density.gradient(point)
            if not gradient.requires_grad:
                break
            (piece,) = torch.autograd.grad(gradient, point, eye[first : first + rows], allow_unused=True)
        if piece is None:
            break
        pieces.append(piece)
    if pieces and bool(torch.cat(pieces).isfinite().all()):
        hessian = torch.cat(pieces)
        return (hessian + hessian.T) / 2
    width = 6e-6 * z.abs().clamp_min(1.0)
    with torch.no_grad():
        up, down = density.gradient(z + width.diag()), density.gradient(z - width.diag())
    hessian = (up - down) / (2 * width[:, None])
    return (hessian + hessian.T) / 2


def gaussian_at(hessian: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """Precision and lower-triangular factor of the covariance of the Gaussian with this Hessian of its log density.

    Directions of wrong or no curvature get the absolute value of theirs, at least `FLOOR` of the largest; done in
    coordinates of unit curvature, so that units do not matter.
    """
    scale, values, vectors = _scaled_eigen(hessian)
    root = vectors * values.sqrt()  # of the scaled precision
    precision = (root @ root.T) / (scale[:, None] * scale)
    # a lower-triangular factor of the inverse: QR of the inverse root, whose rows are then rotated
    inverse_root = (vectors / values.sqrt()) * scale[:, None]
    upper = torch.linalg.qr(inverse_root.T, mode="r").R
    return precision, (upper * upper.diagonal().sign()[:, None]).T


def _scaled_eigen(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Units (d,) of each coordinate, and eigenvalues, made positive, and vectors of minus the Hessian in them."""
    curvature = hessian.diagonal().abs()
    largest = curvature.max()
    scale = torch.where(curvature > 1e-30 * largest, curvature, torch.ones_like(curvature)).rsqrt()
    if not bool(largest > 0):
        scale = torch.ones_like(curvature)
    values, vectors = torch.linalg.eigh(-hessian * scale[:, None] * scale)
    values = values.abs()
    return scale, values.clamp_min(FLOOR * float(values.max())).clamp_min(1e-300), vectors


def _best_summits(
    density: Density, start: Tensor | None, random_starts: int, seed: int
) -> tuple[list[Tensor], list[bool], list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    first = density.initial if start is None else start
    zero = torch.zeros(density.dim, dtype=torch.float64)
    points = [zero] if first is None or not bool(first.any()) else [first.detach().double(), zero]
    noise = torch.randn(random_starts, density.dim, generator=generator, dtype=torch.float64)
    points += list(2 * noise + points[0])
    if density.responses * density.dim > LARGE or density.responses * density.dim**2 > LARGE_HESSIAN:
        points = points[:1]
    finite = [point for point in points if bool(density.log_prob(point[None]).isfinite().all())]
    if not finite:
        raise InputError(f"the log density of {density.name} is finite at none of {len(points)} starting points")
    summits = climb_all(density, torch.stack(finite))
    # a climb that has not converged may have run away to any height, so it counts only where none has
    summits.sort(key=lambda summit: (summit.converged, summit.log_prob), reverse=True)
    return (
        [summit.z for summit in summits],
        [summit.converged for summit in summits],
        [summit.hessian for summit in summits],
        [summit.log_prob for summit in summits],
    )


def climb_all(density: Density, starts: Float[Tensor, "m d"], rounds: int = 4) -> list[Summit]:
    """The summit above each point: L-BFGS, cheap far away, and Newton, exact near it whatever the units, in turn."""
    at, open_climbs = list(starts), list(range(len(starts)))
    summits: dict[int, Summit] = {}
    for _ in range(rounds):
        tops = ascend(density, torch.stack([at[i] for i in open_climbs]))
        for i, top in zip(open_climbs, tops, strict=True):
            known = [summit for summit in summits.values() if summit.converged and _on(top, summit)]
            summits[i] = known[0] if known else _newton(density, top)
            at[i] = summits[i].z
        # a density that rises for ever is given up
        open_climbs = [i for i in open_climbs if not (summits[i].converged or abs(summits[i].log_prob) > RUNAWAY)]
        if not open_climbs:
            break
    return [summits[i] for i in range(len(starts))]


def _on(z: Tensor, summit: Summit) -> bool:
    """Whether a point is so near a summit, a tenth of a standard deviation, that no other one can be above it."""
    offset = z - summit.z
    return 0.0 <= float(-offset @ summit.hessian @ offset) < 0.01


def _newton(density: Density, z: Tensor, iterations: int = 30) -> Summit:
    """Newton steps on |curvature|, each shortened to the best of a dozen lengths, until half a squared step is tiny."""
    lengths = 2.0 ** torch.arange(1, -12, -1, dtype=torch.float64)
    with torch.no_grad():
        log_prob = float(density.log_prob(z[None]))
    for _ in range(iterations):
        with torch.no_grad():
            gradient = density.gradient(z[None])[0]
        hessian = hessian_at(density, z)
        if not bool(hessian.isfinite().all() and gradient.isfinite().all()):
            return Summit(z, log_prob, torch.zeros_like(hessian).fill_diagonal_(-1.0), False)
        scale, values, vectors = _scaled_eigen(hessian)
        step = scale * (vectors @ ((vectors.T @ (scale * gradient)) / values))
        decrement = float(gradient @ step)  # the squared length of the step in standard deviations
        if decrement < 1e-14:
            break
        with torch.no_grad():
            heights = density.log_prob(z + lengths[:, None] * step)
        heights = torch.where(heights.isfinite(), heights, -torch.inf)
        highest = int(heights.argmax())
        if not float(heights[highest]) > log_prob:
            break
        z, log_prob = z + lengths[highest] * step, float(heights[highest])
    return Summit(z, log_prob, hessian, decrement < 1e-6)


def _judge(density: Density, z: Tensor, log_prob: float, precision: Tensor, converged: bool) -> tuple[Kind, str]:
    """Look along every axis and principal direction, far out: a proper density must have fallen there."""
    scale, values, vectors = _scaled_eigen(-precision)
    if float(scale.max() / scale.min()) > SANE:
        return "unbounded", f"the curvature at the highest point found ({log_prob:.6g}) is too extreme to be a mode's"
    least = slice(0, 50)  # eigenvalues ascend: the directions of least curvature
    spread = (vectors * values.rsqrt()).T[least] * scale
    axes = scale.diag()[:200]
    rays = torch.cat([spread, -spread, axes, -axes])
    heights = [_heights(density, z + distance * rays) for distance in DISTANCES]
    level = torch.ones(len(rays), dtype=torch.bool)
    for near, far, ratio in zip(heights, heights[1:], _ratios(), strict=False):
        # not finite out there is as good as fallen: overflow
        level &= near.isfinite() & far.isfinite() & (near - far < _least_fall(ratio))
    for ray in rays[level][:8]:
        if _stays_level(density, [z + distance * ray for distance in DISTANCES], ray):
            return "improper", f"the log density does not fall along {_direction(ray / scale)}"
    if not converged:
        return "unbounded", f"no mode was found: the log density still rises at {log_prob:.6g}"
    return "mode", "converged"


def _heights(density: Density, z: Tensor) -> Tensor:
    rows = max(1, 20_000_000 // (density.responses + density.dim))
    with torch.no_grad():
        try:
            return torch.cat([density.log_prob(part) for part in z.split(rows)])
        except (RuntimeError, ValueError):  # a user's model may raise, far from where it makes sense
            return torch.full((len(z),), -torch.inf, dtype=torch.float64)


def _ratios() -> list[float]:
    return [far / near for near, far in itertools.pairwise(DISTANCES)]


def _least_fall(ratio: float) -> float:
    """What a log density that falls as |z|^-1/2 loses over this ratio of distances; every integrable one loses more."""
    return 0.5 * math.log(ratio)


def _stays_level(density: Density, points: list[Tensor], ray: Tensor) -> bool:
    """The ray's marginal density, by Laplace's method across it: a ridge that narrows as it rises may be integrable."""
    across = torch.linalg.svd((ray / ray.norm())[None]).Vh[1:]
    heights = []
    for point in points:
        hessian = hessian_at(density, point)
        if not bool(hessian.isfinite().all()):
            return False
        values = torch.linalg.eigvalsh(-across @ hessian @ across.T).abs().clamp_min(1e-300)
        heights.append(float(_heights(density, point[None])) - 0.5 * float(values.log().sum()))
    falls = [near - far for near, far in itertools.pairwise(heights)]
    return all(fall < _least_fall(ratio) for fall, ratio in zip(falls, _ratios(), strict=True))


def _direction(ray: Tensor) -> str:
    """The coordinates that take part in a direction, largest first."""
    share = ray.abs() / ray.abs().max()
    order = share.argsort(descending=True)[:3]
    return "coordinates z[" + "], z[".join(str(int(i) + 1) for i in order if float(share[i]) > 0.1) + "]"


def _distinct(z: Tensor, earlier: list[Tensor], scale_tril: Tensor) -> bool:
    """Whether a summit is more than a standard deviation off all earlier ones."""
    offsets = torch.stack([z - other for other in earlier]).T
    return bool((torch.linalg.solve_triangular(scale_tril, offsets, upper=False).norm(dim=0) > 1.0).all())

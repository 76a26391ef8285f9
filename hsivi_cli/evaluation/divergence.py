"""Jensen-Shannon divergence in the plane: draws against a density on a grid, or against other draws.

Protocol: a square-celled histogram over a rectangle, by default 60 x 60 cells, and one more cell for all that falls
outside. The density counts by the mass of a cell (midpoint rule on a finer grid, divided by the evidence). Natural
logarithms: 0 is equality, log 2 is disjoint. A histogram of n draws over c occupied cells is off by about c / (8 n)
upwards even for exact draws (see `draws_floor`), so n should be 100,000 or more, and n must be quoted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

POINTS_A_SIDE = 8  # of the midpoint rule within a cell


@dataclass(frozen=True)
class Window:
    """The rectangle that is compared, and its cells a side."""

    low: tuple[float, float]
    high: tuple[float, float]
    cells: int = 60


def window_around(draws: Float[Tensor, "n 2"], cells: int = 60, margin: float = 0.1) -> Window:
    """The box of reference draws, wider by a share `margin` on every side."""
    low, high = draws.amin(0), draws.amax(0)
    room = margin * (high - low)
    corners = torch.stack([low - room, high + room]).tolist()
    return Window((corners[0][0], corners[0][1]), (corners[1][0], corners[1][1]), cells)


def histogram(draws: Float[Tensor, "n 2"], window: Window) -> Float[Tensor, " c"]:
    """Shares of the draws in each cell, the last one being all that lies outside or is not finite."""
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in (window.low, window.high))
    position = (draws.double() - low) / (high - low)
    inside = ((position >= 0) & (position < 1)).all(1)
    index = (position[inside] * window.cells).long()
    counts = torch.bincount(index[:, 0] * window.cells + index[:, 1], minlength=window.cells**2).double()
    return torch.cat([counts, (~inside).sum().double().reshape(1)]) / len(draws)


def cell_masses(
    log_prob: Callable[[Float[Tensor, "n 2"]], Float[Tensor, " n"]], log_z: float, window: Window
) -> Float[Tensor, " c"]:
    """Mass of each cell under `exp(log_prob - log_z)`, and what is left outside the window."""
    points = window.cells * POINTS_A_SIDE
    steps = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    axes = [low + (high - low) * steps for low, high in zip(window.low, window.high, strict=True)]
    with torch.no_grad():
        values = torch.cat([log_prob(torch.cartesian_prod(row, axes[1])) for row in axes[0].split(POINTS_A_SIDE)])
    area = (window.high[0] - window.low[0]) * (window.high[1] - window.low[1]) / points**2
    fine = (values - log_z).exp().reshape(window.cells, POINTS_A_SIDE, window.cells, POINTS_A_SIDE) * area
    masses = fine.sum((1, 3)).flatten()
    return torch.cat([masses, (1 - masses.sum()).clamp_min(0).reshape(1)])


def jensen_shannon(p: Float[Tensor, " c"], q: Float[Tensor, " c"]) -> float:
    """`(KL(p, m) + KL(q, m)) / 2` with m the average of p and q, in nats; p and q are normalised first."""
    p, q = p / p.sum(), q / q.sum()
    middle = ((p + q) / 2).clamp_min(torch.finfo(p.dtype).tiny)  # half of the smallest number is zero
    kl = [torch.special.xlogy(r, r).sum() - torch.special.xlogy(r, middle).sum() for r in (p, q)]
    return float((kl[0] + kl[1]) / 2)


def draws_floor(masses: Float[Tensor, " c"], n: int) -> float:
    """About what n exact draws would score: half of `chi^2 / (4 n)`, summed over the cells that expect a draw or more.

    Each such cell adds 1 / (8 n), to second order in its relative error; cells that expect less add about log(2) / 2
    times their mass.
    """
    likely = masses * n >= 1
    rare = float(masses[~likely].sum())
    return float(likely.sum()) / (8 * n) + rare * 0.5 * 0.6931

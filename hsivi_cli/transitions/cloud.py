"""A cloud of HMC chains that moves until it has forgotten its start and stands still, and how far to trust it.

The cloud is made of islands, which share their settings and nothing else. They are replicates of whatever was done
to the cloud before, so their disagreement is a nested R-hat (Margossian et al. 2024, arXiv 2110.13017).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.transitions.hmc import Chains, Gradient, LogProb, Trajectory, adapt_step, hmc_move, start_chains

QUARTER_PERIOD = math.pi / 2  # the trajectory that makes a normal coordinate forget its start
STILL = 4.5  # standard errors that the means of a cloud at rest do not exceed, over some hundred features
LEAPFROGS_MOST = 128
STUCK_AFTER, STUCK = 30, 0.8  # moves after which a memory above this is taken for several modes


@dataclass
class Cloud:
    """Chains, island after island, and their moves' settings: `scale` (d, d) is the cloud's own lower-triangular
    factor, `leapfrogs` and `step` the trajectory. `memory` is the largest correlation of a feature with its start.

    `unit`, a factor (d, d) or a diagonal (d,), gives the coordinates in which the cloud is about N(0, I): its own
    factor is shrunk towards that one. `on_move` hears of every move.
    """

    chains: Chains
    islands: int
    generator: torch.Generator
    step: float
    centre: Tensor
    scale: Tensor
    unit: Tensor
    leapfrogs: int = 1
    memory: float = 1.0
    acceptance: float = 0.0
    moves: int = 0
    gradients: int = 0
    divergences: int = 0
    temperatures: list[float] = field(default_factory=list)
    states: int = 0
    on_move: Callable[["Cloud"], object] | None = None

    def take(self, rows: Tensor) -> None:
        """Keep the chains with these indices."""
        self.chains = self.chains.take(rows)


@dataclass(frozen=True)
class Agreement:
    """Nested `r_hat` over islands, the worst feature's, and `ess`, the independent draws that this amounts to."""

    r_hat: float
    ess: float


def make_cloud(
    z: Float[Tensor, "n d"],
    islands: int,
    generator: torch.Generator,
    unit: Float[Tensor, "d d"] | Float[Tensor, " d"] | None = None,
) -> Cloud:
    """A cloud at rest at `z`, of about unit scale (or `unit`), with the step that normals accept at 0.8 (it scales as
    d^-1/4)."""
    n, d = z.shape
    chains = Chains(z, z.new_full((n,), math.nan), torch.full_like(z, math.nan))
    unit = z.new_ones(d) if unit is None else unit
    return Cloud(chains, islands, generator, 1.2 * d**-0.25, z.mean(0), unit.diag() if unit.ndim == 1 else unit, unit)


def settle(
    cloud: Cloud, log_prob: LogProb, gradient: Gradient, forgotten: float, gradients: int, moves: int = 0
) -> bool:
    """Move the cloud, in place, until no feature's correlation with its start is above `forgotten`; says if it did.

    With `moves` above 0 that is all, and after so many it stops. Otherwise the cloud must also stand still: its means
    must not have moved while it forgot, or it has to forget once more. Gives up after `gradients` evaluations.
    """
    cloud.chains = start_chains(cloud.chains.z, log_prob, gradient)
    _measure(cloud)
    forgotten = max(forgotten, 4 / math.sqrt(len(cloud.chains.z)))  # no correlation is not measured as 0
    first = start = cloud.chains
    stretch, done, since = 1.0, 0, 0
    most = cloud.gradients + gradients
    while cloud.gradients < most:
        done, since = done + 1, since + 1
        cloud.leapfrogs = max(1, min(round(stretch * QUARTER_PERIOD / cloud.step), LEAPFROGS_MOST))
        acceptance = _move(cloud, log_prob, gradient)
        cloud.step = adapt_step(cloud.step, acceptance, done)
        before, now = features(cloud, start), features(cloud)
        cloud.memory = correlation(before, now)
        if cloud.memory < forgotten:
            if moves or drift(before, now) < STILL:
                return True
            if start is first:
                stretch = 1.0  # what was slow was the way there
            start, since = cloud.chains, 0
        if done == moves or (since >= STUCK_AFTER and cloud.memory > STUCK):
            return False
        if since and since % 8 == 0:  # slow, or wide of the mark at first
            stretch = min(1.5 * stretch, 4.0)
        if done & (done - 1) == 0:  # after 1, 2, 4, ... moves: the cloud may have changed its shape
            _measure(cloud)
    return False


def harvest(
    cloud: Cloud, log_prob: LogProb, gradient: Gradient, clouds: int, forgotten: float, gradients: int
) -> list[Chains]:
    """The settled cloud, and `clouds - 1` later states of it, each after it forgot the one before; settings frozen."""
    found, cloud.states = [cloud.chains], 1
    forgotten = max(forgotten, 4 / math.sqrt(len(cloud.chains.z)))
    most = cloud.gradients + gradients
    while len(found) < clouds:
        before = features(cloud)
        _move(cloud, log_prob, gradient)
        while correlation(before, features(cloud)) > forgotten and cloud.gradients < most:
            _move(cloud, log_prob, gradient)
        found.append(cloud.chains)
        cloud.states = len(found)
    return found


def _move(cloud: Cloud, log_prob: LogProb, gradient: Gradient) -> Float[Tensor, " n"]:
    trajectory = Trajectory(cloud.step, cloud.leapfrogs, scale=cloud.scale)
    moved = hmc_move(cloud.chains, log_prob, gradient, trajectory, cloud.generator)
    cloud.chains, cloud.acceptance = moved.chains, float(moved.acceptance.mean())
    cloud.moves += 1
    cloud.gradients += cloud.leapfrogs
    cloud.divergences += int(moved.divergent.sum())
    if cloud.on_move is not None:
        cloud.on_move(cloud)
    return moved.acceptance


def _measure(cloud: Cloud) -> None:
    cloud.centre = cloud.chains.z.mean(0)
    centred = cloud.chains.z - cloud.centre
    if cloud.unit.ndim == 1:
        cloud.scale = cloud.unit[:, None] * shrunk_factor(centred / cloud.unit)
    else:
        inner = torch.linalg.solve_triangular(cloud.unit, centred.T, upper=False).T
        cloud.scale = cloud.unit @ shrunk_factor(inner)


def features(cloud: Cloud, chains: Chains | None = None) -> Float[Tensor, "n f"]:
    """What is watched of the cloud's chains, or of these: the coordinates in the cloud's own shape, their squares, and
    the log density. Coordinates count by their asinh, so that a few far draws do not hide all the others."""
    chains = cloud.chains if chains is None else chains
    v = torch.linalg.solve_triangular(cloud.scale, (chains.z - cloud.centre).T, upper=False).T
    v = v.asinh()
    return torch.cat([v, v**2, chains.log_prob[:, None]], 1)


def correlation(before: Float[Tensor, "n f"], now: Float[Tensor, "n f"]) -> float:
    """The largest absolute correlation of a feature with its own start; a feature that does not vary has none."""
    a, b = before - before.mean(0), now - now.mean(0)
    varies = a.std(0) > 1e-10 * (1 + before.mean(0).abs())
    found = ((a * b).mean(0) / (a.std(0) * b.std(0)).clamp_min(1e-300)).abs().clamp_max(1.0)
    return float(torch.where(varies, found, 0.0).max())


def drift(before: Float[Tensor, "n f"], now: Float[Tensor, "n f"]) -> float:
    """How far the cloud's means have moved, in standard errors of two independent clouds; the worst feature's."""
    # a feature that does not vary has no error to be measured in
    variance = (before.var(0) + now.var(0)).clamp_min(1e-20) + 1e-20 * now.mean(0) ** 2
    return float(((now.mean(0) - before.mean(0)).abs() / (variance / len(now)).sqrt()).max())


def agreement(watched: list[Float[Tensor, "n f"]], islands: int) -> Agreement:
    """How well the islands agree on the means of the features of one or several states of the cloud."""
    by_island = torch.cat([state.reshape(islands, -1, state.shape[1]) for state in watched], 1)
    within = by_island.var(1).mean(0)
    floor = 1e-20 * (1 + by_island.mean((0, 1)) ** 2)  # a feature that does not vary: rounding is no disagreement
    ratio = float((by_island.mean(1).var(0) / (within + floor)).max())
    n = by_island.shape[0] * by_island.shape[1]
    return Agreement(math.sqrt(1 + ratio), min(islands / max(ratio, 1e-300), float(n)))


def shrunk_factor(z: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Cholesky factor of the cloud's covariance, shrunk towards a multiple of the identity by as much as its noise asks
    for (Ledoit and Wolf 2004, section 3.2): little if n >> d, nearly all where the cloud is about N(0, I) already."""
    n, d = z.shape
    centred = z - z.mean(0)
    covariance = centred.T @ centred / n
    level = covariance.diagonal().mean()
    identity = torch.eye(d, dtype=z.dtype)
    away = ((covariance - level * identity) ** 2).sum()
    noise = ((centred**2).sum(1) ** 2).mean() / n - (covariance**2).sum() / n
    # at least 1 / (n + 1) of the identity, so that a cloud of fewer points than dimensions has a factor
    share = float((noise / away.clamp_min(1e-300)).clamp(1 / (n + 1), 1.0))
    return torch.linalg.cholesky((1 - share) * covariance + share * level * identity)

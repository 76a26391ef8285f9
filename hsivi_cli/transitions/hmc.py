"""Hamiltonian Monte Carlo on many chains at once (Duane et al. 1987; Neal 2011, arXiv 1206.1901).

All chains are rows of one tensor program and share a step size; a MALA step is a trajectory of one leapfrog step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LogProb = Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]
Gradient = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n d"]]

DIVERGENCE = 1000.0  # energy error above which a trajectory counts as divergent (Stan's)


@dataclass(frozen=True)
class Chains:
    """Where the chains are: `z` (n, d), and the log density and its gradient there."""

    z: Float[Tensor, "n d"]
    log_prob: Float[Tensor, " n"]
    gradient: Float[Tensor, "n d"]

    def take(self, rows: Tensor) -> "Chains":
        """The chains with these indices, with repetition."""
        return Chains(self.z[rows], self.log_prob[rows], self.gradient[rows])


@dataclass(frozen=True)
class Moved:
    """The chains after a move, each one's acceptance probability, and which trajectories diverged."""

    chains: Chains
    acceptance: Float[Tensor, " n"]
    divergent: Bool[Tensor, " n"]


@dataclass(frozen=True)
class Trajectory:
    """How far a move goes: `leapfrogs` steps of size `step`, times a factor of each chain's own in `1 +- jitter`.

    `scale` (d, d), lower triangular, or (d,), multiplies the momentum: the move is that of unit mass in the
    coordinates `scale^-1 z`. None is the identity.
    """

    step: float
    leapfrogs: int
    jitter: float = 0.2
    scale: Float[Tensor, "*b d d"] | Float[Tensor, " d"] | None = None


def start_chains(z: Float[Tensor, "n d"], log_prob: LogProb, gradient: Gradient) -> Chains:
    """Chains at `z`."""
    return Chains(z, log_prob(z), gradient(z))


def leapfrog(
    z: Float[Tensor, "*b n d"],
    momentum: Float[Tensor, "*b n d"],
    slope: Float[Tensor, "*b n d"],
    gradient: Gradient,
    step: Float[Tensor, "*b n 1"],
    trajectory: Trajectory,
) -> tuple[Float[Tensor, "*b n d"], Float[Tensor, "*b n d"], Float[Tensor, "*b n d"]]:
    """`trajectory.leapfrogs` leapfrog steps from `z`, where the gradient is `slope`; returns z, momentum and slope.

    Leading axes are clouds, each with its own steps and `trajectory.scale`. Reversible under a change of the momentum's
    sign, and volume preserving. A chain that leaves the finite numbers comes to rest at its start with an infinite
    momentum, so that it is rejected and nothing downstream sees it.
    """
    start, scale = z, trajectory.scale
    ones = z.new_ones(z.shape[-1], 1)
    momentum = momentum + 0.5 * step * _pulled(slope, scale)
    for i in range(trajectory.leapfrogs):
        z = z + step * _pushed(momentum, scale)
        finite = (z @ ones).isfinite()  # a momentum that is no number shows here, one step later
        lost = not bool(finite.all())
        z = torch.where(finite, z, start) if lost else z
        slope = gradient(z)
        last = i == trajectory.leapfrogs - 1
        momentum = momentum + (0.5 if last else 1.0) * step * _pulled(slope, scale)
        momentum = torch.where(finite, momentum, torch.inf) if lost else momentum
    return z, momentum, slope


def hmc_move(
    chains: Chains, log_prob: LogProb, gradient: Gradient, trajectory: Trajectory, generator: torch.Generator
) -> Moved:
    """One trajectory of every chain with fresh momenta, accepted or rejected chain by chain.

    Leaves the density proportional to `exp(log_prob)` invariant for any trajectory. NaN counts as density zero.
    """
    n, _ = chains.z.shape
    momentum = torch.randn(chains.z.shape, generator=generator, dtype=chains.z.dtype)
    factor = torch.rand(n, 1, generator=generator, dtype=chains.z.dtype)
    uniform = torch.rand(n, generator=generator, dtype=chains.z.dtype)
    step = trajectory.step * (1 + trajectory.jitter * (2 * factor - 1))
    z, end_momentum, slope = leapfrog(chains.z, momentum, chains.gradient, gradient, step, trajectory)
    height = log_prob(z)
    gain = (height - 0.5 * (end_momentum**2).sum(1)) - (chains.log_prob - 0.5 * (momentum**2).sum(1))
    gain = torch.where(slope.isfinite().all(1) & height.isfinite(), gain, -torch.inf).nan_to_num(nan=-torch.inf)
    acceptance = gain.clamp_max(0.0).exp()
    accepted = uniform < acceptance
    row = accepted[:, None]
    moved = Chains(
        torch.where(row, z, chains.z),
        torch.where(accepted, height, chains.log_prob),
        torch.where(row, slope, chains.gradient),
    )
    return Moved(moved, acceptance, gain < -DIVERGENCE)


def adapt_step(step: float, acceptance: Float[Tensor, " n"], moves: int, target: float = 0.8) -> float:
    """A better step size from the acceptance probabilities of a cloud, Robbins-Monro on its logarithm.

    The cloud's harmonic mean is led to `target` (Hoffman, Radul, Sountsov 2021), so that a few chains which never
    accept, in a corner too narrow for the step, count for much. It has little noise, so the gain starts at 2 and
    decays slowly with `moves`, which counts from 1.
    """
    harmonic = 1 / float((1 / acceptance.clamp_min(0.01)).mean())
    return step * math.exp(2.0 * moves**-0.5 * (harmonic - target))


def _pushed(momentum: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return momentum
    return momentum * scale if scale.ndim == 1 else momentum @ scale.mT


def _pulled(slope: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return slope
    return slope * scale if scale.ndim == 1 else slope @ scale

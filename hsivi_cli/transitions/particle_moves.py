"""MCMC moves of many particle clouds at once, toward each cloud's own tempered posterior; steps fitted to the cloud.

A cloud is the (K, d) particles of one sampler; the tensors are (B, K, d). Every cloud has its temperature, step size,
covariance and noise source, and none sees another, so that a sampler's result does not depend on its neighbours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.transitions.hmc import Trajectory, leapfrog

Cloud = Float[Tensor, "b k d"]
PerParticle = Float[Tensor, "b k"]
Kernel = Literal["hmc", "mala", "random-walk"]

# the acceptance at which a move is most efficient: Roberts, Gelman, Gilks 1997; Roberts, Rosenthal 1998; Beskos et al.
# 2013, somewhat above for short trajectories
BEST_ACCEPTANCE = {"random-walk": 0.3, "mala": 0.57, "hmc": 0.75}
JITTER = 0.2
# a trajectory of this length makes a normal coordinate forget its start, one of twice that brings its square back
QUARTER_PERIOD = math.pi / 2


@dataclass(frozen=True)
class PriorLikelihood:
    """What likelihood tempering needs of a model, in unconstrained coordinates, float64.

    `sample_prior(n, generator)` draws (n, `dim`) and `log_prior` maps (..., d) to (...); `log_likelihood` maps
    (b, k, d) to (b, k), row i of b being sampler i, with its own observation. Log densities of -inf, +inf or NaN are
    impossible points. `gradient(z)`, if given, holds the gradients of `log_prior` and `log_likelihood`, (b, k, d) each;
    autograd finds them otherwise. `take(rows)` is the target of the samplers with these indices, with repetition; with
    it, samplers that have finished cost nothing.
    """

    dim: int
    sample_prior: Callable[[int, torch.Generator], Float[Tensor, "n d"]]
    log_prior: Callable[[Float[Tensor, "*n d"]], Float[Tensor, "*n"]]
    log_likelihood: Callable[[Cloud], PerParticle]
    gradient: Callable[[Cloud], tuple[Cloud, Cloud]] | None = None
    take: Callable[[Int[Tensor, " r"]], "PriorLikelihood"] | None = None


def given_observations(
    dim: int,
    sample_prior: Callable[[int, torch.Generator], Float[Tensor, "n d"]],
    log_prior: Callable[[Float[Tensor, "*n d"]], Float[Tensor, "*n"]],
    log_likelihood: Callable[[Cloud, Float[Tensor, " b *x"]], PerParticle],
    observations: Float[Tensor, " b *x"],
) -> PriorLikelihood:
    """The target of one sampler an observation; `log_likelihood(z, x)` maps (b, k, d) and (b, ...) to (b, k)."""
    return PriorLikelihood(
        dim,
        sample_prior,
        log_prior,
        lambda z: log_likelihood(z, observations),
        take=lambda rows: given_observations(dim, sample_prior, log_prior, log_likelihood, observations[rows]),
    )


class SamplerNoise:
    """Random numbers of float64, one independent source a sampler.

    Only the filling of rows is a loop. Seeds are 63-bit integers; equal seeds give equal noise whatever the others.
    """

    def __init__(self, seeds: Int[Tensor, " b"]) -> None:
        self._sources = [np.random.Generator(np.random.SFC64(int(seed))) for seed in seeds]

    def normal(self, *shape: int) -> Float[Tensor, " b *shape"]:
        """Standard normal noise of every sampler."""
        noise = np.empty((len(self._sources), *shape))
        for row, source in zip(noise, self._sources, strict=True):
            source.standard_normal(out=row)
        return torch.from_numpy(noise)

    def uniform(self, *shape: int) -> Float[Tensor, " b *shape"]:
        """Uniform noise in [0, 1) of every sampler."""
        noise = np.empty((len(self._sources), *shape))
        for i, source in enumerate(self._sources):
            noise[i] = source.random(shape)
        return torch.from_numpy(noise)

    def generators(self) -> list[torch.Generator]:
        """A torch generator of every sampler, for code that wants one."""
        return [torch.Generator().manual_seed(int(source.integers(2**63))) for source in self._sources]

    def take(self, rows: Int[Tensor, " r"]) -> None:
        """Keep the sources of these samplers."""
        self._sources = [self._sources[int(i)] for i in rows]


@dataclass(frozen=True)
class Particles:
    """Where the clouds are, and the two parts of the log density there; impossible is -inf."""

    z: Cloud
    log_prior: PerParticle
    log_likelihood: PerParticle

    def gather(self, index: Int[Tensor, "b k"]) -> "Particles":
        """Every cloud's particles with these indices, with repetition."""
        z = self.z.gather(1, index[..., None].expand_as(self.z))
        return Particles(z, self.log_prior.gather(1, index), self.log_likelihood.gather(1, index))

    def take(self, rows: Int[Tensor, " r"]) -> "Particles":
        """The clouds with these indices."""
        return Particles(self.z[rows], self.log_prior[rows], self.log_likelihood[rows])


@dataclass(frozen=True)
class Moves:
    """How clouds move: `count` moves of `leapfrogs` steps each (HMC alone), from `step` (b,) in units of `factor`.

    `factor` (b, d, d) is lower triangular, the clouds' own shape. With `adapt` the step follows the acceptance.
    """

    kernel: Kernel
    count: int
    leapfrogs: int
    step: Float[Tensor, " b"]
    factor: Float[Tensor, "b d d"]
    adapt: bool = True


@dataclass(frozen=True)
class Moved:
    """The clouds after their moves, the step size at their end, and the mean acceptance probability on the way.

    `evaluations` is how often each particle's density was asked for.
    """

    particles: Particles
    step: Float[Tensor, " b"]
    acceptance: Float[Tensor, " b"]
    evaluations: int


def evaluate(target: PriorLikelihood, z: Cloud) -> Particles:
    """Particles at `z`."""
    with torch.no_grad():
        return Particles(z, _possible(target.log_prior(z)), _possible(target.log_likelihood(z)))


def tempered(particles: Particles, temperature: Float[Tensor, " b"]) -> PerParticle:
    """`log p(z) + tau log p(x | z)`; an impossible point is impossible at any temperature above 0, and prior at 0."""
    scaled = temperature[:, None] * particles.log_likelihood
    return particles.log_prior + torch.where(temperature[:, None] > 0, scaled, 0.0)


def first_step(kernel: Kernel, dim: int, leapfrogs: int) -> float:
    """A step that standard normals accept about as often as is best, in `dim` dimensions."""
    hmc = min(1.2 * dim**-0.25, QUARTER_PERIOD / leapfrogs)
    return {"random-walk": 2.4 * dim**-0.5, "mala": 1.6 * dim ** (-1 / 6), "hmc": hmc}[kernel]


def covariance_of(
    z: Cloud, log_weight: PerParticle, before: Float[Tensor, "b d d"] | None = None
) -> Float[Tensor, "b d d"]:
    """The weighted clouds' covariances, shrunk towards `before` as d approaches the effective sample size.

    Without `before`, towards their own diagonals. So they stay of full rank where few particles have survived.
    """
    weight = log_weight.exp()[..., None]
    z = torch.where(weight > 0, z, 0.0)  # the dead may be anywhere, at infinity too
    centred = (z - (weight * z).sum(1, keepdim=True)) * weight.sqrt()
    covariance = centred.mT @ centred
    if before is None:
        variance = covariance.diagonal(dim1=1, dim2=2)
        before = torch.diag_embed(torch.where(variance > 0, variance, 1.0))
    ess = 1 / weight.square().sum((1, 2))
    share = (ess / (ess + z.shape[2]))[:, None, None]
    return share * covariance + (1 - share) * before


def factor_of(covariance: Float[Tensor, "b d d"]) -> Float[Tensor, "b d d"]:
    """Cholesky factors; of the diagonal alone where rounding has left a matrix without one."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-300).sqrt())
    return torch.where((info == 0)[:, None, None], factor, diagonal)


def move_clouds(
    particles: Particles,
    log_weight: PerParticle,
    target: PriorLikelihood,
    temperature: Float[Tensor, " b"],
    moves: Moves,
    noise: SamplerNoise,
) -> Moved:
    """`moves.count` moves, each of which leaves every cloud's tempered posterior invariant for a fixed step and factor.

    `log_weight`, normalised, says how much a particle's acceptance counts for the step. Temperatures must be above 0.
    """
    _, k, d = particles.z.shape
    weight, step, heard = log_weight.exp(), moves.step, torch.zeros_like(moves.step)
    leapfrogs = {"hmc": moves.leapfrogs, "mala": 1, "random-walk": 0}[moves.kernel]
    slope = _value_and_slope(target, particles.z, temperature)[1] if leapfrogs and moves.count else None
    for i in range(moves.count):
        proposal, uniform = noise.normal(k, d), noise.uniform(k)
        if slope is None:
            z = particles.z + step[:, None, None] * (proposal @ moves.factor.mT)
            found, kinetic = evaluate(target, z), torch.zeros_like(uniform)
        else:
            jittered = step[:, None, None] * (1 + JITTER * (2 * noise.uniform(k, 1) - 1))
            path = _Path(target, temperature)
            trajectory = Trajectory(math.nan, leapfrogs, scale=moves.factor)
            _, momentum, end_slope = leapfrog(particles.z, proposal, slope, path.slope, jittered, trajectory)
            found = path.end()
            kinetic = 0.5 * (proposal.square() - momentum.square()).sum(2)
        # from one impossible point to another, or with a slope that is no number: no number, and no move
        gain = (tempered(found, temperature) - tempered(particles, temperature) + kinetic).nan_to_num(nan=-math.inf)
        acceptance = gain.clamp_max(0.0).exp()
        accepted = uniform < acceptance
        particles = Particles(
            torch.where(accepted[..., None], found.z, particles.z),
            torch.where(accepted, found.log_prior, particles.log_prior),
            torch.where(accepted, found.log_likelihood, particles.log_likelihood),
        )
        if slope is not None:
            slope = torch.where(accepted[..., None], end_slope, slope)
        mean = (weight * acceptance).sum(1)
        heard = heard + mean / moves.count
        if moves.adapt:  # Robbins-Monro on the logarithm, afresh at every temperature
            step = step * (2.0 * (i + 1) ** -0.5 * (mean - BEST_ACCEPTANCE[moves.kernel])).exp()
            step = step.clamp_max(QUARTER_PERIOD / leapfrogs if moves.kernel == "hmc" else math.inf)
    evaluations = moves.count * max(leapfrogs, 1) + (slope is not None)
    return Moved(particles, step, heard, evaluations)


class _Path:
    """The slopes along a trajectory, and the last point that was asked for."""

    def __init__(self, target: PriorLikelihood, temperature: Float[Tensor, " b"]) -> None:
        self._target, self._temperature = target, temperature
        self._last: Particles | None = None

    def slope(self, z: Cloud) -> Cloud:
        self._last, slope = _value_and_slope(self._target, z, self._temperature)
        return slope

    def end(self) -> Particles:
        assert self._last is not None
        return self._last


def _value_and_slope(target: PriorLikelihood, z: Cloud, temperature: Float[Tensor, " b"]) -> tuple[Particles, Cloud]:
    """Particles at `z`, and the gradient of the tempered log density."""
    tau = temperature[:, None, None]
    if target.gradient is not None:
        with torch.no_grad():
            prior, likelihood = target.gradient(z)
        return evaluate(target, z), prior + tau * likelihood
    with torch.enable_grad():
        point = z.detach().requires_grad_(True)
        log_prior, log_likelihood = target.log_prior(point), target.log_likelihood(point)
        (slope,) = torch.autograd.grad((log_prior + temperature[:, None] * log_likelihood).sum(), point)
    return Particles(z, _possible(log_prior.detach()), _possible(log_likelihood.detach())), slope


def _possible(log_density: PerParticle) -> PerParticle:
    """An infinite density is as impossible as none."""
    return torch.where(log_density.isfinite(), log_density, -math.inf)

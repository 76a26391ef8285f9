"""From a fit to draws that pass as exact: tempered sequential Monte Carlo, or resampling and HMC moves.

The cloud of particles is split into islands that never exchange particles until the end. They are independent
replicates of the whole procedure, so they give the standard error of log Z, and their disagreement is a nested R-hat
(Margossian et al. 2024, arXiv 2110.13017) that sees both chains that do not mix and weights that do not suffice.
HMC moves go on until the particles have forgotten where they started.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.gaussian_vi import GaussianFit
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.whiten import Affine, whiten
from hsivi_cli.transitions.hmc import Chains, Trajectory, adapt_step, hmc_move, start_chains
from hsivi_cli.transitions.tempering import (
    GeometricPath,
    effective_sample_size,
    log_mean_exp,
    next_temperature,
    systematic_resample,
)

ISLANDS = 16
INFLATIONS = (1.0, 1.1, 1.25, 1.5, 2.0)  # of the Gaussian's sds, tried before a tempered run
CACHE = 500_000  # numbers a batch of evaluations may hold: particles times responses
STILL = 4.5  # standard errors that the means of a cloud at rest do not exceed, over some hundred features
QUARTER_PERIOD = math.pi / 2  # the trajectory that makes a normal coordinate forget its start


@dataclass(frozen=True)
class Budget:
    """When to stop: `forgotten`, the largest correlation with the start that counts as none; `gradients`, the most
    gradient evaluations of a particle; `share`, the effective sample size a temperature step may leave."""

    forgotten: float = 0.1
    gradients: int = 3000
    share: float = 0.5


@dataclass(frozen=True)
class Refined:
    """Equally weighted draws, and how far to trust them.

    `log_z` with `log_z_se` (None without weights or base). `r_hat` compares islands (below 1.01 is good), over all
    coordinates, their squares and the log density; `ess` is the number of independent draws the islands' agreement
    amounts to, at most n. `memory` is the correlation with the start that was left. `converged` sums these up.
    """

    draws: Draws
    log_z: float | None
    log_z_se: float | None
    r_hat: float
    ess: float
    memory: float
    acceptance: float
    divergences: int
    temperatures: tuple[float, ...]
    moves: int
    gradients: int
    converged: bool
    note: str = ""


@dataclass
class _Cloud:
    """The particles in whitened coordinates, island after island, and the moves' adapted settings."""

    chains: Chains
    islands: int
    generator: torch.Generator
    step: float
    centre: Tensor
    scale: Tensor
    leapfrogs: int = 0
    moves: int = 0
    gradients: int = 0
    divergences: int = 0
    acceptance: float = 0.0
    memory: float = 1.0
    temperatures: list[float] = field(default_factory=list)


def tempered_smc(
    density: Density, start: GaussianFit, particles: int = 4000, seed: int = 0, budget: Budget | None = None
) -> Refined:
    """Tempered SMC from the fitted Gaussian (widened where that helps) to `density`, with HMC moves.

    Raises RunError if no particle has a finite density.
    """
    budget = budget or Budget()
    generator = torch.Generator().manual_seed(seed)
    density = _in_batches(density)
    base = Affine(start.location, start.scale_tril * _best_inflation(density, start, generator))
    white = whiten(density, base.location, base.scale)
    path = GeometricPath(_log_normal, white.log_prob, lambda u: -u, white.gradient)
    islands, size = _islands(particles)
    u = torch.randn(islands * size, density.dim, generator=generator, dtype=torch.float64)
    identity = torch.eye(density.dim, dtype=torch.float64)
    with torch.no_grad():
        cloud = _Cloud(start_chains(u, _log_normal, lambda u: -u), islands, generator, _first_step(u), u[0], identity)
        t, log_z = 0.0, torch.zeros(islands, dtype=torch.float64)
        while t < 1.0:
            log_ratio = path.log_ratio(cloud.chains.z)
            if not bool(log_ratio.isfinite().any()):
                raise RunError(f"the log density of {density.name} is finite nowhere near the fit")
            to = next_temperature(log_ratio, t, budget.share)
            log_weight = ((to - t) * log_ratio).reshape(islands, size)
            log_z += log_mean_exp(log_weight)
            _resample(cloud, log_weight)
            t = to
            cloud.temperatures.append(t)
            _settle(cloud, path, t, budget, 0.5 if t < 1 else budget.forgotten)
        r_hat, ess = _agreement(cloud)
        if float(effective_sample_size(log_z)) < 0.9 * islands:
            _exchange(cloud, log_z)
            _settle(cloud, path, 1.0, budget, budget.forgotten)
    spread = (log_z - log_z.max()).exp()
    log_z_se = float(spread.std() / spread.mean() / math.sqrt(islands))
    return _refined(cloud, base, float(log_mean_exp(log_z)), log_z_se, r_hat, ess, budget, particles)


def refine(density: Density, draws: Draws, seed: int = 0, budget: Budget | None = None) -> Refined:
    """Resample weighted draws (their `log_weight`; else `log_prob - log_approx`; else equal), then move them by HMC.

    As many draws come back as went in. log Z is that of the weights. Raises InputError for fewer than 32 draws.
    """
    budget = budget or Budget()
    generator = torch.Generator().manual_seed(seed)
    density = _in_batches(density)
    n = len(draws.z)
    if n < 32:
        raise InputError(f"refining needs at least 32 draws, not {n}: ask for more with --draws")
    log_weight = draws.log_weight
    if log_weight is None and draws.log_approx is not None:
        log_weight = draws.log_prob - draws.log_approx
    weighted = draws.log_weight is not None
    log_weight = torch.zeros(n, dtype=torch.float64) if log_weight is None else log_weight.double()
    log_weight = log_weight.nan_to_num(nan=-torch.inf)
    if not bool(log_weight.isfinite().any()):
        raise RunError("no draw has a finite weight: there is nothing to refine")
    islands, size = _islands(n)
    # islands of equal size: the last ones start some draws again where n is no multiple
    rows = torch.randperm(n, generator=generator)
    rows = torch.cat([rows, rows[: islands * size - n]]).reshape(islands, size)
    keep = systematic_resample(log_weight[rows], torch.rand(islands, generator=generator, dtype=torch.float64))
    z = draws.z[rows.gather(1, keep).flatten()]
    spread = z.std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    base = Affine(z.mean(0), spread)
    white = whiten(density, base.location, base.scale)
    path = GeometricPath(_log_normal, white.log_prob, lambda u: -u, white.gradient)
    with torch.no_grad():
        u = base.inverse(z)
        chains = start_chains(u, white.log_prob, white.gradient)
        cloud = _Cloud(chains, islands, generator, _first_step(u), u[0], _factor(u))
        _settle(cloud, path, 1.0, budget, budget.forgotten)
        r_hat, ess = _agreement(cloud)
    log_z = float(log_mean_exp(log_weight)) if weighted else None
    log_z_se = math.sqrt(max(1 / float(effective_sample_size(log_weight)) - 1 / n, 0.0)) if weighted else None
    return _refined(cloud, base, log_z, log_z_se, r_hat, ess, budget, n)


def _settle(cloud: _Cloud, path: GeometricPath, t: float, budget: Budget, forgotten: float) -> None:
    """HMC moves at temperature t until no feature of the cloud remembers its start; updates the cloud in place.

    At t = 1 the cloud must also stand still: its means must not have moved while it forgot, else once more.
    """
    log_prob, gradient = path.log_prob(t), path.gradient(t)
    cloud.chains = start_chains(cloud.chains.z, log_prob, gradient)
    cloud.centre, cloud.scale = cloud.chains.z.mean(0), _factor(cloud.chains.z)
    forgotten = max(forgotten, 4 / math.sqrt(len(cloud.chains.z)))  # no correlation is not measured as 0
    before, stretch = _features(cloud), 1.0
    for move in range(1, 1_000_000):
        cloud.leapfrogs = max(1, min(round(stretch * QUARTER_PERIOD / cloud.step), 128))
        trajectory = Trajectory(cloud.step, cloud.leapfrogs, scale=cloud.scale)
        moved = hmc_move(cloud.chains, log_prob, gradient, trajectory, cloud.generator)
        cloud.chains, cloud.acceptance = moved.chains, float(moved.acceptance.mean())
        cloud.step = adapt_step(cloud.step, moved.acceptance, move)
        cloud.moves += 1
        cloud.gradients += cloud.leapfrogs
        cloud.divergences += int(moved.divergent.sum())
        now = _features(cloud)
        cloud.memory = _memory(before, now)
        if cloud.gradients > budget.gradients:
            return
        if cloud.memory < forgotten:
            if t < 1 or _drift(before, now) < STILL:
                return
            before = now
        if move % 8 == 0:
            stretch = min(1.5 * stretch, 4.0)


def _drift(before: Float[Tensor, "n f"], now: Float[Tensor, "n f"]) -> float:
    """How far the cloud's means have moved, in standard errors of two independent clouds; the worst feature's."""
    variance = (before.var(0) + now.var(0)).clamp_min(1e-300)
    return float(((now.mean(0) - before.mean(0)).abs() / (variance / len(now)).sqrt()).max())


def _features(cloud: _Cloud) -> Float[Tensor, "n f"]:
    """What is watched: coordinates of the cloud's own shape, their squares, and the log density."""
    z = cloud.chains.z
    v = Affine(cloud.centre, cloud.scale).inverse(z)
    return torch.cat([v, v**2, cloud.chains.log_prob[:, None]], 1)


def _memory(before: Float[Tensor, "n f"], now: Float[Tensor, "n f"]) -> float:
    """The largest absolute correlation of a feature with its own start."""
    a, b = before - before.mean(0), now - now.mean(0)
    return float(((a * b).mean(0) / (a.std(0) * b.std(0)).clamp_min(1e-300)).abs().max())


def _agreement(cloud: _Cloud) -> tuple[float, float]:
    """Nested R-hat over islands, the worst feature's, and the number of independent draws that it stands for."""
    features = _features(cloud)
    by_island = features.reshape(cloud.islands, -1, features.shape[1])
    between = by_island.mean(1).var(0)
    within = by_island.var(1).mean(0).clamp_min(1e-300)
    ratio = float((between / within).max())
    return math.sqrt(1 + ratio), min(cloud.islands / max(ratio, 1e-300), float(len(features)))


def _resample(cloud: _Cloud, log_weight: Float[Tensor, "m n"]) -> None:
    """Systematic resampling inside each island."""
    islands, size = log_weight.shape
    # an island without a single finite weight keeps its particles, and its log Z of -inf counts it out
    safe = torch.where(log_weight.isfinite().any(1, keepdim=True), log_weight, 0.0)
    uniform = torch.rand(islands, generator=cloud.generator, dtype=torch.float64)
    rows = systematic_resample(safe, uniform) + size * torch.arange(islands)[:, None]
    cloud.chains = cloud.chains.take(rows.flatten())


def _exchange(cloud: _Cloud, log_z: Float[Tensor, " m"]) -> None:
    """Resample all particles by their islands' evidence, which makes the cloud an exact sample again in the limit."""
    size = len(cloud.chains.z) // cloud.islands
    uniform = torch.rand((), generator=cloud.generator, dtype=torch.float64)
    cloud.chains = cloud.chains.take(systematic_resample(log_z.repeat_interleave(size), uniform))


def _factor(u: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Cholesky factor of the cloud's covariance, shrunk towards the identity as d approaches n."""
    n, d = u.shape
    centred = u - u.mean(0)
    share = n / (n + d)
    covariance = share * (centred.T @ centred / n) + (1 - share) * torch.eye(d, dtype=u.dtype)
    return torch.linalg.cholesky(covariance)


def _first_step(u: Float[Tensor, "n d"]) -> float:
    """A step that whitened normals accept at about 0.8; it scales as d^-1/4."""
    return 1.2 * u.shape[1] ** -0.25


def _log_normal(u: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return -0.5 * (u**2).sum(1) - 0.5 * u.shape[1] * math.log(2 * math.pi)


def _islands(n: int) -> tuple[int, int]:
    """Number and size of the islands for at least n particles."""
    islands = min(ISLANDS, max(n // 8, 2))
    return islands, math.ceil(n / islands)


def _best_inflation(density: Density, start: GaussianFit, generator: torch.Generator, n: int = 512) -> float:
    """The widening of the Gaussian whose importance weights have the largest effective sample size."""
    u = torch.randn(n, density.dim, generator=generator, dtype=torch.float64)

    def ess(inflation: float) -> float:
        base = Affine(start.location, start.scale_tril * inflation)
        with torch.no_grad():
            log_weight = (density.log_prob(base.forward(u)) - _log_normal(u)).nan_to_num(nan=-torch.inf)
        return float(effective_sample_size(log_weight))

    return max(INFLATIONS, key=ess)


def _in_batches(density: Density) -> Density:
    """The same density, evaluated on so few rows at a time that they stay in the processor's cache."""
    from dataclasses import replace

    if density.predictive is None:
        return density
    rows = max(16, CACHE // max(len(density.predictive.observed), 1))
    return replace(
        density,
        log_prob=lambda z: torch.cat([density.log_prob(part) for part in z.split(rows)]),
        analytic_gradient=lambda z: torch.cat([density.gradient(part) for part in z.split(rows)]),
    )


def _refined(
    cloud: _Cloud,
    base: Affine,
    log_z: float | None,
    log_z_se: float | None,
    r_hat: float,
    ess: float,
    budget: Budget,
    particles: int,
) -> Refined:
    order = torch.randperm(len(cloud.chains.z), generator=cloud.generator)[:particles]
    z = base.forward(cloud.chains.z[order])
    log_prob = cloud.chains.log_prob[order] - base.log_det
    noise = 4 / math.sqrt(len(cloud.chains.z))
    forgotten = cloud.memory < max(budget.forgotten, noise)
    return Refined(
        draws=Draws(z, log_prob, note="equally weighted, after HMC moves"),
        log_z=log_z,
        log_z_se=log_z_se,
        r_hat=r_hat,
        ess=ess,
        memory=cloud.memory,
        acceptance=cloud.acceptance,
        divergences=cloud.divergences,
        temperatures=tuple(cloud.temperatures),
        moves=cloud.moves,
        gradients=cloud.gradients,
        converged=forgotten and r_hat < 1.01 + 2.0 * cloud.islands / len(cloud.chains.z),
        note="" if forgotten else f"the particles still remember their start ({cloud.memory:.2f})",
    )

"""From a fit to draws that pass as exact: tempered sequential Monte Carlo, or resampling and HMC moves.

Both end with a cloud of HMC chains on the target itself, which moves until it has forgotten where it came from and
stands still (`transitions.cloud`). Islands that never exchange particles tell how far the result can be trusted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.gaussian_vi import GaussianFit, gaussian_log_prob
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.whiten import Affine, whiten
from hsivi_cli.transitions.cloud import Agreement, Cloud, agreement, features, harvest, make_cloud, settle
from hsivi_cli.transitions.hmc import Chains
from hsivi_cli.transitions.tempering import (
    Evidence,
    GeometricPath,
    bridge_sampling,
    effective_sample_size,
    log_mean_exp,
    next_temperature,
    systematic_resample,
)

ISLANDS = 16
INFLATIONS = (1.0, 1.1, 1.25, 1.5, 2.0)  # of the Gaussian's sds, tried before a tempered run
CACHE = 500_000  # numbers a batch of evaluations may hold: particles times responses
BRIDGED = 4000  # draws that the evidence is bridged from
WORK = 200_000_000  # operations of one gradient of all particles that take a tenth of a second
TEMPERING, HARVEST = 0.5, 0.6  # shares of a run that are behind when the temperature is 1, when the first draws are had
MOVES_BETWEEN = 10  # most moves at a temperature on the way
REMEMBERED_LATER = 0.3  # what the slowest feature may keep from one state of the settled cloud to the next
REMEMBERED_BETWEEN = 0.5  # correlation with the start that is good enough on the way


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

    `log_z` with `log_z_se` is from bridge sampling between the draws and a Gaussian fitted to half of them (infinite
    error where they do not overlap). `smc_log_z` is the tempered run's own, or that of the weights, None without:
    consistent, but too low where the fit covers a fraction of the target.
    `r_hat` compares islands over all coordinates, their squares and the log density (below 1.01 is good, plus
    `r_hat_noise`, what chance alone adds); `ess` is the number of independent draws their agreement amounts to.
    `particles` is the number of chains. `memory` is the correlation with the start that was left, None if not measured,
    `divergences` counts trajectories. `converged` sums up; `note` says what is amiss.
    """

    draws: Draws
    log_z: float
    log_z_se: float
    smc_log_z: float | None
    smc_log_z_se: float | None
    r_hat: float
    ess: float
    memory: float | None
    acceptance: float
    divergences: int
    temperatures: tuple[float, ...]
    moves: int
    gradients: int
    particles: int
    converged: bool
    note: str = ""

    @property
    def r_hat_noise(self) -> float:
        """What R-hat exceeds 1 by through the finite size of the islands alone."""
        return 2.0 * min(ISLANDS, self.particles // 8) / self.particles


@dataclass(frozen=True)
class Progress:
    """How far a run is, after each move: `share` in 0 .. 1 is a rough guess, enough to estimate the time left.

    `temperature` ends at 1; `memory` falls to about 0.1 there; then `draws` of `wanted` are collected.
    """

    share: float
    temperature: float
    memory: float
    moves: int
    gradients: int
    draws: int
    wanted: int

    @property
    def line(self) -> str:
        """For people."""
        if self.temperature < 1.0:
            return f"temperature {self.temperature:.3f}"
        if not self.draws:
            return f"forgetting the start: correlation {self.memory:.2f}"
        return f"{min(self.draws, self.wanted)} of {self.wanted} draws"


OnProgress = Callable[[Progress], object]


@dataclass(frozen=True)
class _Settled:
    """What the last stage found."""

    states: list[Chains]
    agreement: Agreement
    quiet: bool


def tempered_smc(
    density: Density,
    start: GaussianFit,
    particles: int = 4000,
    seed: int = 0,
    budget: Budget | None = None,
    draws: int | None = None,
    on_progress: OnProgress | None = None,
) -> Refined:
    """Tempered SMC from the fitted Gaussian (widened where that helps) to `density`, with HMC moves.

    More `draws` than `particles` are had from later states of the settled cloud. Raises InputError for fewer than 32
    particles, RunError if no particle has a finite density.
    """
    budget = budget or Budget()
    _check_count(particles)
    generator = torch.Generator().manual_seed(seed)
    batched = _in_batches(density)
    base = Affine(start.location, start.scale_tril * _best_inflation(batched, start, generator))
    path = _path(base, batched)
    islands, size = _islands(particles)
    u = torch.randn(islands * size, density.dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        cloud = make_cloud(base.forward(u), islands, generator, base.scale)
        cloud.on_move = _reporter(on_progress, draws or particles, 0.0)
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
            if t < 1.0:
                settle(cloud, path.log_prob(t), path.gradient(t), REMEMBERED_BETWEEN, budget.gradients, MOVES_BETWEEN)
        settled = _finish(cloud, batched, budget, draws or particles, log_z)
    spread = (log_z - log_z.max()).exp()
    own = Evidence(float(log_mean_exp(log_z)), float(spread.std() / spread.mean() / math.sqrt(islands)))
    return _refined(cloud, settled, base, batched, own, draws or particles)


def refine(
    density: Density,
    fitted: Draws,
    seed: int = 0,
    budget: Budget | None = None,
    draws: int | None = None,
    on_progress: OnProgress | None = None,
) -> Refined:
    """Resample weighted draws (their `log_weight`; else `log_prob - log_approx`; else equal), then move them by HMC.

    As many draws come back as went in, or `draws`. Raises InputError for fewer than 32 draws, RunError if none has a
    finite weight.
    """
    budget = budget or Budget()
    n = len(fitted.z)
    _check_count(n)
    generator = torch.Generator().manual_seed(seed)
    batched = _in_batches(density)
    log_weight = _weights(fitted)
    islands, size = _islands(n)
    # islands of equal size: the last ones start some draws again where n is no multiple
    rows = torch.randperm(n, generator=generator)
    rows = torch.cat([rows, rows[: islands * size - n]]).reshape(islands, size)
    within = log_weight[rows]
    within = torch.where(within.isfinite().any(1, keepdim=True), within, log_weight.max())
    keep = systematic_resample(within, torch.rand(islands, generator=generator, dtype=torch.float64))
    z = fitted.z[rows.gather(1, keep).flatten()].double()
    spread = z.std(0)
    base = Affine(z.mean(0), torch.where(spread > 0, spread, torch.ones_like(spread)))
    with torch.no_grad():
        cloud = make_cloud(z, islands, generator, base.scale)
        cloud.on_move = _reporter(on_progress, draws or n, 1.0)
        settled = _finish(cloud, batched, budget, draws or n, None)
    own = None
    if fitted.log_weight is not None:
        ess = float(effective_sample_size(log_weight))
        own = Evidence(float(log_mean_exp(log_weight)), math.sqrt(max(1 / ess - 1 / n, 0.0)))
    return _refined(cloud, settled, base, batched, own, draws or n)


def _finish(cloud: Cloud, density: Density, budget: Budget, draws: int, log_z: Float[Tensor, " m"] | None) -> _Settled:
    """Settle on the target; islands that disagree are resampled by their evidence, and settle again."""
    quiet = settle(cloud, density.log_prob, density.gradient, budget.forgotten, budget.gradients)
    found = agreement([features(cloud)], cloud.islands)
    clouds = math.ceil(draws / len(cloud.chains.z))
    between = max(budget.forgotten, REMEMBERED_LATER)
    if not _agree(found, cloud) and log_z is not None:
        # the evidence makes a mixture of islands exact in the limit, but then they are no replicates any more
        uniform = torch.rand((), generator=cloud.generator, dtype=torch.float64)
        size = len(cloud.chains.z) // cloud.islands
        cloud.take(systematic_resample(log_z.repeat_interleave(size), uniform))
        settle(cloud, density.log_prob, density.gradient, budget.forgotten, budget.gradients // 4)
        return _Settled(
            harvest(cloud, density.log_prob, density.gradient, clouds, between, budget.gradients), found, quiet
        )
    states = harvest(cloud, density.log_prob, density.gradient, clouds, between, budget.gradients)
    return _Settled(states, agreement([features(cloud, state) for state in states], cloud.islands), quiet)


def _agree(found: Agreement, cloud: Cloud) -> bool:
    """R-hat below 1.01, and what the noise of small islands adds to it."""
    return found.r_hat < 1.01 + 2.0 * cloud.islands / len(cloud.chains.z)


def _refined(
    cloud: Cloud, settled: _Settled, base: Affine, density: Density, own: Evidence | None, draws: int
) -> Refined:
    every = torch.cat([state.z for state in settled.states])
    log_prob = torch.cat([state.log_prob for state in settled.states])
    evidence = evidence_of(every, log_prob, settled.agreement.ess, base, density, cloud.generator)
    order = torch.randperm(len(every), generator=cloud.generator)[:draws]
    notes = []
    if not settled.quiet:
        notes.append(f"the chains still remember their start (correlation {cloud.memory:.2f}): several modes, or slow")
    if not _agree(settled.agreement, cloud):
        notes.append(f"independent runs disagree (R-hat {settled.agreement.r_hat:.3f})")
    return Refined(
        draws=Draws(every[order], log_prob[order], note="equally weighted, after HMC moves"),
        log_z=evidence.log_z,
        log_z_se=evidence.log_z_se,
        smc_log_z=own.log_z if own else None,
        smc_log_z_se=own.log_z_se if own else None,
        r_hat=settled.agreement.r_hat,
        ess=settled.agreement.ess,
        memory=cloud.memory,
        acceptance=cloud.acceptance,
        divergences=cloud.divergences,
        temperatures=tuple(cloud.temperatures),
        moves=cloud.moves,
        gradients=cloud.gradients,
        particles=len(cloud.chains.z),
        converged=not notes,
        note="; ".join(notes),
    )


def evidence_of(
    z: Tensor, log_prob: Tensor, ess: float, base: Affine, density: Density, generator: torch.Generator
) -> Evidence:
    """Bridge sampling between one half of the draws and the Gaussian of the other half's moments, and vice versa."""
    white = whiten(density, base.location, base.scale)
    order = torch.randperm(len(z), generator=generator)[: max(BRIDGED, 4 * density.dim)]
    u, log_prob = base.inverse(z[order]), log_prob[order] + base.log_det
    n, d = u.shape
    ess = ess * n / len(z)
    found = []
    for here, there in ((slice(n // 2), slice(n // 2, n)), (slice(n // 2, n), slice(n // 2))):
        if n // 2 < 2 * d:
            return Evidence(math.nan, math.inf)
        location, covariance = u[here].mean(0), u[here].T.cov().reshape(d, d)
        scale_tril = torch.linalg.cholesky(covariance)
        fresh = location + torch.randn(n // 2, d, generator=generator, dtype=torch.float64) @ scale_tril.T
        with torch.no_grad():
            at_base = white.log_prob(fresh) - gaussian_log_prob(fresh, location, scale_tril)
        at_target = log_prob[there] - gaussian_log_prob(u[there], location, scale_tril)
        found.append(bridge_sampling(at_target, at_base.nan_to_num(nan=-torch.inf), max(ess / 2, 2.0)))
    log_z = sum(one.log_z for one in found) / 2
    # both halves' estimates use all draws, so they are taken as fully dependent
    return Evidence(log_z, sum(one.log_z_se for one in found) / 2)


def _weights(fitted: Draws) -> Float[Tensor, " n"]:
    if fitted.log_weight is not None:
        log_weight = fitted.log_weight.double()
    elif fitted.log_approx is not None:
        log_weight = fitted.log_prob.double() - fitted.log_approx.double()
    else:
        log_weight = torch.zeros(len(fitted.z), dtype=torch.float64)
    good = fitted.z.isfinite().all(1) & fitted.log_prob.isfinite() & log_weight.isfinite()
    if not bool(good.any()):
        raise RunError("no draw has a finite weight: there is nothing to refine")
    return torch.where(good, log_weight, -torch.inf)


def _resample(cloud: Cloud, log_weight: Float[Tensor, "m n"]) -> None:
    """Systematic resampling inside each island."""
    islands, size = log_weight.shape
    # an island without a single finite weight keeps its particles, and its log Z of -inf counts it out
    safe = torch.where(log_weight.isfinite().any(1, keepdim=True), log_weight, 0.0)
    uniform = torch.rand(islands, generator=cloud.generator, dtype=torch.float64)
    cloud.take((systematic_resample(safe, uniform) + size * torch.arange(islands)[:, None]).flatten())


def _path(base: Affine, density: Density) -> GeometricPath:
    """From the Gaussian to the density, in the density's own coordinates: the target pays for no change of them."""
    inverse = torch.linalg.solve_triangular(base.scale, torch.eye(density.dim, dtype=torch.float64), upper=False)
    precision = inverse.T @ inverse
    log_det = base.log_det
    return GeometricPath(
        lambda z: _log_normal((z - base.location) @ inverse.T) - log_det,
        density.log_prob,
        lambda z: (base.location - z) @ precision,
        density.gradient,
    )


def _reporter(on_progress: OnProgress | None, wanted: int, start: float) -> Callable[[Cloud], object] | None:
    """What turns a move into `Progress`; `start` is the temperature before the first one was chosen."""
    if on_progress is None:
        return None

    def report(cloud: Cloud) -> None:
        temperature = cloud.temperatures[-1] if cloud.temperatures else start
        draws = cloud.states * len(cloud.chains.z)
        share = TEMPERING * temperature if not draws else HARVEST + (1 - HARVEST) * min(1.0, draws / wanted)
        on_progress(Progress(share, temperature, cloud.memory, cloud.moves, cloud.gradients, draws, wanted))

    return report


def affordable_particles(density: Density, least: int = 1000, most: int = 4000) -> int:
    """Particles of a run that takes seconds where it can: fewer in many dimensions, or where the data are many.

    More draws come from later states of the cloud. Does not measure time, so that a seed always means the same.
    """
    work = (20 if density.analytic_gradient is not None else 80) * density.responses + 4 * density.dim**2
    return max(least, min(most, WORK // work))


def _log_normal(u: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    return -0.5 * (u**2).sum(1) - 0.5 * u.shape[1] * math.log(2 * math.pi)


def _islands(n: int) -> tuple[int, int]:
    """Number and size of the islands for at least n particles."""
    islands = min(ISLANDS, n // 8)
    return islands, math.ceil(n / islands)


def _check_count(n: int) -> None:
    if n < 32:
        raise InputError(f"refining needs at least 32 draws, not {n}: ask for more with --draws")


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
    if density.predictive is None:
        return density
    rows = max(16, CACHE // max(len(density.predictive.observed), 1))
    return replace(
        density,
        log_prob=lambda z: torch.cat([density.log_prob(part) for part in z.split(rows)]),
        analytic_gradient=lambda z: torch.cat([density.gradient(part) for part in z.split(rows)]),
    )

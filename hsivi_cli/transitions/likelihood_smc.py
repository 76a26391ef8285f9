"""Likelihood-tempered sequential Monte Carlo, many samplers as one tensor program: posterior draws and evidences.

Targets `gamma_t(z) = p(z) p(x | z)^tau_t` with `0 = tau_0 < ... < tau_T = 1` (Del Moral, Doucet, Jasra 2006; Chopin and
Papaspiliopoulos 2020, algorithm 17.1). With `Zhat` the evidence and `w_k` the normalised weights of a run,
`E[Zhat sum_k w_k f(z_k)] = p(x) E[f | x]` for any number of particles, if temperatures and moves are fixed beforehand
(`freeze`); settings that adapt to the particles leave a bias of order 1/K.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.transitions.particle_moves import (
    Kernel,
    Moves,
    Particles,
    PriorLikelihood,
    SamplerNoise,
    covariance_of,
    evaluate,
    factor_of,
    first_step,
    move_clouds,
)
from hsivi_cli.transitions.tempering import (
    effective_sample_size,
    multinomial_resample,
    next_temperatures,
    stratified_resample,
    systematic_resample,
)

STAGES_MOST = 1000  # then straight to the posterior: the weights stay right, if uneven
AT_SHARE = 1.01  # an effective sample size this close above the share is taken for the share


@dataclass(frozen=True)
class SmcConfig:
    """How a sampler runs; plain JSON fields.

    `particles` K; `moves` of `kernel` a stage, of `leapfrogs` steps each for HMC. `order` "A" moves toward the old
    target and then weights, so that the last weights come after the last move; "B" weights, then moves toward the new
    target. "published" moves toward the new target and weights where it has arrived, as the code of SMC-Wake's authors
    does: wrong, for comparison only. Resampling where the effective sample size is at most `ess_share` K, which is also
    what a temperature step leaves of it. `schedule` holds temperatures, ascending from above 0 to exactly 1, for every
    sampler; None adapts them to each. Raises InputError for values without sense.
    """

    particles: int = 1000
    kernel: Kernel = "hmc"
    moves: int = 3
    leapfrogs: int = 2
    order: Literal["A", "B", "published"] = "B"
    resampling: Literal["systematic", "stratified", "multinomial"] = "systematic"
    ess_share: float = 0.5
    schedule: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.particles < 2 or self.moves < 0 or self.leapfrogs < 1:
            raise InputError("sequential Monte Carlo needs two particles, no fewer than 0 moves, and 1 leapfrog step")
        if not 0 < self.ess_share < 1:
            raise InputError(f"the share of the effective sample size lies between 0 and 1, not {self.ess_share}")
        if self.schedule is not None:
            steps = zip((0.0, *self.schedule), self.schedule, strict=False)
            if not self.schedule or self.schedule[-1] != 1 or any(b <= a for a, b in steps):
                raise InputError("a schedule of temperatures ascends from above 0 to exactly 1")


@dataclass(frozen=True)
class Settings:
    """Everything a sampler adapts, fixed: temperatures (b, t), steps (b, t) and covariances (b, t, d, d) of stages.

    Rows that end early are filled up with temperatures of 1. One row serves any number of samplers.
    """

    temperatures: Float[Tensor, "b t"]
    step: Float[Tensor, "b t"]
    covariance: Float[Tensor, "b t d d"]

    def take(self, rows: Int[Tensor, " r"]) -> "Settings":
        """The settings of these samplers."""
        return Settings(self.temperatures[rows], self.step[rows], self.covariance[rows])


@dataclass(frozen=True)
class SmcRun:
    """Weighted particles of every sampler and its evidence.

    `log_weight` is normalised; `log_z` is -inf where no prior draw has a positive likelihood (then the particles are
    these draws, equally weighted). The rest is a record of the `stages` (b,) of each sampler: temperatures with the 0
    in front, filled up with 1; the effective sample size after weighting, mean acceptance, step size at the end and
    covariance, filled up with NaN. `evaluations` counts those of a particle's likelihood, over all samplers.
    """

    z: Float[Tensor, "b k d"]
    log_weight: Float[Tensor, "b k"]
    log_prior: Float[Tensor, "b k"]
    log_likelihood: Float[Tensor, "b k"]
    log_z: Float[Tensor, " b"]
    stages: Int[Tensor, " b"]
    temperatures: Float[Tensor, "b t1"]
    ess: Float[Tensor, "b t"]
    acceptance: Float[Tensor, "b t"]
    step: Float[Tensor, "b t"]
    covariance: Float[Tensor, "b t d d"]
    evaluations: int

    @property
    def least_ess(self) -> Float[Tensor, " b"]:
        """Each sampler's smallest effective sample size on its way, 0 without evidence.

        Below ten or so, next to none of the prior's draws was possible: do not trust draws and evidence.
        """
        return torch.where(self.log_z > -math.inf, self.ess.nan_to_num(nan=math.inf).amin(1), 0.0)


def freeze(run: SmcRun) -> Settings:
    """The temperatures and moves that a pilot run came to, one row a sampler (a single row serves any number)."""
    return Settings(run.temperatures[:, 1:], run.step.nan_to_num(nan=0.0), run.covariance.nan_to_num(nan=0.0))


def run_smc(
    target: PriorLikelihood,
    samplers: int,
    config: SmcConfig,
    generator: torch.Generator,
    settings: Settings | None = None,
) -> SmcRun:
    """Run `samplers` independent samplers, row i of `target` being sampler i's, from the prior to the posterior.

    `settings` of an earlier run (`freeze`) fix temperatures and moves, which makes the evidences exactly unbiased.
    Sampler i draws its random numbers from a source of its own, seeded by the i-th number of `generator`, and its
    result depends on other samplers by rounding alone. Nothing carries gradients. Raises InputError if the model
    returns wrong shapes.
    """
    now = _start(target, samplers, config, generator, settings)
    record = _Record(now.particles)
    with torch.no_grad():
        while record.unfinished:
            acceptance = torch.full_like(now.step, math.nan)
            if config.order == "A":
                if now.stage:  # draws from the prior need no move
                    _resample(now, config)
                    acceptance = _move(now, now.temperature, config)
                ess = _reweight(now, _next(now, config))
            elif config.order == "B":
                ess = _reweight(now, _next(now, config))
                _resample(now, config)
                acceptance = _move(now, now.temperature, config)
            else:
                _resample(now, config)
                to = _next(now, config)
                acceptance = _move(now, to, config)
                ess = _reweight(now, to)
            now.stage += 1
            record.keep(now, ess, acceptance)
    return record.run(now.evaluations)


@dataclass
class _Samplers:
    """The samplers that still run: their indices, clouds, normalised weights, evidences, and what they have adapted."""

    index: Int[Tensor, " b"]
    target: PriorLikelihood
    noise: SamplerNoise
    particles: Particles
    log_weight: Float[Tensor, "b k"]
    log_z: Float[Tensor, " b"]
    temperature: Float[Tensor, " b"]
    step: Float[Tensor, " b"]
    covariance: Float[Tensor, "b d d"]
    fixed: Settings | None
    stage: int = 0
    evaluations: int = 0

    def take(self, rows: Int[Tensor, " r"]) -> None:
        """Keep these, in place."""
        assert self.target.take is not None
        self.target = self.target.take(rows)
        self.noise.take(rows)
        self.particles = self.particles.take(rows)
        self.fixed = None if self.fixed is None else self.fixed.take(rows)
        for name in ("index", "log_weight", "log_z", "temperature", "step", "covariance"):
            setattr(self, name, getattr(self, name)[rows])


def _start(
    target: PriorLikelihood,
    samplers: int,
    config: SmcConfig,
    generator: torch.Generator,
    settings: Settings | None,
) -> _Samplers:
    k, d = config.particles, target.dim
    noise = SamplerNoise(torch.randint(2**63 - 1, (samplers,), generator=generator))
    index = torch.arange(samplers)
    if settings is not None and len(settings.step) == 1:
        settings = settings.take(torch.zeros_like(index))
    z = torch.stack([target.sample_prior(k, source).detach().double() for source in noise.generators()])
    if z.shape != (samplers, k, d):
        raise InputError(f"the prior's draws have shape {tuple(z.shape[1:])}: {k} of {d} numbers should be {(k, d)}")
    particles = evaluate(target, z)
    for name, found in (("prior", particles.log_prior), ("likelihood", particles.log_likelihood)):
        if found.shape != (samplers, k):
            raise InputError(f"the log {name} has shape {tuple(found.shape)} for {samplers} observations x {k} points")
    log_weight = z.new_full((samplers, k), -math.log(k))
    step = z.new_full((samplers,), first_step(config.kernel, d, config.leapfrogs))
    zero = z.new_zeros(samplers)
    covariance = covariance_of(z, log_weight)
    return _Samplers(
        index, target, noise, particles, log_weight, zero, zero, step, covariance, settings, evaluations=samplers * k
    )


def _next(now: _Samplers, config: SmcConfig) -> Float[Tensor, " b"]:
    """Every sampler's next temperature."""
    if now.fixed is not None:
        return now.fixed.temperatures[:, now.stage]
    if config.schedule is not None:
        return torch.full_like(now.temperature, config.schedule[now.stage])
    if now.stage >= STAGES_MOST:
        return torch.ones_like(now.temperature)
    return next_temperatures(now.particles.log_likelihood, now.temperature, config.ess_share, now.log_weight)


def _reweight(now: _Samplers, to: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Weight for the next temperature, in place; returns the effective sample size that is left.

    The evidence grows by the sum of the normalised carried weights times the increments, whether or not there has been
    a resampling. Samplers without a living particle have evidence 0 and keep what they have, equally weighted.
    """
    gained = (to - now.temperature)[:, None] * now.particles.log_likelihood
    grown = now.log_weight + torch.where(now.particles.log_likelihood > -math.inf, gained, -math.inf)
    total = grown.logsumexp(1)
    now.log_z = now.log_z + total
    alive = (total > -math.inf)[:, None]
    now.log_weight = torch.where(alive, grown - total[:, None], -math.log(grown.shape[1]))
    now.temperature = to
    return effective_sample_size(now.log_weight)


def _resample(now: _Samplers, config: SmcConfig) -> None:
    """Measure the clouds, then resample those whose effective sample size is low, in place."""
    k = config.particles
    if now.fixed is None:
        now.covariance = covariance_of(now.particles.z, now.log_weight, now.covariance)
    low = effective_sample_size(now.log_weight) <= AT_SHARE * config.ess_share * k
    if config.resampling == "systematic":
        index = systematic_resample(now.log_weight, now.noise.uniform())
    elif config.resampling == "stratified":
        index = stratified_resample(now.log_weight, now.noise.uniform(k))
    else:
        index = multinomial_resample(now.log_weight, now.noise.uniform(k))
    now.particles = now.particles.gather(torch.where(low[:, None], index, torch.arange(k)))
    now.log_weight = torch.where(low[:, None], -math.log(k), now.log_weight)


def _move(now: _Samplers, temperature: Float[Tensor, " b"], config: SmcConfig) -> Float[Tensor, " b"]:
    """Move the clouds toward their posteriors at `temperature`, in place; returns the mean acceptance."""
    adapt = now.fixed is None
    if now.fixed is not None:
        now.step, now.covariance = now.fixed.step[:, now.stage], now.fixed.covariance[:, now.stage]
    moves = Moves(config.kernel, config.moves, config.leapfrogs, now.step, factor_of(now.covariance), adapt)
    moved = move_clouds(now.particles, now.log_weight, now.target, temperature, moves, now.noise)
    now.particles, now.step = moved.particles, moved.step
    now.evaluations += moved.evaluations * now.log_weight.numel()
    return moved.acceptance


class _Record:
    """What finished samplers have come to, and the history of all."""

    def __init__(self, start: Particles) -> None:
        b, _ = start.log_prior.shape
        self._z = torch.empty_like(start.z)
        self._log_weight, self._log_prior, self._log_likelihood = (torch.empty_like(start.log_prior) for _ in range(3))
        self._log_z = start.z.new_empty(b)
        self._stages = torch.zeros(b, dtype=torch.int64)
        self._history: dict[str, list[Tensor]] = {
            name: [] for name in ("temperature", "ess", "acceptance", "step", "covariance")
        }

    @property
    def unfinished(self) -> bool:
        """Whether any sampler has not reached temperature 1."""
        return bool((self._stages == 0).any())

    def keep(self, now: _Samplers, ess: Float[Tensor, " b"], acceptance: Float[Tensor, " b"]) -> None:
        """Write down a stage of the running samplers; those at temperature 1 have finished, and leave."""
        running = self._stages[now.index] == 0  # where the target cannot drop samplers, the finished idle along
        rows = now.index[running]
        stage = {"temperature": now.temperature, "ess": ess, "acceptance": acceptance}
        for name, values in (stage | {"step": now.step, "covariance": now.covariance}).items():
            whole = values.new_full((len(self._stages), *values.shape[1:]), 1.0 if name == "temperature" else math.nan)
            whole[rows] = values[running]
            self._history[name].append(whole)
        done = running & (now.temperature == 1)
        rows = now.index[done]
        self._stages[rows] = now.stage
        self._z[rows], self._log_weight[rows], self._log_z[rows] = (
            now.particles.z[done],
            now.log_weight[done],
            now.log_z[done],
        )
        self._log_prior[rows] = now.particles.log_prior[done]
        self._log_likelihood[rows] = now.particles.log_likelihood[done]
        if now.target.take is not None and bool(done.any()) and self.unfinished:
            now.take((~done).nonzero()[:, 0])

    def run(self, evaluations: int) -> SmcRun:
        """All of it."""
        history = {name: torch.stack(values, 1) for name, values in self._history.items()}
        temperatures = torch.nn.functional.pad(history["temperature"], (1, 0))
        # ties are possible where a sampler has finished, and nowhere else
        assert bool(((temperatures.diff(dim=1) > 0) | (temperatures[:, :-1] == 1)).all())
        assert bool((temperatures[:, -1] == 1).all())
        return SmcRun(
            self._z,
            self._log_weight,
            self._log_prior,
            self._log_likelihood,
            self._log_z,
            self._stages,
            temperatures,
            history["ess"],
            history["acceptance"],
            history["step"],
            history["covariance"],
            evaluations,
        )

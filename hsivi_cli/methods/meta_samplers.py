"""The particles that SMC-Wake trains on: for every observation the SMC runs so far, growing, ageing, within a bound.

What is kept of a run depends on the estimator (`objectives.smc_wake`): (a) all particles, (b) `retained` draws, (c) the
newest run's particles and all evidences, naive the newest run, PIMH the run that its chain has accepted. Particles are
kept in float32, for the network; weights and evidences in float64.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.objectives.smc_wake import (
    all_runs_loss,
    newest_run_loss,
    pimh_accepts,
    self_normalised_loss,
)
from hsivi_cli.transitions.likelihood_smc import Settings, SmcConfig, SmcRun, run_smc
from hsivi_cli.transitions.particle_moves import PriorLikelihood
from hsivi_cli.transitions.tempering import stratified_resample

Estimator = Literal["a", "b", "c", "naive", "pimh"]
RATIO_MOST = 100.0  # of an evidence to the mean evidence, in (c): its tail is heavy (Adam's memory is of 1000 steps)


@dataclass(frozen=True)
class StoreConfig:
    """What is kept and when it is renewed; plain JSON fields.

    `retained` draws a run for (b). Every `refresh_every` steps (0: never) `refresh_count` observations, drawn at
    random, get a new run. Runs older than `window` steps are forgotten, but for the newest (None: never): for models
    that are trained themselves, whose old evidences are those of another model. `memory` bounds the bytes of all that
    is kept; beyond it an observation's oldest run makes room. Growing takes the old size once more for a moment.
    """

    estimator: Estimator = "b"
    retained: int = 10
    refresh_every: int = 10
    refresh_count: int = 1
    window: int | None = None
    memory: int = 2**30


@dataclass(frozen=True)
class Minibatch:
    """Particles `z` (n, m, k, d) in float32 of m runs an observation, their weights, normalised over k, and evidences.

    Runs that are not there have a `log_z` of -inf; where an observation has no evidence at all, `log_weight` is -inf
    too. `log_mean_z` is the mean evidence of all runs so far.
    """

    z: Float[Tensor, "n m k d"]
    log_weight: Float[Tensor, "n m k"]
    log_z: Float[Tensor, "n m"]
    log_mean_z: Float[Tensor, " n"]


@dataclass
class MetaSamplers:
    """The runs of n observations; slot j of a row is its run number j, modulo the most that are kept.

    `edges` (n, slots, k) are the cumulative weights of a run, None where they are equal. `born` is the step a run was
    made in, -1 for none. `written` counts runs, `accepted` those that PIMH took.
    """

    config: StoreConfig
    slots_most: int
    z: Float[Tensor, "n slots k d"]
    edges: Float[Tensor, "n slots k"] | None
    log_z: Float[Tensor, "n runs"]
    born: Int[Tensor, "n runs"]
    written: Int[Tensor, " n"]
    accepted: Int[Tensor, " n"]

    @property
    def observations(self) -> int:
        """How many observations have samplers."""
        return len(self.written)

    @property
    def bytes(self) -> int:
        """What the store takes at the moment."""
        kept = [self.z, self.log_z, self.born, self.written, self.accepted]
        return sum(t.numel() * t.element_size() for t in (*kept, *([] if self.edges is None else [self.edges])))


def make_store(config: StoreConfig, observations: int, particles: int, dim: int) -> MetaSamplers:
    """An empty store. Raises InputError if a single run of every observation is more than `config.memory`."""
    kept = config.retained if config.estimator == "b" else particles
    run = kept * (4 * dim + (0 if config.estimator == "b" else 8))
    fixed, growing = (run, 16) if config.estimator == "c" else (0, run + 16)
    room = config.memory - observations * (fixed + 16)
    most = room // (observations * growing)
    if most < 1:
        least = observations * (fixed + growing + 16) / 2**20
        raise InputError(
            f"one run of {particles} particles for each of {observations} observations takes {least:.1f} MiB, more "
            f"than the {config.memory / 2**20:.1f} MiB allowed: take fewer particles"
        )
    most = 1 if config.estimator in ("naive", "pimh") else most
    edges = None if config.estimator == "b" else torch.ones(observations, 1, kept, dtype=torch.float64)
    return MetaSamplers(
        config,
        most,
        torch.zeros(observations, 1, kept, dim),
        edges,
        torch.full((observations, 1), -math.inf, dtype=torch.float64),
        torch.full((observations, 1), -1),
        torch.zeros(observations, dtype=torch.int64),
        torch.zeros(observations, dtype=torch.int64),
    )


def begin(
    store: MetaSamplers, target: PriorLikelihood, smc: SmcConfig, generator: torch.Generator, runs: int = 1
) -> None:
    """Give every observation its first runs, in place."""
    for _ in range(runs):
        run = run_smc(target, store.observations, smc, generator)
        append(store, torch.arange(store.observations), run, 0, generator)


def advance(
    store: MetaSamplers,
    target: PriorLikelihood,
    smc: SmcConfig,
    step: int,
    generator: torch.Generator,
    settings: Settings | None = None,
) -> Int[Tensor, " r"]:
    """What training step `step` (from 1) owes the store, in place: forget what is too old, refresh what is due.

    Returns the observations that got a new run. `target` needs its `take`; row i of `settings` is observation i's.
    """
    forget(store, step)
    every = store.config.refresh_every
    if not every or step % every:
        return torch.zeros(0, dtype=torch.int64)
    rows = torch.randperm(store.observations, generator=generator)[: store.config.refresh_count]
    if target.take is None:
        raise ValueError("a target without take() cannot be refreshed observation by observation")
    fixed = settings.take(rows) if settings is not None and len(settings.step) > 1 else settings
    append(store, rows, run_smc(target.take(rows), len(rows), smc, generator, fixed), step, generator)
    return rows


def append(store: MetaSamplers, rows: Int[Tensor, " r"], run: SmcRun, step: int, generator: torch.Generator) -> None:
    """Keep sampler i of `run` as the newest run of observation `rows[i]`, all different, in place."""
    estimator = store.config.estimator
    keep = torch.ones(len(rows), dtype=torch.bool)
    if estimator == "pimh":
        uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        keep = pimh_accepts(store.log_z[rows, 0], run.log_z, uniform)
        store.accepted[rows] += keep
    if estimator == "b":
        uniform = torch.rand(len(rows), store.config.retained, generator=generator, dtype=torch.float64)
        index = stratified_resample(run.log_weight, uniform)
        z = run.z.gather(1, index[..., None].expand(-1, -1, run.z.shape[2]))
    else:
        z = run.z
    slot = store.written[rows] % store.slots_most
    store.written[rows] += 1
    _grow(store, int(slot.max()) + 1)
    rows, slot = rows[keep], slot[keep]
    store.log_z[rows, slot], store.born[rows, slot] = run.log_z[keep], step
    place = torch.zeros_like(slot) if estimator == "c" else slot
    store.z[rows, place] = z[keep].float()
    if store.edges is not None:
        edges = run.log_weight[keep].exp().cumsum(1)
        store.edges[rows, place] = edges / edges[:, -1:]


def forget(store: MetaSamplers, step: int) -> None:
    """Drop the runs older than the window, in place; an observation's newest always stays."""
    if store.config.window is None:
        return
    old = (store.born >= 0) & (store.born < step - store.config.window)
    newest = (store.written - 1).clamp_min(0) % store.slots_most
    old[torch.arange(store.observations), newest] = False
    store.log_z[old], store.born[old] = -math.inf, -1


def minibatch(
    store: MetaSamplers, rows: Int[Tensor, " n"], generator: torch.Generator | None = None, draws: int | None = None
) -> Minibatch:
    """The particles of these observations; `draws` of them, drawn in proportion to their part in the estimator.

    Drawing leaves the gradient what it is on average, and bounds the cost of a step: they come as a single run of equal
    weights. They are stratified over all runs and particles.
    """
    runs = max(1, min(int(store.written[rows].max()), store.log_z.shape[1]))  # what is beyond is empty
    log_z, born = store.log_z[rows, :runs], store.born[rows, :runs]
    count = (born >= 0).sum(1)
    log_mean_z = log_z.logsumexp(1) - count.double().log()
    slots = min(runs, store.z.shape[1])
    if store.config.estimator == "c":
        log_z = log_z.gather(1, ((store.written[rows] - 1) % store.slots_most)[:, None])
    nothing = (log_z.logsumexp(1) == -math.inf)[:, None, None]
    if draws is None:
        z = store.z[rows, :slots]
        weight = torch.full(z.shape[:3], 1 / z.shape[2], dtype=torch.float64)
        if store.edges is not None:
            weight = store.edges[rows, :slots].diff(dim=2, prepend=store.edges.new_zeros(len(rows), slots, 1))
        return Minibatch(z, torch.where(nothing, -math.inf, weight.log()), log_z, log_mean_z)
    # one number says which run, and by where it falls within the run's stretch which particle
    share = torch.where(nothing[..., 0], 0.0, log_z).softmax(1).cumsum(1)
    share = share / share[:, -1:]
    uniform = torch.rand(len(rows), draws, generator=generator, dtype=torch.float64)
    position = ((torch.arange(draws) + uniform) / draws).clamp_max(math.nextafter(1.0, 0.0))
    run = torch.searchsorted(share, position, right=True)
    stretch = torch.nn.functional.pad(share, (1, 0))
    low, high = stretch.gather(1, run), stretch.gather(1, run + 1)
    particle = _within(store, rows[:, None], run, (position - low) / (high - low))
    z = store.z[rows[:, None], run, particle][:, None]
    log_weight = torch.where(nothing, -math.inf, torch.full(z.shape[:3], -math.log(draws), dtype=torch.float64))
    total = (
        log_z if store.config.estimator == "c" else torch.where(nothing[..., 0], -math.inf, torch.zeros(len(rows), 1))
    )
    return Minibatch(z, log_weight, total.double(), log_mean_z)


def estimator_loss(estimator: Estimator, log_q: Float[Tensor, "n m k"], batch: Minibatch) -> Float[Tensor, ""]:
    """The estimator's loss from `log q` at `batch.z`."""
    if estimator in ("a", "b"):
        return all_runs_loss(log_q, batch.log_weight, batch.log_z)
    one = log_q[:, 0], batch.log_weight[:, 0]
    if estimator == "c":
        return newest_run_loss(*one, batch.log_z[:, 0], batch.log_mean_z, RATIO_MOST)
    return self_normalised_loss(*one)


def state_dict(store: MetaSamplers) -> dict[str, Any]:
    """Everything a resumed run needs; the config is the run's own."""
    tree = {name: getattr(store, name) for name in ("z", "log_z", "born", "written", "accepted")}
    return tree | ({} if store.edges is None else {"edges": store.edges})


def load_state_dict(store: MetaSamplers, tree: dict[str, Any]) -> None:
    """Restore what `state_dict` returned, in place; the store must have been made with the same arguments."""
    for name, value in tree.items():
        setattr(store, name, value.clone())


def _grow(store: MetaSamplers, needed: int) -> None:
    """Room for `needed` runs: twice as much each time, up to the most that are kept."""
    have = store.log_z.shape[1]
    if needed <= have:
        return
    more = min(max(2 * have, needed), store.slots_most) - have
    pad = torch.nn.functional.pad
    store.log_z, store.born = pad(store.log_z, (0, more), value=-math.inf), pad(store.born, (0, more), value=-1)
    if store.config.estimator != "c":
        store.z = pad(store.z, (0, 0, 0, 0, 0, more))
        store.edges = None if store.edges is None else pad(store.edges, (0, 0, 0, more), value=1.0)


def _within(
    store: MetaSamplers, rows: Int[Tensor, "n 1"], run: Int[Tensor, "n s"], position: Float[Tensor, "n s"]
) -> Int[Tensor, "n s"]:
    """Whose stretch of its run's cumulative weights each position in [0, 1) falls into, by bisection.

    The weights of whole runs need not be copied for that.
    """
    last = store.z.shape[2] - 1
    if store.edges is None:
        return (position * (last + 1)).long().clamp_max(last)
    low, high = torch.zeros_like(run), torch.full_like(run, last)
    for _ in range(last.bit_length()):
        middle = (low + high) // 2
        beyond = store.edges[rows, run, middle] <= position
        low, high = torch.where(beyond, middle + 1, low).clamp_max(last), torch.where(beyond, high, middle)
    return low

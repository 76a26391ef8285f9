"""One encoder q(z | x) for many observations, trained toward the inclusive KL, with the baselines in the same harness.

SMC-Wake (McNamara, Loper, Regier 2024, arXiv 2403.10610): every observation has tempered SMC samplers of its own, which
never see q, and q learns from their weighted particles. `method` "npe" learns from simulated pairs, "wake" and
"defensive-wake" from q's own weighted draws, "msc" from particles retained by a chain. Where the model simulates,
SMC-Wake takes a share of its gradient (`sleep`) from simulated pairs too, so that q knows observations between the
given ones; both parts have the same optimum. With a `sleep` of 0 it is the paper's.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.engine.flat_adam import FlatAdam, flatten
from hsivi_cli.engine.optimisation import LearningRate, update_ema
from hsivi_cli.engine.seeds import NoiseStreams, Stream
from hsivi_cli.engine.seeds import generator as named_generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import meta_samplers
from hsivi_cli.methods.meta_samplers import Estimator, MetaSamplers, StoreConfig
from hsivi_cli.networks.posterior_encoder import Encoder, EncoderConfig, build_encoder
from hsivi_cli.objectives.smc_wake import climbing_choice, defensive_wake_loss, sleep_loss, wake_loss
from hsivi_cli.targets.amortised import AmortisedTarget, Simulations, simulate_pairs
from hsivi_cli.transitions.likelihood_smc import SmcConfig, run_smc
from hsivi_cli.transitions.particle_moves import Kernel, PriorLikelihood, given_observations

AMORTISED = ("smc-wake", "npe", "wake", "defensive-wake", "msc")
POOL_STEPS = 50  # fresh simulations are made for so many steps at once
HELD_OUT, VALIDATE_EVERY = 0.1, 20  # of a fixed budget of simulations; steps between looks at it
AVERAGING = 0.99  # of the weights, where simulations are few enough to be learned by heart
SCALE_DRAWS = 5000  # prior draws that scales are found from
MORE_RUNS = 10  # for an observation that no draw of the first runs explains
CLIP = 10.0  # of the gradient's norm
SKIPPED_MOST = 50  # steps in a row whose gradient is not finite
COUNTED = ("step", "best_loss", "held_out", "simulated", "lost", "pool_index", "skipped")
WORST = 1e9  # what is logged for a loss that is infinite


@dataclass(frozen=True)
class Config:
    """Plain JSON fields. A step sees `batch` observations with `draws` particles each, and `pairs` simulated pairs.

    `sleep` is the share of simulated pairs in SMC-Wake's gradient; `simulations` fixes their number (0: new ones all
    the time), a tenth being held out to stop by. Each observation begins with `runs` SMC runs of `particles`; every
    `refresh_every` steps `refresh_count` observations get a new one, within `memory` bytes. `wake` methods draw
    `draws` particles from q. `shape` is that of an observation, None for a vector.
    """

    method: Literal["smc-wake", "npe", "wake", "defensive-wake", "msc"] = "smc-wake"
    estimator: Estimator = "a"
    steps: int = 3000
    seed: int = 0
    lr: float = 1e-2
    batch: int = 32
    draws: int = 16
    pairs: int = 512
    sleep: float = 0.0
    simulations: int = 0
    runs: int = 1
    particles: int = 500
    kernel: Kernel = "hmc"
    moves: int = 5
    refresh_every: int = 100
    refresh_count: int = 10
    memory: int = 2**29
    shape: tuple[int, ...] | None = None
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(hidden=(128, 128)))

    @property
    def simulates(self) -> bool:
        """Whether training needs the model's simulator."""
        return self.method == "npe" or (self.method == "smc-wake" and self.sleep > 0)


@dataclass
class State:
    """A run. `store` holds the SMC runs, `retained` (B, d) the particles of MSC's chains, None where not used.

    With a fixed budget of simulations, `average` is the moving average of the encoder (one vector), `best` the one with
    the lowest `best_loss` on held-out simulations, `held_out` the loss seen last. `simulated` and `lost` count
    simulations and those that were not finite, `skipped` the last steps without a finite gradient.
    """

    step: int
    target: AmortisedTarget
    config: Config
    encoder: Encoder
    optimiser: FlatAdam
    store: MetaSamplers | None
    retained: Float[Tensor, "B d"] | None
    average: Float[Tensor, " p"] | None = None
    best: Float[Tensor, " p"] | None = None
    best_loss: float = math.inf
    held_out: float = 0.0
    simulated: int = 0
    lost: int = 0
    pool: Simulations | None = None
    pool_index: int = -1
    skipped: int = 0


def init(target: AmortisedTarget, config: Config) -> State:
    """A fresh state; samplers run and scales are found in the first step.

    Raises InputError where the model lacks what the method needs, or shape and observations do not fit.
    """
    if target.sample_prior is None:
        raise InputError(f"{target.name}: --amortize needs sample_prior=... in the model")
    if config.simulates and target.simulate is None:
        raise InputError(f"{target.name}: {_named(config)} learns from simulations, and the model has no simulate=...")
    if not len(target.observed) and config.method != "npe":
        raise InputError(f"{target.name}: --method {config.method} learns from observations, and there are none")
    width = target.observed.shape[1]
    shape = config.shape or (width,)
    if math.prod(shape) != width:
        raise InputError(f"--shape {'x'.join(map(str, shape))} is not that of observations of {width} numbers")
    encoder = build_encoder(config.encoder, target.dim, shape, seed=config.seed)
    optimiser = FlatAdam([(list(encoder.parameters()), 1.0)])
    store = retained = None
    if config.method == "smc-wake":
        keep = StoreConfig(
            config.estimator,
            refresh_every=config.refresh_every,
            refresh_count=config.refresh_count,
            memory=config.memory,
        )
        store = meta_samplers.make_store(keep, len(target.observed), config.particles, target.dim)
    if config.method == "msc":
        retained = torch.zeros(len(target.observed), target.dim, dtype=torch.float64)
    return State(0, target, config, encoder, optimiser, store, retained)


def step(state: State, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """One Adam step, in place; none where the gradient is not finite.

    Raises InputError in the first for an observation that no prior draw can explain, RunError after 50 steps in a row
    without a finite gradient.
    """
    config = state.config
    state.step += 1
    if state.step == 1:
        _begin(state, generator)
    elif state.store is not None:
        meta_samplers.advance(state.store, samplers_of(state.target), _smc(config), state.step, generator)
    losses: dict[str, Tensor] = {}
    if config.method != "npe":
        losses["cross_entropy"] = _observed_loss(state, generator)
    if config.simulates:
        losses["simulated_cross_entropy"] = _simulated_loss(state, generator)
    share = {"cross_entropy": 1 - config.sleep, "simulated_cross_entropy": config.sleep} if len(losses) > 1 else {}
    loss = torch.stack([share.get(name, 1.0) * value for name, value in losses.items()]).sum()
    gradient = flatten(torch.autograd.grad(-loss, list(state.encoder.parameters())))
    if bool(gradient.isfinite().all()):
        rate = LearningRate(config.lr, 1, "cosine").at(min(state.step, config.steps), config.steps)
        state.optimiser.ascend(gradient * min(1.0, CLIP / (float(gradient.norm()) + 1e-300)), rate)
        state.skipped = 0
    else:
        state.skipped += 1
        if state.skipped >= SKIPPED_MOST:
            raise RunError(f"diverged: no gradient was finite for {state.skipped} steps: use a lower --lr")
    metrics = {name: _shown(float(value.detach())) for name, value in losses.items()}
    if config.simulates and config.simulations:
        if state.average is None:
            state.average = state.optimiser.vector.clone()
        update_ema([state.average], [state.optimiser.vector], state.step, AVERAGING)
        _validate(state)
        metrics["held_out"] = state.held_out
    return metrics


def samplers_of(target: AmortisedTarget, x: Float[Tensor, "b N"] | None = None) -> PriorLikelihood:
    """One sampler an observation, of `x` or the given ones."""
    assert target.sample_prior is not None
    observed = target.observed if x is None else x
    return given_observations(target.dim, target.sample_prior, target.log_prior, target.log_likelihood, observed)


@torch.no_grad()
def sample(state: State, noise: NoiseStreams) -> Float[Tensor, "B n d"]:
    """One draw a noise stream of the posterior of every given observation, unconstrained."""
    streams = noise.draw((state.encoder.noise_dim,)).double()
    return state.encoder.sample(streams.expand(len(state.target.observed), -1, -1), state.target.observed)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON; simulations are made again from their seed."""
    tree: dict[str, Any] = {name: getattr(state, name) for name in COUNTED}
    tree["best_loss"] = None if math.isinf(state.best_loss) else state.best_loss
    tree |= {"encoder": dict(state.encoder.state_dict()), "optimiser": state.optimiser.state_dict()}
    tree |= {} if state.store is None else {"store": meta_samplers.state_dict(state.store)}
    tree |= {} if state.retained is None else {"retained": state.retained}
    vectors = {"average": state.average, "best": state.best}
    return tree | {name: vector for name, vector in vectors.items() if vector is not None}


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    for name in COUNTED:
        setattr(state, name, tree[name])
    state.best_loss = math.inf if tree["best_loss"] is None else tree["best_loss"]
    state.average, state.best = (None if tree.get(name) is None else tree[name].clone() for name in ("average", "best"))
    state.encoder.load_state_dict(tree["encoder"])
    state.optimiser.load_state_dict(tree["optimiser"])
    if state.store is not None:
        meta_samplers.load_state_dict(state.store, tree["store"])
    if state.retained is not None:
        state.retained = tree["retained"].clone()


def _begin(state: State, generator: torch.Generator) -> None:
    """The first samplers, and the encoder's scales: from simulations where they are learned from, else from these."""
    config, target = state.config, state.target
    assert target.sample_prior is not None
    z, x = target.sample_prior(SCALE_DRAWS, generator), target.observed
    if config.simulates:
        pool = _pool(state)
        z, x = pool.z, torch.cat([pool.x, x.to(pool.x.dtype)])
    if state.store is not None:
        meta_samplers.begin(state.store, samplers_of(target), _smc(config), generator, config.runs)
        _require_mass(state.store, config, target, generator)
        if not config.simulates:
            rows = torch.arange(len(target.observed))
            z = meta_samplers.minibatch(state.store, rows, generator, config.particles).z.flatten(0, 2)
    elif config.method != "npe":
        without = torch.arange(len(target.observed))
        for part in z.split(500):
            found = _likelihood_of_all(target, part, without)
            without = without[(found == -math.inf).all(1)]
        _refuse(without, len(z), target)
    if state.retained is not None:
        state.retained = target.sample_prior(len(target.observed), generator)
    state.encoder.fit_scales(z, x if len(x) > 1 else x.expand(2, -1))


def _observed_loss(state: State, generator: torch.Generator) -> Float[Tensor, ""]:
    config, target = state.config, state.target
    rows = torch.randperm(len(target.observed), generator=generator)[: config.batch]
    x = target.observed[rows]
    if state.store is not None:
        particles = meta_samplers.minibatch(state.store, rows, generator, config.draws)
        log_q = state.encoder.log_prob(particles.z.flatten(1, 2), x).reshape(particles.z.shape[:3])
        return meta_samplers.estimator_loss(config.estimator, log_q, particles)
    if config.method == "msc":
        return _climbing_loss(state, rows, x, generator)
    from_prior = config.draws // 2 if config.method == "defensive-wake" else 0
    z = state.encoder.draw(config.draws - from_prior, generator, x)
    if from_prior:
        assert target.sample_prior is not None
        more = target.sample_prior(len(x) * from_prior, generator).reshape(len(x), from_prior, -1)
        z = torch.cat([more, z], 1)
    log_prior, log_likelihood = _joint(target, z, x)
    log_q = state.encoder.log_prob(z, x)
    if from_prior:
        return defensive_wake_loss(log_q, log_prior, log_likelihood, from_prior / config.draws)
    return wake_loss(log_q, log_prior + log_likelihood)


def _climbing_loss(
    state: State, rows: Int[Tensor, " b"], x: Float[Tensor, "b N"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Markovian score climbing: the retained particle and fresh draws of q compete; q learns from the one chosen."""
    assert state.retained is not None
    fresh = state.encoder.draw(state.config.draws - 1, generator, x)
    z = torch.cat([state.retained[rows, None], fresh], 1)
    log_joint = sum(_joint(state.target, z, x))
    with torch.no_grad():
        log_q = state.encoder.log_prob(z, x)
    uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    chosen = climbing_choice(log_joint, log_q, uniform)  # type: ignore[arg-type]
    state.retained[rows] = z[torch.arange(len(rows)), chosen]
    return sleep_loss(state.encoder.log_prob(state.retained[rows, None], x)[:, 0])


@torch.no_grad()
def _joint(
    target: AmortisedTarget, z: Float[Tensor, "b k d"], x: Float[Tensor, "b N"]
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    return target.log_prior(z), target.log_likelihood(z, x)


def _simulated_loss(state: State, generator: torch.Generator) -> Float[Tensor, ""]:
    config, pool = state.config, _pool(state)
    if config.simulations:
        rows = torch.randint(_training_rows(pool), (config.pairs,), generator=generator)
    else:
        rows = ((state.step - 1) % POOL_STEPS * config.pairs + torch.arange(config.pairs)) % len(pool.z)
    return sleep_loss(state.encoder.log_prob(pool.z[rows, None], pool.x[rows])[:, 0])


def _pool(state: State) -> Simulations:
    """The simulations of this step, which depend on the seed and the step alone."""
    config = state.config
    index = 0 if config.simulations else (state.step - 1) // POOL_STEPS
    if state.pool is None or state.pool_index != index:
        count = config.simulations or POOL_STEPS * config.pairs
        size = count * (state.target.dim + state.target.observed.shape[1]) * 4
        if size > config.memory:
            more = f"more than the {config.memory / 2**20:.3g} MiB allowed"
            less = "--simulations" if config.simulations else "pairs a step"
            raise InputError(f"{count} simulations take {size / 2**20:.3g} MiB, {more}: take fewer {less}")
        found = simulate_pairs(state.target, count, named_generator(config.seed, Stream.SIMULATE, index))
        z, x = found.z.float(), found.x.float()
        kept = torch.isfinite(z).all(1) & torch.isfinite(x).all(1)  # the network's float32 ends at 3e38
        lost = count - int(kept.sum())
        if count - lost < 20:
            raise InputError(f"{count - lost} simulations that are finite: 20 at least are needed")
        if index > state.pool_index:  # else they are made again, after an interruption
            state.simulated, state.lost = state.simulated + count, state.lost + lost
        state.pool, state.pool_index = Simulations(z[kept], x[kept], lost), index
    return state.pool


def _training_rows(pool: Simulations) -> int:
    return math.ceil((1 - HELD_OUT) * len(pool.z))


@torch.no_grad()
def _validate(state: State) -> None:
    """Keep the encoder that does best on held-out simulations, and end with it."""
    if state.step % VALIDATE_EVERY and state.step not in (1, state.config.steps):
        return
    pool, vector = _pool(state), state.optimiser.vector
    first, now = _training_rows(pool), vector.clone()
    assert state.average is not None
    vector.copy_(state.average)
    losses = [
        -state.encoder.log_prob(z[:, None], x)[:, 0]
        for z, x in zip(pool.z[first:].split(2000), pool.x[first:].split(2000), strict=True)
    ]
    loss = float(torch.cat(losses).mean())
    if loss < state.best_loss:
        state.best_loss, state.best = loss, state.average.clone()
    ended = state.step == state.config.steps and state.best is not None
    vector.copy_(state.best if ended else now)  # type: ignore[arg-type]
    state.held_out = _shown(loss)


def _smc(config: Config) -> SmcConfig:
    return SmcConfig(particles=config.particles, kernel=config.kernel, moves=config.moves)


def _require_mass(store: MetaSamplers, config: Config, target: AmortisedTarget, generator: torch.Generator) -> None:
    """Give observations that no prior draw explains more runs, and raise InputError where these are in vain."""
    without = _unexplained(store)
    for _ in range(MORE_RUNS):
        if not len(without):
            return
        run = run_smc(samplers_of(target, target.observed[without]), len(without), _smc(config), generator)
        meta_samplers.append(store, without, run, 0, generator)
        without = _unexplained(store)
    _refuse(without, (config.runs + MORE_RUNS) * config.particles, target)


def _refuse(without: Int[Tensor, " r"], draws: int, target: AmortisedTarget) -> None:
    if len(without):
        rows = ", ".join(str(int(row) + 1) for row in without[:3]) + (" ..." if len(without) > 3 else "")
        raise InputError(
            f"{target.name}: the prior has no mass where observation {rows} needs it: none of {draws} draws from it "
            f"has a positive likelihood (log Z is -inf): leave such rows out ({len(without)} of "
            f"{len(target.observed)}), or widen the prior"
        )


@torch.no_grad()
def _likelihood_of_all(
    target: AmortisedTarget, z: Float[Tensor, "k d"], rows: Int[Tensor, " r"]
) -> Float[Tensor, "r k"]:
    return target.log_likelihood(z.expand(len(rows), -1, -1), target.observed[rows])


def _unexplained(store: MetaSamplers) -> Int[Tensor, " r"]:
    return (store.log_z == -math.inf).all(1).nonzero()[:, 0]


def _named(config: Config) -> str:
    return f"--method {config.method}" + (" --sleep" if config.method == "smc-wake" else "")


def _shown(loss: float) -> float:
    return max(-WORST, min(WORST, loss)) if not math.isnan(loss) else WORST

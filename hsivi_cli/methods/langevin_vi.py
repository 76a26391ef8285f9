"""Variational inference by Langevin diffusions: VI, ULA, MCD, UHA, LDVI, their Euler variants, and CMCD.

One engine (Geffner & Domke 2023, arXiv 2208.07743; CMCD from Vargas et al. 2024, arXiv 2307.01050): draw z_1 from a
Gaussian q, walk K transitions along the geometric bridge from q to the target, and weigh the walk by what a backward
walk from the target would have given it. `E exp(log w) = Z` for any parameters, and `E log w`, the ELBO, is maximised
over all of them: q, the bridge's schedule, the step, the damping and the network of the backward kernels.

The kinds differ in the walk alone. `ula` and `uha` have no network; `mcd` is ULA with a network in the backward kernel,
`ldvi` is UHA with an Euler momentum refresh and a network; `*-em` discretise by Euler-Maruyama instead of leapfrog;
`ldvi-mixed` refreshes exactly forward and by Euler backward, `ldvi-exact` exactly in both; in `cmcd` the network pushes
the forward walk too. `vi` has no transitions at all.

Parameters are kept so that no update can leave their range: the logarithm of the step and of the increments, the logit
of `eta` or of `a = gamma step`. `paper=True` keeps them raw, with the published starts and projections instead.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.bridges.geometric import (
    DiagonalGaussian,
    GeometricBridge,
    geometric_bridge,
    increment_count,
    schedule,
)
from hsivi_cli.engine.flat_adam import FlatAdam, flatten
from hsivi_cli.engine.optimisation import LearningRate, ScheduleName
from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.networks.residual_score import ResidualScore
from hsivi_cli.targets.density import Density
from hsivi_cli.transitions.controlled import controlled_walk
from hsivi_cli.transitions.langevin import (
    Walk,
    euler_refresh,
    euler_walk,
    exact_refresh,
    log_momentum_ratio,
    mixed_refresh,
    overdamped_walk,
    underdamped_walk,
)

Kind = Literal["vi", "ula", "mcd", "uha", "ldvi", "uha-em", "ldvi-em", "ldvi-mixed", "ldvi-exact", "cmcd"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OVERDAMPED = ("ula", "mcd", "cmcd")
WITH_ETA = ("uha", "ldvi-exact")
WITH_NETWORK = ("mcd", "ldvi", "ldvi-em", "ldvi-mixed", "ldvi-exact", "cmcd")

ROWS_AT_ONCE = 2000  # draws walk in blocks of this size: memory stays bounded
PATIENCE = 50  # steps in a row without a usable gradient before the run is given up
OUTLIER = 4.0  # a gradient longer than this many times the running average is shortened to it


@dataclass(frozen=True)
class Config:
    """A resolved run. `bridges` is K, the number of transitions; `vi` has none.

    `lr` is the rate of q and the network; step, damping and schedule move `scalar_lr` times as fast (not with `paper`,
    which also means a constant rate, no clipping and the published starts). `initial_step` None means the default.
    """

    kind: Kind = "ldvi"
    bridges: int = 8
    steps: int = 5000
    samples_per_step: int = 5
    lr: float = 3e-3
    lr_schedule: ScheduleName = "cosine"
    scalar_lr: float = 10.0
    initial_step: float | None = None
    paper: bool = False
    seed: int = 0

    @property
    def transitions(self) -> int:
        """K, or 0 for plain VI."""
        return 0 if self.kind == "vi" else self.bridges

    @property
    def noise_rows(self) -> int:
        """Standard normal vectors a draw takes: its start, its first momentum if any, one a transition."""
        return 1 + (self.kind not in ("vi", *OVERDAMPED)) + self.transitions


@dataclass
class State:
    """Parameters as they are stored, the network, Adam, and how the run is doing.

    `dropped` counts draws without a finite weight, `idle` the steps in a row without a usable gradient, `norm` is the
    running average of the gradient's norm and `elbo` the last estimate (0 before the first step).
    """

    step: int
    density: Density
    config: Config
    parameters: dict[str, nn.Parameter]
    network: ResidualScore | None
    trained: list[nn.Parameter]
    optimiser: FlatAdam
    dropped: int = 0
    idle: int = 0
    norm: float = 0.0
    elbo: float = 0.0


@dataclass(frozen=True)
class Values:
    """The parameters as the formulas want them; `damping` is eta or `a = gamma step`."""

    reference: DiagonalGaussian
    betas: Float[Tensor, " k"]
    step: Float[Tensor, "1 1 1"]
    damping: Float[Tensor, "1 1 1"]


def init(
    density: Density,
    config: Config,
    location: Float[Tensor, " d"] | None = None,
    log_scale: Float[Tensor, " d"] | None = None,
) -> State:
    """A fresh state whose q is `N(location, diag(exp(2 log_scale)))`, by default the density's start and scale 1."""
    if config.kind not in KINDS:
        raise InputError(f"--method {config.kind} is unknown: choose one of {', '.join(KINDS)}")
    if config.kind != "vi" and config.bridges < 1:
        raise InputError(f"--bridges {config.bridges} is too small: {config.kind} needs at least 1")
    start = location if location is not None else density.initial
    zeros = torch.zeros(density.dim, dtype=torch.float64)
    raw = {"mean": zeros if start is None else start, "log_scale": zeros if log_scale is None else log_scale}
    if config.transitions:
        raw |= _initial_scalars(config)
    parameters = {name: nn.Parameter(value.detach().double().clone()) for name, value in raw.items()}
    network = None
    if config.kind in WITH_NETWORK:
        inputs = density.dim if config.kind in OVERDAMPED else 2 * density.dim
        count = config.transitions + (config.kind == "cmcd")  # a control for each end of each transition
        network = ResidualScore(inputs, density.dim, count, generator(config.seed, Stream.INIT))
    fast = 1.0 if config.paper else config.scalar_lr
    q = [parameters["mean"], parameters["log_scale"]]
    scalars = [parameter for name, parameter in parameters.items() if name not in ("mean", "log_scale")]
    slow = [*q, *(network.parameters() if network else ())]
    optimiser = FlatAdam([(slow, 1.0), (scalars, fast)])
    trained = [*slow, *scalars]
    return State(0, density, config, parameters, network, trained, optimiser)


def _initial_scalars(config: Config) -> dict[str, Tensor]:
    """Raw step, damping and increments: the published starts with `paper`, a usable step and gamma = 2 otherwise."""
    increments = torch.ones(increment_count(config.bridges), dtype=torch.float64)
    overdamped, memory = config.kind in OVERDAMPED, config.kind in WITH_ETA
    step = config.initial_step
    if config.paper:
        scalars = {"step": 1e-5 if step is None else step, "damping": 0.0 if memory else 10.0}
    else:
        step = (1e-3 if overdamped else 0.05) if step is None else step
        damping = 0.5 if memory else min(2 * step, 0.5)
        scalars = {"step": math.log(step), "damping": math.log(damping / (1 - damping))}
        increments = torch.zeros_like(increments)
    if overdamped:
        del scalars["damping"]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()} | {
        "increments": increments
    }


def values(state: State) -> Values:
    """What the stored parameters mean."""
    raw, config = state.parameters, state.config
    reference = DiagonalGaussian(raw["mean"], raw["log_scale"])
    if not config.transitions:
        none = raw["mean"].new_empty(0)
        return Values(reference, none, none, none)
    step: Tensor = raw["step"]
    increments: Tensor = raw["increments"]
    damping: Tensor = raw["damping"] if "damping" in raw else torch.zeros_like(step)
    if config.paper:
        if config.kind not in WITH_ETA:
            damping = damping * step
    else:
        step, increments, damping = step.exp(), increments.softmax(0), damping.sigmoid()
    one = (1, 1, 1)
    return Values(reference, schedule(increments, config.bridges), step.view(one), damping.view(one))


def weigh(
    state: State, noise: Float[Tensor, "rows n d"], at: Values | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The last states, `log p` there and `log w` of n walks driven by `noise` (`config.noise_rows` rows)."""
    at = values(state) if at is None else at
    density, kind, network = state.density, state.config.kind, state.network
    start, others = noise[0], noise[1:]
    log_start = at.reference.log_prob_of_noise(start)
    if kind == "vi":
        z = at.reference.draw(start)
        log_prob = density.log_prob(z)
        return z, log_prob, log_prob - log_start
    bridge = geometric_bridge(at.reference, density.gradient, at.betas, density.linearise)
    if kind == "cmcd":
        assert network is not None
        walk = controlled_walk(start, bridge, at.step, others, network)
    elif kind in OVERDAMPED:
        walk = overdamped_walk(start, bridge, at.step, others, network)
    else:
        walk = _walk_with_momentum(state, at, bridge, noise)
    with torch.no_grad():
        log_prob = density.log_prob(walk.z)
    log_weight = known_gradient(walk.z, log_prob, walk.target_gradient) + walk.log_ratio - log_start
    if walk.momentum is not None:
        log_weight = log_weight + log_momentum_ratio(noise[1], walk.momentum)
    return walk.z, log_prob, log_weight


def _walk_with_momentum(state: State, at: Values, bridge: GeometricBridge, noise: Float[Tensor, "rows n d"]) -> Walk:
    kind, network = state.config.kind, state.network
    score = None if network is None else lambda z, rho: network(torch.cat([z, rho], 2))
    if kind.endswith("-em"):
        return euler_walk(noise[0], noise[1], bridge, at.step, at.damping, noise[2:], score)
    refresh = {"ldvi": euler_refresh, "ldvi-mixed": mixed_refresh}.get(kind, exact_refresh)(at.damping)
    return underdamped_walk(noise[0], noise[1], bridge, at.step, refresh, noise[2:], score)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        return bar[:, None] * ctx.gradient, None, None


def known_gradient(
    z: Float[Tensor, "n d"], value: Float[Tensor, " n"], gradient: Float[Tensor, "n d"]
) -> Float[Tensor, " n"]:
    """`value`, a function of z whose gradient is there already: the walk ends with that of the target."""
    return _KnownGradient.apply(z, value, gradient.detach())


@np.errstate(all="ignore")  # a draw that runs away is counted, not reported by numpy
def step(state: State, batch: None, generator: torch.Generator) -> dict[str, float]:
    """One Adam step on the mean of `log w` over `samples_per_step` walks; the method needs no data, `batch` is None.

    Walks without a finite weight are left out and counted; a step without a usable gradient changes nothing. Raises
    RunError after `PATIENCE` such steps in a row.
    """
    config = state.config
    state.step += 1
    shape = (config.noise_rows, config.samples_per_step, state.density.dim)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    log_weight = weigh(state, noise)[2]
    elbo, kept = log_weight.mean(), config.samples_per_step
    if not math.isfinite(elbo.item()):
        finite = log_weight.isfinite()
        kept = int(finite.sum())
        state.dropped += config.samples_per_step - kept
        if kept:  # a bad row makes every gradient NaN, so the others walk again without it
            elbo = weigh(state, noise[:, finite])[2].mean()
    norm = ascend(state, elbo) if kept else math.nan
    usable = math.isfinite(norm)
    state.idle = 0 if usable else state.idle + 1
    if state.idle >= PATIENCE:
        raise RunError(
            f"diverged: {PATIENCE} steps without a finite gradient up to step {state.step}; use a lower --lr, "
            "or check the model where its parameters are large"
        )
    if usable:
        state.elbo = elbo.item()
    # a step that changed nothing reports the last one that did: the loop takes a metric that is not finite for the end
    dropped = float(config.samples_per_step - kept)
    return {"elbo": state.elbo, "gradient_norm": norm if usable else 0.0, "dropped": dropped}


def ascend(state: State, elbo: Float[Tensor, ""]) -> float:
    """One Adam step up; returns the gradient's norm, and does nothing unless that is finite."""
    config = state.config
    gradient = flatten(torch.autograd.grad(elbo, state.trained))
    norm = math.sqrt(gradient.dot(gradient).item())
    if not math.isfinite(norm):
        return norm
    rate = config.lr
    if not config.paper:
        rate = LearningRate(config.lr, 1, config.lr_schedule).at(min(state.step, config.steps), config.steps)
        limit = OUTLIER * state.norm if state.norm else norm
        if norm > limit:
            gradient *= limit / norm
        state.norm = 0.95 * state.norm + 0.05 * min(norm, limit) if state.norm else norm
    state.optimiser.ascend(gradient, rate)
    if config.paper:
        _project(state)
    return norm


@torch.no_grad()
def _project(state: State) -> None:
    """Back into the published ranges after a raw step; and `a = gamma step` below 1, which the paper leaves open."""
    raw = state.parameters
    if "step" not in raw:
        return
    raw["step"].clamp_(1e-7, 0.5)
    raw["increments"].clamp_(min=1e-3)
    if state.config.kind in WITH_ETA:
        raw["damping"].clamp_(0, 0.99)
    elif "damping" in raw:
        raw["damping"].clamp_(1e-3, 0.99 / float(raw["step"]))


def reference(state: State) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean and log scale of q, where another run may start."""
    return state.parameters["mean"].detach().clone(), state.parameters["log_scale"].detach().clone()


@torch.no_grad()
@np.errstate(all="ignore")
def sample(state: State, noise: NoiseStreams) -> Draws:
    """One walk a noise stream: its last state and its unbiased weight."""
    config, dim = state.config, state.density.dim
    at = values(state)
    streams = noise.draw((config.noise_rows, dim)).split(ROWS_AT_ONCE)
    blocks = [weigh(state, block.double().transpose(0, 1).contiguous(), at) for block in streams]
    z, log_prob, log_weight = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return Draws(z, log_prob, log_weight)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON of a run; the density is not part of it."""
    return {
        "step": state.step,
        "dropped": state.dropped,
        "idle": state.idle,
        "norm": state.norm,
        "elbo": state.elbo,
        "parameters": {name: parameter.data for name, parameter in state.parameters.items()},
        "network": dict(state.network.state_dict()) if state.network else {},
        "optimiser": state.optimiser.state_dict(),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    for name in ("step", "dropped", "idle", "norm", "elbo"):
        setattr(state, name, tree[name])
    for name, parameter in state.parameters.items():
        parameter.data.copy_(tree["parameters"][name])
    if state.network:
        state.network.load_state_dict(tree["network"])
    state.optimiser.load_state_dict(tree["optimiser"])

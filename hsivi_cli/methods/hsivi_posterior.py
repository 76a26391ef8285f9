"""The chain that HSIVI-LB and HSIVI-SM train for a log density (Yu et al. 2023, arXiv 2310.17153).

`x_K ~ N(0, I)`, then `x_k ~ q(x_k | x_{k+1}) = N(mu_k(x_{k+1}), diag sigma_k^2)` for k = K-1 .. 0. The marginal of
layer k is matched to the geometric bridge `log p_k = (1 - l_k) log N(0, I) + l_k log p`, l_k = ((K-k)/K)^1.5, so p_0
is the target. Layers are trained jointly, with no gradient through a layer's input, or one after another from the base.

A marginal q(x_0) is a mixture of infinitely many Gaussians; `sample` estimates its log density by J of them.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.engine.optimisation import LearningRate, ScheduleName, update_ema
from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.hsivi_density import best_estimate, walk_chain
from hsivi_cli.networks.conditional_gaussian import ConditionalGaussian, flatten_parameters
from hsivi_cli.targets.density import Density

Training = Literal["joint", "layerwise"]

# How much a layer's output tells about its input at the start, in nats: `d log(1 / sigma)`. The bound sees at most
# log(J + 1) of it, so that in many dimensions sigma must start near 1.
INFORMATION = 1.4

# What the authors' sibling repositories (SIVISM, KSIVI) use, up to this dimension.
_PUBLISHED: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"base_dim": 3, "hidden": (50, 50), "lr": 1e-3, "steps": 50_000, "batch": 500}),
    (100, {"base_dim": 10, "hidden": (100, 100), "lr": 1e-3, "steps": 20_000, "batch": 100}),
    (2**62, {"base_dim": 3, "hidden": (10, 10), "lr": 2e-5, "steps": 20_000, "batch": 100}),
)


@dataclass(frozen=True)
class PosteriorConfig:
    """What both objectives share.

    `base_dim` 0 means max(d, 3): a little more base noise than coordinates helps in two dimensions. `residual` False is
    the published mean network. `varying` lets a layer's noise depend on its input; `sigma` is the start of every
    layer's noise, 0 means `exp(-1.4 / d)`. `inner` is J, the further components of the bound.

    The target's power in bridge k is `((K - k) / K) ** bridge_power`; while the first share `anneal` of training lasts,
    it rises to that from 0, which is what an untrained chain matches: modes are found before they part. `training`
    "layerwise" gives every layer its share of the steps, from the base on. `components` and `paths` are the J of a
    finished fit's two density estimates, see `methods.hsivi_density`; `paths` 0 leaves out the second.
    """

    layers: int = 5
    steps: int = 3000
    seed: int = 0
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    base_dim: int = 0
    residual: bool = True
    varying: bool = True
    sigma: float = 0.0
    inner: int = 511
    bridge_power: float = 1.5
    anneal: float = 0.5
    training: Training = "joint"
    lr: float = 3e-3
    warmup: int = 50
    lr_schedule: ScheduleName = "cosine"
    amsgrad: bool = False
    clip: float = 10.0
    ema: float = 0.995
    components: int = 1024
    paths: int = 32


def published_settings(dim: int) -> dict[str, Any]:
    """Settings of `PosteriorConfig` for a target of this dimension as published: ReLU means, AMSGrad, no annealing."""
    found = next(settings for most, settings in _PUBLISHED if dim <= most)
    common = {"residual": False, "varying": False, "amsgrad": True, "anneal": 0.0, "bridge_power": 1.0}
    return found | common | {"inner": found["batch"] - 1, "lr_schedule": "constant"}


@dataclass
class Chain:
    """The layers, number k first, their moving averages, both also as one vector a layer, and the powers l_k."""

    layers: nn.ModuleList
    averages: nn.ModuleList
    vectors: list[Tensor]
    average_vectors: list[Tensor]
    powers: Float[Tensor, " K"]
    base_dim: int

    def layer(self, k: int) -> ConditionalGaussian:
        """Layer k as it is being trained."""
        return cast(ConditionalGaussian, self.layers[k])

    def average(self, k: int) -> ConditionalGaussian:
        """Layer k as a finished fit uses it."""
        return cast(ConditionalGaussian, self.averages[k])


@dataclass(frozen=True)
class Pass:
    """What one layer made of its inputs: `N(means, diag exp(2 log_sigma))` of every chain, without gradients."""

    number: int
    inputs: Float[Tensor, "m i"]
    means: Float[Tensor, "m d"]
    log_sigma: Float[Tensor, "s d"]

    def draw(self, zeta: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """`x_k = mu_k(x_{k+1}) + sigma_k zeta` for the first n chains."""
        return self.means[: len(zeta)] + self.log_sigma[: len(zeta)].exp() * zeta


def check_config(config: PosteriorConfig) -> None:
    """Raise InputError for numbers that make no chain."""
    for flag, value, least in (
        ("--layers", config.layers, 1),
        ("--steps", config.steps, 1),
        ("--batch", config.batch, 2),
        ("--inner", config.inner, 1),
        ("--paths", config.paths, 0),
        ("--components", config.components, 1),
    ):
        if value < least:
            raise InputError(f"{flag} {value}: must be at least {least}")
    if not (0 <= config.anneal <= 1 and config.bridge_power > 0):
        raise InputError(f"--anneal {config.anneal:g} must be a share, --bridge-power {config.bridge_power:g} positive")
    if not 0 <= config.sigma < 1:
        raise InputError(f"--sigma {config.sigma:g}: the start of the layers' noise must lie between 0 and 1")


def make_chain(dim: int, config: PosteriorConfig) -> Chain:
    """Fresh layers; a residual chain starts with every marginal equal to the base N(0, I)."""
    draws = generator(config.seed, Stream.INIT)
    base_dim = config.base_dim or max(dim, 3)
    layers = nn.ModuleList(
        ConditionalGaussian(
            base_dim if k == config.layers - 1 else dim,
            dim,
            config.hidden,
            draws,
            residual=config.residual,
            varying=config.varying,
            sigma=config.sigma or math.exp(-INFORMATION / dim),
        )
        for k in range(config.layers)
    )
    averages = copy.deepcopy(layers).requires_grad_(False)
    powers = (1 - torch.arange(config.layers, dtype=torch.float64) / config.layers) ** config.bridge_power
    vectors, average_vectors = ([flatten_parameters(layer) for layer in many] for many in (layers, averages))
    return Chain(layers, averages, vectors, average_vectors, powers, base_dim)


def active_layers(step: int, config: PosteriorConfig) -> range:
    """The layers k that step 1 .. steps trains: all of them, or one after another from the base (number K-1) to 0."""
    if config.training == "joint":
        return range(config.layers)
    done = min((step - 1) * config.layers // config.steps, config.layers - 1)
    return range(config.layers - 1 - done, config.layers - done)


def rate_at(base: float, step: int, config: PosteriorConfig) -> float:
    """Learning rate of a step; layer by layer, every layer has the whole schedule to itself."""
    schedule = LearningRate(base, config.warmup, config.lr_schedule)
    return schedule.at(*_place(step, config))


def _place(step: int, config: PosteriorConfig) -> tuple[int, int]:
    """Which step of how many this is for the layers now being trained."""
    if config.training == "joint":
        return step, config.steps
    done = config.layers - 1 - active_layers(step, config)[0]
    before, after = (-(-number * config.steps // config.layers) for number in (done, done + 1))
    return step - before, after - before


def powers_at(chain: Chain, step: int, config: PosteriorConfig) -> Float[Tensor, " K"]:
    """The powers of the target that a step trains for: they rise from 0 during the first share `anneal` of training."""
    place, total = _place(step, config)
    risen = min(1.0, place / (config.anneal * total)) if config.anneal > 0 else 1.0
    if config.training == "joint":
        return chain.powers * risen**2
    # a layer starts as the identity, which is right for the bridge of its input
    below = torch.cat([chain.powers[1:], torch.zeros(1, dtype=torch.float64)])
    return below + (chain.powers - below) * risen**2


@torch.no_grad()
def roll_out(chain: Chain, active: range, chains: int, draws: torch.Generator) -> list[Pass]:
    """Walk from the base to the last active layer; the passes of the active layers, nearest to the target first.

    Layers that are not being trained are the averaged ones, which a finished fit will use.
    """
    x = torch.randn((chains, chain.base_dim), generator=draws, dtype=torch.float64)
    passes: list[Pass] = []
    for k in range(len(chain.layers) - 1, active[0] - 1, -1):
        layer = chain.layer(k) if k in active else chain.average(k)
        mean, log_sigma = layer(x)
        done = Pass(k, x, mean, log_sigma.detach())
        if k in active:
            passes.append(done)
        if k > active[0]:
            x = done.draw(torch.randn((chains, layer.dim), generator=draws, dtype=torch.float64))
    return passes[::-1]


@dataclass(frozen=True)
class Output:
    """`x_k` and the sigma that it was drawn with, both with gradients to the layer's own parameters and no other's."""

    x: Float[Tensor, "n d"]
    sigma: Float[Tensor, "s d"]


def redraw(chain: Chain, done: Pass, zeta: Float[Tensor, "n d"]) -> Output:
    """`Pass.draw` again, with gradients."""
    mean, log_sigma = chain.layer(done.number)(done.inputs[: len(zeta)])
    sigma = log_sigma.exp()
    return Output(mean + sigma * zeta, sigma)


def move_along(chain: Chain, done: Pass, zeta: Float[Tensor, "n d"], direction: Float[Tensor, "n d"]) -> list[Tensor]:
    """The gradient, in the layer's parameters, of an objective whose gradient in each x is `direction`; the mean of n.

    Reparameterisation: x is a function of the parameters for fixed input and zeta.
    """
    x = redraw(chain, done, zeta).x
    return list(torch.autograd.grad(x, list(chain.layers[done.number].parameters()), direction / len(zeta)))


def make_optimiser(vectors: Sequence[Tensor], config: PosteriorConfig, rate: float) -> torch.optim.Optimizer:
    """Adam on whole vectors."""
    return torch.optim.Adam(vectors, rate, amsgrad=config.amsgrad)


def ascend(
    optimiser: torch.optim.Optimizer,
    vectors: Sequence[Tensor],
    gradients: Sequence[list[Tensor]],
    rate: float,
    clip: float,
) -> float:
    """Step up along the gradients of these vectors, clipped in norm together; returns the norm.

    The optimiser's other vectors stay, and their moments with them. Raises RunError where the norm is not finite.
    """
    optimiser.zero_grad(set_to_none=True)
    for vector, parts in zip(vectors, gradients, strict=True):
        vector.grad = -torch.cat([part.flatten() for part in parts])
    norm = float(nn.utils.clip_grad_norm_(vectors, clip))
    if not math.isfinite(norm):
        raise RunError("diverged: the gradient is not finite: use a lower --lr")
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    return norm


def bridge_gradient(
    chain: Chain, density: Density, config: PosteriorConfig, step: int, passes: list[Pass], x: Float[Tensor, "k n d"]
) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"], Float[Tensor, "k n"]]:
    """Of every active layer's bridge at its outputs: gradient and value; and the value of the target itself."""
    rows = x.detach().reshape(-1, density.dim).requires_grad_(True)
    with torch.enable_grad():
        log_target = density.log_prob(rows)
        gradient = torch.autograd.grad(log_target.sum(), rows)[0].view_as(x)
    log_target = log_target.detach().view(x.shape[:2])
    power = powers_at(chain, step, config)[[done.number for done in passes]].unsqueeze(-1)
    log_p = (1 - power) * log_base(x) + power * log_target
    return torch.lerp(-x, gradient, power.unsqueeze(-1)), log_p, log_target


def log_base(x: Float[Tensor, "*k d"]) -> Float[Tensor, "*k"]:
    """Log density of N(0, I)."""
    return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


@torch.no_grad()
def update_averages(chain: Chain, active: range, step: int, decay: float) -> None:
    """Move the averages of the layers that were trained."""
    update_ema([chain.average_vectors[k] for k in active], [chain.vectors[k] for k in active], step, decay)


@torch.no_grad()
def sample_chain(chain: Chain, density: Density, config: PosteriorConfig, noise: NoiseStreams) -> Draws:
    """One draw a noise stream, from the averaged layers; `log_approx` is an estimate, see `methods.hsivi_density`."""
    layers = [chain.average(k) for k in range(config.layers)]
    base = noise.draw((chain.base_dim,)).double()
    zeta = [noise.draw((density.dim,)).double() for _ in layers]
    walk = walk_chain(layers, base, zeta, noise.draw((1,)).double().squeeze(1))
    estimate = best_estimate(layers, chain.base_dim, config.components, config.paths, config.seed)
    x = walk.states[0]
    return Draws(x, density.log_prob(x), log_approx=estimate.log_prob(walk), note=estimate.note)


def chain_state_dict(chain: Chain) -> dict[str, Any]:
    """Tensors of the layers and of their averages."""
    return {"layers": dict(chain.layers.state_dict()), "averages": dict(chain.averages.state_dict())}


def load_chain_state_dict(chain: Chain, tree: dict[str, Any]) -> None:
    """Restore what `chain_state_dict` returned, in place."""
    chain.layers.load_state_dict(tree["layers"])
    chain.averages.load_state_dict(tree["averages"])

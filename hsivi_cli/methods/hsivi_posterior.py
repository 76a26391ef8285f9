"""The chain that HSIVI-LB and HSIVI-SM train for a log density (Yu et al. 2023, arXiv 2310.17153).

`x_K ~ N(0, I)`, then `x_k ~ q(x_k | x_{k+1}) = N(mu_k(x_{k+1}), diag sigma_k^2)` for k = K-1 .. 0. The marginal of
layer k is matched to the geometric bridge `log p_k = (1 - l_k) log N(0, I) + l_k log p`, l_k = ((K-k)/K)^1.5, so p_0
is the target. Layers are trained jointly, with no gradient through a layer's input, or one after another from the base.

A marginal q(x_0) is a mixture of infinitely many Gaussians; `sample` estimates its log density by J of them.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.engine.optimisation import LearningRate, ScheduleName, update_ema
from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.io.draws import Draws
from hsivi_cli.networks.conditional_gaussian import ConditionalGaussian
from hsivi_cli.objectives.hsivi_bound import pairwise_log_density
from hsivi_cli.targets.density import Density

Training = Literal["joint", "layerwise"]

# How much a layer's output tells about its input at the start, in nats: `d log(1 / sigma)`. The bound sees at most
# log(J + 1) of it, so that in many dimensions sigma must start near 1.
INFORMATION = 1.4
ROWS_AT_ONCE = 2048  # draws against J components: memory of the density estimate

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
    the published mean network. `sigma` is the start of every layer's noise, 0 means `exp(-1.4 / d)`. The target's power
    in bridge k is `((K - k) / K) ** bridge_power`; while the first share `anneal` of training lasts, it rises to that
    from 0, which is what an untrained chain matches: modes are found before they part. `training` "layerwise" gives
    every layer its share of the steps, from the base on. `components` is the J of a finished fit's density estimate.
    """

    layers: int = 3
    steps: int = 4000
    seed: int = 0
    batch: int = 128
    hidden: tuple[int, ...] = (64, 64)
    base_dim: int = 0
    residual: bool = True
    sigma: float = 0.0
    bridge_power: float = 1.5
    anneal: float = 0.5
    training: Training = "joint"
    lr: float = 1e-2
    warmup: int = 50
    lr_schedule: ScheduleName = "cosine"
    amsgrad: bool = False
    clip: float = 10.0
    ema: float = 0.995
    components: int = 1024


def published_settings(dim: int) -> dict[str, Any]:
    """Settings of `PosteriorConfig` for a target of this dimension as published: ReLU means, AMSGrad, no annealing."""
    found = next(settings for most, settings in _PUBLISHED if dim <= most)
    return found | {"residual": False, "amsgrad": True, "anneal": 0.0, "bridge_power": 1.0, "lr_schedule": "constant"}


@dataclass
class Chain:
    """The layers, number k first, their moving averages, and the powers l_k of the target."""

    layers: nn.ModuleList
    averages: nn.ModuleList
    powers: Float[Tensor, " K"]
    base_dim: int

    def layer(self, k: int) -> ConditionalGaussian:
        """Layer k as it is being trained."""
        return cast(ConditionalGaussian, self.layers[k])

    def average(self, k: int) -> ConditionalGaussian:
        """Layer k as a finished fit uses it."""
        return cast(ConditionalGaussian, self.averages[k])

    def parameters(self) -> list[nn.Parameter]:
        """Everything learned in q."""
        return list(self.layers.parameters())


@dataclass(frozen=True)
class Rollout:
    """One pass through the trained layers: index 0 of the first dimension is the layer nearest to the target.

    `means` = mu_k(x_{k+1}) of every chain; `log_sigma` of every layer; `numbers` are the k. Gradients reach each
    layer's own parameters and no other's.
    """

    means: Float[Tensor, "k m d"]
    log_sigma: Float[Tensor, "k d"]
    numbers: Tensor

    def draw(self, zeta: Float[Tensor, "k n d"]) -> Float[Tensor, "k n d"]:
        """`x_k = mu_k(x_{k+1}) + sigma_k zeta` for the first n chains."""
        return self.means[:, : zeta.shape[1]] + self.log_sigma.exp().unsqueeze(1) * zeta


def check_config(config: PosteriorConfig) -> None:
    """Raise InputError for numbers that make no chain."""
    for flag, value, least in (
        ("--layers", config.layers, 1),
        ("--steps", config.steps, 1),
        ("--batch", config.batch, 2),
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
            sigma=config.sigma or math.exp(-INFORMATION / dim),
        )
        for k in range(config.layers)
    )
    powers = (1 - torch.arange(config.layers, dtype=torch.float64) / config.layers) ** config.bridge_power
    return Chain(layers, copy.deepcopy(layers).requires_grad_(False), powers, base_dim)


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


def roll_out(chain: Chain, active: range, chains: int, draws: torch.Generator) -> Rollout:
    """Walk from the base to the last active layer; a layer's input is the detached output of the one before.

    Layers that are not being trained are the averaged ones, which a finished fit will use.
    """
    dim = chain.layer(0).dim
    x = torch.randn((chains, chain.base_dim), generator=draws, dtype=torch.float64)
    means: list[Tensor] = []
    for k in range(len(chain.layers) - 1, active[0] - 1, -1):
        layer = chain.layer(k) if k in active else chain.average(k)
        mean = layer(x)
        if k in active:
            means.append(mean)
        if k > active[0]:
            zeta = torch.randn((chains, dim), generator=draws, dtype=torch.float64)
            x = (mean + layer.log_sigma.exp() * zeta).detach()
    log_sigma = torch.stack([chain.layer(k).log_sigma for k in active])
    return Rollout(torch.stack(means[::-1]), log_sigma, torch.tensor(active))


def log_base(x: Float[Tensor, "*k d"]) -> Float[Tensor, "*k"]:
    """Log density of N(0, I)."""
    return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def update_averages(chain: Chain, active: range, step: int, decay: float) -> None:
    """Move the averages of the layers that were trained."""
    for k in active:
        update_ema(chain.averages[k].parameters(), chain.layers[k].parameters(), step, decay)


def sample_chain(chain: Chain, density: Density, config: PosteriorConfig, noise: NoiseStreams) -> Draws:
    """One draw a noise stream, from the averaged layers.

    `log_approx` is `log 1/J sum_j q(x_0 | x_1^(j))`, the draw's own x_1 being one of the J = `config.components`; the
    others come from a bank of chains that depends on `config.seed` alone, so that no draw depends on another.
    """
    with torch.no_grad():
        bank = _bank(chain, config)
        x = noise.draw((chain.base_dim,)).double()
        for k in reversed(range(config.layers)):
            layer = chain.average(k)
            mean = layer(x)
            x = mean + layer.log_sigma.exp() * noise.draw((density.dim,)).double()
        log_sigma = chain.average(0).log_sigma
        own = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(x).sum(-1)
        log_sum = torch.cat(
            [
                torch.logaddexp(own_rows, pairwise_log_density(rows, bank, log_sigma).logsumexp(-1))
                for rows, own_rows in zip(x.split(ROWS_AT_ONCE), own.split(ROWS_AT_ONCE), strict=True)
            ]
        )
        log_approx = log_sum - math.log(config.components)
        note = (
            f"log_approx is a semi-implicit estimate, log 1/J sum_j q(x_0 | x_1^(j)) with J = {config.components}, "
            "the draw's own x_1 among them"
        )
        return Draws(x, density.log_prob(x), log_approx=log_approx, note=note)


def _bank(chain: Chain, config: PosteriorConfig) -> Float[Tensor, "m d"]:
    """`mu_0(x_1^(j))` of J - 1 chains of their own."""
    draws = generator(config.seed, Stream.INIT, 1)
    averaged = Chain(chain.averages, chain.averages, chain.powers, chain.base_dim)
    return roll_out(averaged, range(1), config.components - 1, draws).means[0]


def chain_state_dict(chain: Chain) -> dict[str, Any]:
    """Tensors of the layers and of their averages."""
    return {"layers": dict(chain.layers.state_dict()), "averages": dict(chain.averages.state_dict())}


def load_chain_state_dict(chain: Chain, tree: dict[str, Any]) -> None:
    """Restore what `chain_state_dict` returned, in place."""
    chain.layers.load_state_dict(tree["layers"])
    chain.averages.load_state_dict(tree["averages"])

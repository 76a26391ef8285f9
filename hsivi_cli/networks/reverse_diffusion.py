"""The learned reverse diffusion of DDVI given an observation: `q(y_{t-1} | y_t, x)` for t = T .. 1, and q(y_T | x).

One network for all times, a trunk for x that runs once and not T times. The head gives three numbers a dimension:
a mean, a place between log btilde_t and log beta_t for the log variance, and a free residual of it (at t = 1, where
btilde is 0, the residual alone). All are affine given t, so that a step folds them into one matrix of its own and
costs the layers and three small operations.

The mean is `w1_t y_t + w0_t zhat` with `zhat = sqrt(abar_t) y_t + sqrt(1 - abar_t) F` ("direct": F has unit scale at
all t), or, from the predicted noise F, `(y_t - beta_t / sqrt(1 - abar_t) F) / sqrt(alpha_t)` ("noise", the public
code's), or F itself ("raw").
At the start F is 0: a "direct" chain then walks from N(0, I) to N(0, I) exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from hsivi_cli.bridges.latent_noise import LatentNoise
from hsivi_cli.transitions.reverse_chain import Chain, Kernel, run_chain, run_to_end

MeanKind = Literal["direct", "noise", "raw"]
VarianceKind = Literal["learned", "beta", "btilde"]
WAVES = 16  # sines and cosines of time
SMALLEST, LARGEST = -10.0, 2.0
"""Of all log sds. A step's variance grows with what the step before it drew: without a limit chains run away."""


@dataclass(frozen=True)
class ReverseConfig:
    """Width and number of layers, how mean and variance are parameterised, and the number of classes (1: none).

    "beta" and "btilde" fix the variances of the steps t >= 2, and are there for comparison.
    """

    hidden: int = 128
    layers: int = 4
    mean: MeanKind = "direct"
    variance: VarianceKind = "learned"
    classes: int = 1


@dataclass(frozen=True)
class Encoded:
    """What is computed once an observation: q(y_T | x), what the steps see of x, and class logits where there are."""

    start_mean: Float[Tensor, "n d"]
    start_log_sd: Float[Tensor, "n d"]
    context: Float[Tensor, "n hidden"]
    logits: Float[Tensor, "n classes"] | None = None


@dataclass(frozen=True)
class StepTables:
    """Per time 1 .. T (entry 0 unused): the layers' biases, the folded head, and the share of y_t in the mean."""

    bias: Sequence[Sequence[Tensor]]
    weight: Sequence[Tensor]
    offset: Sequence[Tensor]
    carry: Sequence[float]


class ReverseDiffusion(nn.Module):
    """Mean and log sd of `q(y_{t-1} | y_t, x)` on R^`dim`, from y_t and `features` numbers that stand for x."""

    waves: Tensor
    scales: Tensor
    base: Tensor

    def __init__(
        self, noise: LatentNoise, dim: int, features: int, config: ReverseConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.config, self.dim, self.times = config, dim, noise.times
        hidden, layers, steps = config.hidden, config.layers, torch.arange(noise.times + 1, dtype=torch.float64)
        self.enter = _weight(hidden, dim, generator)
        self.see = _weight(hidden, features, generator)
        self.inner = nn.ParameterList([_weight(hidden, hidden, generator) for _ in range(layers - 1)])
        self.time = _weight(layers * hidden, 2 * WAVES, generator)
        self.bias = nn.Parameter(torch.zeros(layers * hidden))
        self.head = nn.Parameter(torch.zeros(3 * dim, hidden))
        self.head_bias = nn.Parameter(torch.zeros(noise.times + 1, 3 * dim))  # one a time: what x does not change
        self.label = nn.Parameter(0.1 * torch.randn(config.classes, hidden, generator=generator))
        angle = math.pi * steps[:, None] / noise.times * torch.arange(1, WAVES + 1, dtype=torch.float64)
        self.register_buffer("waves", torch.cat([angle.sin(), angle.cos()], 1).float(), persistent=False)
        carry, scales, base = _affine(noise, config)
        self.carry = carry.tolist()
        self.register_buffer("scales", scales.repeat_interleave(dim, 1).float(), persistent=False)
        self.register_buffer(
            "base", nn.functional.pad(base[:, None].expand(-1, dim), (2 * dim, 0)).float(), persistent=False
        )

    def context(
        self, features: Float[Tensor, "n p"], classes: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n hidden"]:
        """What the steps see of x, and of the class where there is one."""
        seen = linear(features, self.see)
        return seen if classes is None else seen + self.label[classes]

    def with_class(self, context: Float[Tensor, "n hidden"], classes: Int[Tensor, "..."]) -> Float[Tensor, "n hidden"]:
        """A context without a class, given one."""
        return context + self.label[classes]

    def tables(self) -> StepTables:
        """What the steps need apart from x and y; once a pass."""
        bias = self._bias().view(self.times + 1, self.config.layers, -1)
        weight = self._folded(self.scales[:, :, None] * self.head)
        offset = self._folded(torch.addcmul(self.base, self.scales, self.head_bias))
        return StepTables([row.unbind(0) for row in bias.unbind(0)], weight.unbind(0), offset.unbind(0), self.carry)

    def kernel(self, context: Float[Tensor, "m hidden"]) -> Kernel:
        """The chain's kernel for m chains, one row of `context` each."""
        tables, enter, inner = self.tables(), self.enter.t(), list(self.inner)
        skip_at = len(inner) - 2

        def step(t: int, y: Tensor) -> tuple[Tensor, Tensor]:
            bias = tables.bias[t]
            first = h = silu(torch.addmm(context + bias[0], y, enter))
            for i, weight in enumerate(inner):
                h = silu(linear(h, weight, bias[i + 1]))
                if i == skip_at:
                    h = h + first
            move, log_sd = linear(h, tables.weight[t], tables.offset[t]).split(self.dim, 1)
            return torch.add(move, y, alpha=tables.carry[t]), log_sd.clamp(SMALLEST, LARGEST)

        return step

    def at(
        self, y: Float[Tensor, "m d"], context: Float[Tensor, "m hidden"], times: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]:
        """The same kernels at a time of each row's own, in one call."""
        # rows of a table as a product: its gradient is a product too, where that of indexing is a scatter
        which = nn.functional.one_hot(times, self.times + 1).to(y.dtype)
        bias = self._bias().split(self.config.hidden, 1)
        first = h = silu(torch.addmm(context, y, self.enter.t()).addmm_(which, bias[0]))
        for i, weight in enumerate(self.inner):
            h = silu(torch.addmm(which @ bias[i + 1], h, weight.t()))
            if i == len(self.inner) - 2:
                h = h + first
        raw = torch.addmm(which @ self.head_bias, h, self.head.t())
        move, log_sd = self._folded(torch.addcmul(self.base[times], self.scales[times], raw)).split(self.dim, 1)
        carry = torch.tensor(self.carry, dtype=y.dtype, device=y.device)[times]
        return torch.addcmul(move, carry[:, None], y), log_sd.clamp(SMALLEST, LARGEST)

    def _bias(self) -> Float[Tensor, "T+1 layers*hidden"]:
        return linear(self.waves, self.time, self.bias)

    def _folded(self, rows: Float[Tensor, "T+1 3*d *rest"]) -> Float[Tensor, "T+1 2*d *rest"]:
        """Both parts of the log variance in one."""
        move, between, free = rows.split(self.dim, 1)
        return torch.cat([move, between + free], 1)


class DiffusionEncoder(nn.Module):
    """The whole posterior: a trunk that makes `features` numbers of x, heads for q(y_T | x) and the class, the steps.

    q(y_T | x) starts at N(0, I) for every x.
    """

    def __init__(
        self,
        trunk: nn.Module,
        features: int,
        noise: LatentNoise,
        dim: int,
        config: ReverseConfig,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.trunk, self.dim, self.noise, self.classes = trunk, dim, noise, config.classes
        self.start = nn.Linear(features, 2 * dim)
        self.classifier = nn.Linear(features, config.classes) if config.classes > 1 else None
        for layer in (self.start, self.classifier):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.reverse = ReverseDiffusion(noise, dim, features, config, generator)

    def encode(self, x: Float[Tensor, "n D"]) -> Encoded:
        """Everything that depends on x alone."""
        features = self.trunk(x)
        mean, log_sd = self.start(features).chunk(2, 1)
        logits = None if self.classifier is None else self.classifier(features)
        bent = log_sd + (log_sd.clamp(SMALLEST, LARGEST) - log_sd).detach()
        return Encoded(mean, bent, self.reverse.context(features), logits)

    def run(self, encoded: Encoded, noise: Float[Tensor, "T+1 m d"]) -> Chain:
        """m = n k chains, k for each of the n observations, all observations' first chain first."""
        mean, log_sd, context = _repeat(encoded, noise.shape[1])
        return run_chain(mean, log_sd, self.reverse.kernel(context), noise)

    @torch.no_grad()
    def draw(self, encoded: Encoded, noise: Float[Tensor, "T+1 m d"]) -> Float[Tensor, "m d"]:
        """The ends of the same chains, without densities and gradients."""
        mean, log_sd, context = _repeat(encoded, noise.shape[1])
        return run_to_end(mean, log_sd, self.reverse.kernel(context), noise)


def _repeat(encoded: Encoded, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    tensors = encoded.start_mean, encoded.start_log_sd, encoded.context
    k = rows // len(encoded.context)
    mean, log_sd, context = tensors if k == 1 else (tensor.repeat(k, 1) for tensor in tensors)
    return mean, log_sd, context


def _weight(outputs: int, inputs: int, generator: torch.Generator) -> nn.Parameter:
    """Variance 1 / inputs, that of torch's own start times three: SiLU halves what goes through it."""
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs))


def _affine(noise: LatentNoise, config: ReverseConfig) -> tuple[Tensor, Tensor, Tensor]:
    """For each time: the share of y_t in the mean; scales of the head's three parts; the log sd at a head of zero."""
    left, log_beta = (1 - noise.abar).sqrt(), noise.beta.log()
    if config.mean == "noise":
        carry, scale = 1 / noise.alpha.sqrt(), -noise.beta / (left * noise.alpha.sqrt())
    elif config.mean == "raw":
        carry, scale = torch.zeros_like(left), torch.ones_like(left)
    else:
        carry, scale = noise.w1 + noise.w0 * noise.abar.sqrt(), noise.w0 * left
    between = torch.zeros_like(noise.beta)
    free = torch.ones_like(noise.beta)
    if config.variance == "learned":
        between[2:] = 0.5 * (log_beta - noise.btilde.log())[2:]
    else:
        free[2:] = 0.0
    base = 0.5 * log_beta
    if config.variance == "btilde":
        base[2:] = 0.5 * noise.btilde[2:].log()
    scales = torch.stack([scale, between, free], 1)
    for table in (carry, scales, base):
        table[0] = 0.0
    return carry, scales, base

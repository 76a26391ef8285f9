"""Decoders z -> parameters of the likelihood, and the trunks of encoders x -> features.

Images are rows of height * width * channels numbers, channels last. Weights start uniform on +-1/sqrt(fan in), from the
generator given (None: torch's own). Trunks centre and scale their inputs by what `fit_scales` saw; missing numbers
(NaN) become the mean, and a second set of first-layer weights, zero at the start, is told which ones they were.
"""

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)
Shape = tuple[int, int, int]
"""(height, width, channels)."""

FARTHEST = 10.0
"""Standardised inputs are clamped to this: a pixel that was hardly ever lit must not drown the others."""
NUMBERS_AT_ONCE = 1 << 19


class MlpDecoder(nn.Module):
    """An MLP with SiLU: z (..., d) to (..., outputs); without hidden layers, an affine map."""

    def __init__(self, d: int, hidden: Sequence[int], outputs: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.net = _layers((d, *hidden, outputs), generator)

    def forward(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n P"]:
        """Outputs for each z."""
        out: Tensor = self.net(z)
        return out


class ConvDecoder(nn.Module):
    """Two transposed convolutions from a quarter of the size: z (..., d) to (..., height * width * channels * each).

    `each` is how many numbers the likelihood needs for one entry of the image, next to each other.
    """

    def __init__(
        self, d: int, shape: Shape, each: int = 1, generator: torch.Generator | None = None, width: int = 32
    ) -> None:
        super().__init__()
        self.shape, self.each = tuple(shape), each
        self.small = (2 * width, -(-shape[0] // 4), -(-shape[1] // 4))
        self.first = nn.Sequential(
            _linear(d, 128, generator), nn.SiLU(), _linear(128, math.prod(self.small), generator)
        )
        self.net = nn.Sequential(
            nn.SiLU(),
            _start(nn.utils.skip_init(nn.ConvTranspose2d, 2 * width, 2 * width, 4, 2, 1), generator),
            nn.SiLU(),
            _start(nn.utils.skip_init(nn.ConvTranspose2d, 2 * width, width, 4, 2, 1), generator),
            nn.SiLU(),
            _start(nn.utils.skip_init(nn.Conv2d, width, shape[2] * each, 3, 1, 1), generator),
        )

    def forward(self, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n P"]:
        """Outputs for each z."""
        height, width, channels = self.shape
        flat = self.first(z.reshape(-1, z.shape[-1]))
        images = self.net(flat.reshape(-1, *self.small))[..., :height, :width]
        images = images.unflatten(1, (channels, self.each)).permute(0, 3, 4, 1, 2)
        return images.reshape(*z.shape[:-1], -1)


class MlpTrunk(nn.Module):
    """x (n, D) to features (n, out): hidden layers and the features themselves all end in a SiLU."""

    mean: Tensor
    scale: Tensor

    def __init__(self, columns: int, hidden: Sequence[int], out: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        sizes = (columns, *hidden, out)
        self.first = _linear(sizes[0], sizes[1], generator)
        self.rest = nn.Sequential(nn.SiLU(), *([_layers(sizes[1:], generator), nn.SiLU()] if hidden else []))
        self.mask = nn.utils.skip_init(nn.Linear, columns, sizes[1], bias=False)
        nn.init.zeros_(self.mask.weight)
        self.register_buffer("mean", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))

    def fit_scales(self, x: Float[Tensor, "N D"]) -> None:
        """Centre and scale columns as in x; NaN is passed over."""
        mean, sd = column_scales(x)
        self.mean.copy_(mean)
        self.scale.copy_(sd)

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n p"]:
        """Features of each row."""
        missing = x.isnan()
        u = ((x - self.mean) / self.scale).clamp(-FARTHEST, FARTHEST)
        if missing.any():
            first = self.first(u.masked_fill(missing, 0.0)) + self.mask(missing.to(u.dtype))
        else:
            first = self.first(u)
        features: Tensor = self.rest(first)
        return features


def mlp_trunk(columns: int, hidden: Sequence[int], out: int, generator: torch.Generator | None = None) -> MlpTrunk:
    """The trunk of an encoder of rows of numbers."""
    return MlpTrunk(columns, hidden, out, generator)


class ConvTrunk(nn.Module):
    """Images x (n, height * width * channels) to features (n, out): three convolutions, two of stride 2, and SiLU."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: Shape, out: int, generator: torch.Generator | None = None, width: int = 32) -> None:
        super().__init__()
        self.shape = tuple(shape)
        height, wide, channels = shape
        self.first = _start(nn.utils.skip_init(nn.Conv2d, channels, width, 3, 1, 1), generator)
        self.mask = nn.utils.skip_init(nn.Conv2d, channels, width, 3, 1, 1, bias=False)
        nn.init.zeros_(self.mask.weight)
        numbers = 2 * width * -(-height // 4) * -(-wide // 4)
        self.rest = nn.Sequential(
            nn.SiLU(),
            _start(nn.utils.skip_init(nn.Conv2d, width, 2 * width, 3, 2, 1), generator),
            nn.SiLU(),
            _start(nn.utils.skip_init(nn.Conv2d, 2 * width, 2 * width, 3, 2, 1), generator),
            nn.SiLU(),
            nn.Flatten(),
            _linear(numbers, out, generator),
            nn.SiLU(),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def fit_scales(self, x: Float[Tensor, "N D"]) -> None:
        """Centre and scale channels as in x; NaN is passed over."""
        mean, sd = column_scales(x.reshape(-1, self.shape[2]))
        self.mean.copy_(mean)
        self.scale.copy_(sd)

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n p"]:
        """Features of each image."""
        images = x.reshape(-1, *self.shape)
        missing = images.isnan()
        u = ((images - self.mean) / self.scale).clamp(-FARTHEST, FARTHEST)
        if missing.any():
            u = u.masked_fill(missing, 0.0)
            told = self.mask(missing.to(u.dtype).permute(0, 3, 1, 2))
            first = self.first(u.permute(0, 3, 1, 2)) + told
        else:
            first = self.first(u.permute(0, 3, 1, 2))
        features: Tensor = self.rest(first)
        return features


def column_scales(x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and standard deviation of each column, NaN left out, block by block in float64; sd 1 where nothing moves."""
    count = torch.zeros(x.shape[1], dtype=torch.float64)
    mean, squares = count.clone(), count.clone()
    for part in x.split(max(1, NUMBERS_AT_ONCE // x.shape[1])):
        block = part.double()
        there = torch.full_like(count, len(block))
        if bool(block.sum().isnan()):
            missing = block.isnan()
            there = len(block) - missing.sum(0).double()
            own = block.nansum(0) / there.clamp_min(1)
            block = torch.where(missing, own, block)
        else:
            own = block.mean(0)
        # two blocks' squares in one (Chan, Golub & LeVeque 1983): the rows are read once
        count, before = count + there, count
        share = there / count.clamp_min(1)
        squares += (block - own).square_().sum(0) + (own - mean).square() * before * share
        mean += (own - mean) * share
    sd = (squares / count.clamp_min(1)).sqrt()
    moving = sd > 1e-7 * mean.abs()
    kind = x.dtype if x.is_floating_point() else torch.float32
    return mean.to(kind), torch.where(moving, sd, torch.ones_like(sd)).to(kind)


def _layers(sizes: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    """Linear layers of these sizes with SiLU between them."""
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        parts += [_linear(inputs, outputs, generator), nn.SiLU()]
    return nn.Sequential(*parts[:-1])


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    return _start(nn.utils.skip_init(nn.Linear, inputs, outputs), generator)


def _start(layer: _Module, generator: torch.Generator | None) -> _Module:
    """Weights and biases uniform on +-1/sqrt(fan in)."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    # each output of a transposed convolution of stride 2 sees a quarter of its kernel's places
    fan = weight.shape[0] * weight[0, 0].numel() // 4 if transposed else weight[0].numel()
    with torch.no_grad():
        for parameter in (weight, bias):
            parameter.uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan), generator=generator)
    return layer

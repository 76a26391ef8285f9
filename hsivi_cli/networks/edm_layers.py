"""Layers of EDM's networks (Karras et al., arXiv 2206.00364, appendix F.2): blocks of DDPM++, NCSN++ and ADM."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

MAX_GROUPS, LEAST_OF_GROUP = 32, 4


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(min(MAX_GROUPS, channels // LEAST_OF_GROUP), channels, eps=eps)


def sinusoids(values: Float[Tensor, " n"], channels: int, endpoint: bool) -> Float[Tensor, "n channels"]:
    """Cosines, then sines, of frequencies 1 to 1e-4 (which is reached where `endpoint`)."""
    half = channels // 2
    powers = torch.arange(half, dtype=torch.float32, device=values.device) / (half - int(endpoint))
    angles = values[:, None] * 1e-4 ** powers.to(values.dtype)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Resample(nn.Module):
    """Halve or double height and width with the separable filter `taps` (1, 1 averages and repeats pixels)."""

    kernel: Tensor

    def __init__(self, taps: tuple[int, ...], up: bool) -> None:
        super().__init__()
        self.up, self.padding, self.box = up, (len(taps) - 1) // 2, taps == (1, 1)
        with torch.device("cpu"):  # also where a network is built without memory
            line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        # doubling spreads each pixel over four
        self.register_buffer("kernel", torch.outer(line, line)[None, None] * (4 if up else 1), persistent=False)

    def forward(self, x: Float[Tensor, "n c h w"], pad: bool = True) -> Float[Tensor, "n c h2 w2"]:
        """The resampled image; without `pad` the border must be there already (halving only)."""
        if self.box and pad:
            return functional.interpolate(x, scale_factor=2.0) if self.up else functional.avg_pool2d(x, 2)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        padding = self.padding if pad else 0
        if self.up:
            return functional.conv_transpose2d(x, kernel, stride=2, padding=padding, groups=channels)
        return functional.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


class EDMBlock(nn.Module):
    """A residual block that may resample first and attend last; its sums are multiplied by `skip_scale`.

    With `adaptive`, the embedding scales and shifts the second norm (ADM); else it is added before it (DDPM++).
    `heads` 0 means no attention. `project` gives the skip a 1x1 convolution where the size changes, not only where the
    number of channels does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        heads: int = 0,
        resample: str = "",
        taps: tuple[int, ...] = (1, 1),
        adaptive: bool,
        project: bool,
        skip_scale: float,
        eps: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.adaptive, self.skip_scale = adaptive, skip_scale
        self.resample = Resample(taps, up=resample == "up") if resample else None
        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding, out_channels * (2 if adaptive else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels or (project and resample != "")
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if changes else None
        if heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "n c h w"], embedding: Float[Tensor, "n e"]) -> Float[Tensor, "n c2 h2 w2"]:
        """The block's output; `embedding` has its last SiLU behind it."""
        hidden = functional.silu(self.norm0(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self.conv0(hidden)
        condition = self.affine(embedding)[:, :, None, None]
        if self.adaptive:
            scale, shift = condition.chunk(2, 1)
            hidden = self.norm1(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm1(hidden + condition)
        hidden = self.conv1(self.dropout(functional.silu(hidden)))
        x = (hidden + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (x + self._attend(x)) * self.skip_scale if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        # rows of qkv: head, then channel, then which of q, k and v
        rows = self.qkv(self.norm2(x)).unflatten(1, (self.heads, -1, 3)).flatten(4)
        q, k, v = (part.transpose(-1, -2) for part in rows.unbind(3))
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        out: Tensor = self.proj(attended.reshape(x.shape))
        return out


class FilteredConvolution(nn.Module):
    """A 3x3 convolution and the filter that halves its result, on one common border (NCSN++'s residual input)."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.resample = Resample(taps, up=False)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """The filtered convolution."""
        hidden = functional.conv2d(x, self.weight, padding=1 + self.resample.padding)
        return self.resample(hidden, pad=False) + self.bias[:, None, None]

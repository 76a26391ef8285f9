"""GroupNorm and SiLU in one pass, with a UNet block's time embedding folded in: `silu(scale_shift(norm(x + temb)))`.

Eager torch moves an activation five times (GroupNorm reads twice and writes, SiLU reads and writes), and twice more for
the time embedding. Where a group fits a program's registers the kernel reads once and writes once; otherwise it reads
twice, the second time mostly from the cache. Statistics and arithmetic are float32, the output has x's type.

A program owns the groups of one sample that lie side by side in memory: one group in NCHW, as many as fill a memory
sector in channels_last. Every sum is taken about a shift close to the group's mean, so that a mean of 1e4 costs no
digits, and tiles are merged as in Chan, Golub & LeVeque (1983); no atomics, so equal inputs give equal bits.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from hsivi_cli.kernels.choice import Kernels, use_triton
from hsivi_cli.kernels.group_norm_silu_backward import backward_kernel
from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.tiles import dense, geometry, make_plan, to_channels, to_groups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD_TILE, BACKWARD_TILE = 8192, 4096  # elements a program can keep in registers


def group_norm_silu(
    x: Float[Tensor, "n c *pixels"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    groups: int,
    eps: float = 1e-5,
    temb: Float[Tensor, "n c"] | None = None,
    scale: Float[Tensor, "n c"] | None = None,
    shift: Float[Tensor, "n c"] | None = None,
    kernels: Kernels = "auto",
) -> Float[Tensor, "n c *pixels"]:
    """`silu(h * (1 + scale) + shift)`, `h = group_norm(x + temb)`; differentiable once in every tensor.

    `scale` and `shift` go together. With the kernel the output has x's type and memory format (a tensor that is neither
    NCHW nor channels_last is copied first); without it this is torch's own sequence.
    """
    if x.ndim < 3 or x.shape[1] % groups or (scale is None) != (shift is None):
        raise ValueError(f"group_norm_silu: {tuple(x.shape)} in {groups} groups, or scale without shift")
    fits = x.dtype in DTYPES and 0 < x[0].numel() < 2**31 if len(x) else False
    if fits and use_triton(kernels, x):
        return GroupNormSiLU.apply(x, weight, bias, groups, eps, temb, scale, shift)
    return composite(x, weight, bias, groups, eps, temb, scale, shift)


def composite(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    temb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The same by torch's own operations, in diffusers' order (ResnetBlock2D); in float64 it is the reference."""
    ones = [1] * (x.ndim - 2)
    if temb is not None:
        x = x + temb.reshape(*temb.shape, *ones)
    h = F.group_norm(x, groups, weight, bias, eps)
    if scale is not None and shift is not None:
        h = h * (1 + scale.reshape(*scale.shape, *ones)) + shift.reshape(*shift.shape, *ones)
    return F.silu(h, inplace=not h.requires_grad)  # h is ours alone: one activation less to allocate


@jit()
def merge_tile(d, mask, count, member, mean, squares, seen):
    """Mean and sum of squares about it, over the `seen` elements a group had before and the `count` of this tile."""
    tile_mean = to_groups(tl.sum(d, 1), member) / count
    d = tl.where(mask, d - to_channels(tile_mean, member)[:, None], 0.0)
    share = count / (seen + count)
    delta = tile_mean - mean
    squares += to_groups(tl.sum(d * d, 1), member) + delta * delta * (seen * share)
    return mean + delta * share, squares


@jit()
def forward_kernel(
    x, weight, bias, temb, scale, shift, out, stats,
    channels, pixels, groups, per_group, eps, sample_stride, channel_stride, pixel_stride, temb_stride, scale_stride,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, SINGLE: tl.constexpr,
    HAS_TEMB: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Groups `GROUPS * (pid % blocks) ..` of sample `pid // blocks`; `stats`: shifts of x and temb, mean, 1 / std."""
    blocks = (groups + GROUPS - 1) // GROUPS
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * GROUPS
    c = tl.arange(0, CHANNELS)
    g = tl.arange(0, GROUPS)
    channel = first * per_group + c
    inside = (c < GROUPS * per_group) & (channel < channels)
    member = (c[None, :] // per_group == g[:, None]) & inside[None, :]
    p = tl.arange(0, PIXELS)
    offset = channel[:, None] * channel_stride + p[None, :] * pixel_stride  # int32: addresses are most of the registers
    x += sample * sample_stride
    out += sample * sample_stride

    # the shifts, means of the first tile and of the group's time embedding: what is left is small, whatever they are
    mask = inside[:, None] & (p[None, :] < pixels)
    tile = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    shift_g = to_groups(tl.sum(tile, 1), member) / (per_group * tl.minimum(pixels, PIXELS))
    shift_c = to_channels(shift_g, member)
    embedding = tl.zeros([CHANNELS], tl.float32)
    embedding_g = tl.zeros([GROUPS], tl.float32)
    if HAS_TEMB:
        embedding = tl.load(temb + sample * temb_stride + channel, mask=inside, other=0.0).to(tl.float32)
        embedding_g = to_groups(embedding, member) / per_group
        embedding -= to_channels(embedding_g, member)

    mean = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    d = tl.where(mask, (tile - shift_c[:, None]) + embedding[:, None], 0.0)
    count = (per_group * tl.minimum(pixels, PIXELS)).to(tl.float32)
    mean, squares = merge_tile(d, mask, count, member, mean, squares, 0.0)
    if not SINGLE:
        for start in range(PIXELS, pixels, PIXELS):
            more = inside[:, None] & (start + p[None, :] < pixels)
            d = tl.load(x + offset + start * pixel_stride, mask=more, other=0.0).to(tl.float32)
            d = tl.where(more, (d - shift_c[:, None]) + embedding[:, None], 0.0)
            count = (per_group * tl.minimum(pixels - start, PIXELS)).to(tl.float32)
            mean, squares = merge_tile(d, more, count, member, mean, squares, (per_group * start).to(tl.float32))
    rstd = 1.0 / tl.sqrt(squares / (per_group * pixels) + eps)

    row = stats + (sample * groups + first + g) * 4
    kept = first + g < groups
    tl.store(row, shift_g, mask=kept)
    tl.store(row + 1, embedding_g, mask=kept)
    tl.store(row + 2, mean, mask=kept)
    tl.store(row + 3, rstd, mask=kept)

    slope = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    intercept = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale + sample * scale_stride + channel, mask=inside, other=0.0).to(tl.float32)
        slope *= factor
        intercept = intercept * factor + tl.load(shift + sample * scale_stride + channel, mask=inside).to(tl.float32)
    slope *= to_channels(rstd, member)
    embedding -= to_channels(mean, member)
    if SINGLE:
        v = ((tile - shift_c[:, None]) + embedding[:, None]) * slope[:, None] + intercept[:, None]
        tl.store(out + offset, (v / (1.0 + tl.exp(-v))).to(out.dtype.element_ty), mask=mask)
    else:
        for start in range(0, pixels, PIXELS):
            more = inside[:, None] & (start + p[None, :] < pixels)
            d = tl.load(x + offset + start * pixel_stride, mask=more, other=0.0).to(tl.float32)
            v = ((d - shift_c[:, None]) + embedding[:, None]) * slope[:, None] + intercept[:, None]
            y = (v / (1.0 + tl.exp(-v))).to(out.dtype.element_ty)
            tl.store(out + offset + start * pixel_stride, y, mask=more)


class GroupNormSiLU(torch.autograd.Function):
    """The kernel and its backward; the arguments are those of `group_norm_silu`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        temb: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        """Run the kernel, keep x and four numbers a group."""
        x, channels_last = dense(x)
        out = torch.empty_like(x)
        temb, scale, shift = (None if v is None else v.contiguous() for v in (temb, scale, shift))
        stats = torch.empty(len(x), groups, 4, device=x.device)
        plan = make_plan(x.shape, groups, channels_last, x.element_size(), FORWARD_TILE)
        with torch.cuda.device_of(x):
            forward_kernel[plan.grid](
                x, weight, bias, temb, scale, shift, out, stats, *geometry(x, groups, eps, channels_last),
                **plan.constants, HAS_TEMB=temb is not None, HAS_SCALE=scale is not None, num_warps=plan.warps,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, temb, scale, shift, stats)
        ctx.groups, ctx.eps, ctx.channels_last = groups, eps, channels_last
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One kernel for dx and sums a sample and channel; the rest are sums over the batch."""
        x, weight, bias, temb, scale, shift, stats = ctx.saved_tensors
        memory_format = torch.channels_last if ctx.channels_last else torch.contiguous_format
        grad = grad.contiguous(memory_format=memory_format)
        dx = torch.empty_like(x)
        # sums over pixels: dv * x_hat, dv, and dx
        sums = torch.empty(3, *x.shape[:2], device=x.device)
        plan = make_plan(x.shape, ctx.groups, ctx.channels_last, x.element_size(), BACKWARD_TILE)
        with torch.cuda.device_of(x):
            backward_kernel[plan.grid](
                grad, x, weight, bias, temb, scale, shift, stats, dx, sums, len(x) * x.shape[1],
                *geometry(x, ctx.groups, ctx.eps, ctx.channels_last),
                **plan.constants, HAS_TEMB=temb is not None, HAS_SCALE=scale is not None, num_warps=plan.warps,
            )  # fmt: skip
        slope, intercept, dtemb = sums
        dscale = dshift = None
        if scale is not None:
            dscale, dshift = slope * weight + intercept * bias, intercept.to(shift.dtype)
            dscale = dscale.to(scale.dtype)
            slope, intercept = slope * (1 + scale.float()), intercept * (1 + scale.float())
        dtemb = None if temb is None else dtemb.to(temb.dtype)
        dweight, dbias = slope.sum(0).to(weight.dtype), intercept.sum(0).to(bias.dtype)
        return dx, dweight, dbias, None, None, dtemb, dscale, dshift

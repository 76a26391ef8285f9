"""The backward kernel of `group_norm_silu`: one program a sample and group, no atomics.

With x_hat the normalised input, v = a x_hat + b (a, b: affine and scale-shift in one), y = silu(v), and means over the
group's M elements: `dx = rstd (a dv - mean(a dv) - x_hat mean(a dv x_hat))`; the sums over pixels of `dv x_hat`, `dv`
and `dx` give the gradients of everything that is constant over pixels.
"""

from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.tiles import to_channels, to_groups


@jit()
def terms(x, grad, offset, mask, shift, centre, rstd, slope, intercept):
    """`x_hat` and `dv` of a tile; both 0 outside of `mask`."""
    tile = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    hat = tl.where(mask, ((tile - shift[:, None]) + centre[:, None]) * rstd[:, None], 0.0)
    v = hat * slope[:, None] + intercept[:, None]
    sigmoid = 1.0 / (1.0 + tl.exp(-v))
    dy = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
    return hat, dy * sigmoid * (1.0 + v * (1.0 - sigmoid))


@jit()
def backward_kernel(
    grad, x, weight, bias, temb, scale, shift, stats, dx, sums, sums_stride,
    channels, pixels, groups, per_group, eps, sample_stride, channel_stride, pixel_stride, temb_stride, scale_stride,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, SINGLE: tl.constexpr,
    HAS_TEMB: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """The groups that the forward kernel's program has; `sums` is (3, n, c): of dv x_hat, dv and dx."""
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
    dx += sample * sample_stride
    grad += sample * sample_stride

    row = stats + (sample * groups + first + c // per_group) * 4
    shift_c = tl.load(row, mask=inside, other=0.0)
    rstd = tl.load(row + 3, mask=inside, other=0.0)
    centre = -tl.load(row + 2, mask=inside, other=0.0)
    if HAS_TEMB:
        embedding = tl.load(temb + sample * temb_stride + channel, mask=inside, other=0.0).to(tl.float32)
        centre += embedding - tl.load(row + 1, mask=inside, other=0.0)
    slope = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    intercept = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        factor = 1.0 + tl.load(scale + sample * scale_stride + channel, mask=inside, other=0.0).to(tl.float32)
        slope *= factor
        intercept = intercept * factor + tl.load(shift + sample * scale_stride + channel, mask=inside).to(tl.float32)

    mask = inside[:, None] & (p[None, :] < pixels)
    hat, dv = terms(x, grad, offset, mask, shift_c, centre, rstd, slope, intercept)
    sum_slope = tl.sum(dv * hat, 1)
    sum_intercept = tl.sum(dv, 1)
    sum_hat = tl.sum(hat, 1)
    if not SINGLE:
        for start in range(PIXELS, pixels, PIXELS):
            mask = inside[:, None] & (start + p[None, :] < pixels)
            hat, dv = terms(x, grad, offset + start * pixel_stride, mask, shift_c, centre, rstd, slope, intercept)
            sum_slope += tl.sum(dv * hat, 1)
            sum_intercept += tl.sum(dv, 1)
            sum_hat += tl.sum(hat, 1)

    size = per_group * pixels
    mean_c = to_channels(to_groups(slope * sum_intercept, member) / size, member)
    along_c = to_channels(to_groups(slope * sum_slope, member) / size, member)
    out = sums + sample * channels + channel
    tl.store(out, sum_slope, mask=inside)
    tl.store(out + sums_stride, sum_intercept, mask=inside)
    sum_dx = rstd * (slope * sum_intercept - pixels * mean_c - along_c * sum_hat)
    tl.store(out + 2 * sums_stride, sum_dx, mask=inside)

    if SINGLE:
        d = rstd[:, None] * (dv * slope[:, None] - mean_c[:, None] - hat * along_c[:, None])
        tl.store(dx + offset, d.to(dx.dtype.element_ty), mask=mask)
    else:
        for start in range(0, pixels, PIXELS):
            mask = inside[:, None] & (p[None, :] + start < pixels)
            hat, dv = terms(x, grad, offset + start * pixel_stride, mask, shift_c, centre, rstd, slope, intercept)
            d = rstd[:, None] * (dv * slope[:, None] - mean_c[:, None] - hat * along_c[:, None])
            tl.store(dx + offset + start * pixel_stride, d.to(dx.dtype.element_ty), mask=mask)

"""One layer of the chain in one pass: `x' = A x + B eps + c1 exp(log_gamma) z`, the noise z drawn inside.

Eager torch writes and reads z and five intermediate images; here x and eps are read and x' is written, nothing else.
The last layer adds no noise and can write the picture itself: `round((clamp(x', -1, 1) + 1) * 127.5)` as uint8.
The layer's formula is `transitions.gaussian_layer` (arXiv 2310.17153), the noise is `kernels.philox`.
"""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.philox import normals, philox_normals
from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.samples import BLOCK, flat, grid, like, locate, pick, runs, strides


def hsivi_step(
    x: Float[Tensor, "n c h w"],
    eps: Float[Tensor, "n c h w"],
    a: float,
    b: float,
    c1: float = 0.0,
    log_gamma: Float[Tensor, "..."] | None = None,
    streams: Int64[Tensor, "n 2"] | None = None,
    layer: int = 0,
    kernels: Kernels = "auto",
) -> Float[Tensor, "n c h w"]:
    """The layer's output, of x's type and memory format; without `streams` its mean, as in the last layer.

    `log_gamma` is this layer's own: a scalar, or a map `(c, h, w)`. `layer` and `streams` name the noise.
    """
    check(x, eps, log_gamma, streams)
    if runs(kernels, x):
        out = like(x)
        launch(x, eps, out, a, b, c1, log_gamma, streams, layer)
        return out
    return step_reference(x, eps, a, b, c1, log_gamma, streams, layer)


def final_step(
    x: Float[Tensor, "n c h w"], eps: Float[Tensor, "n c h w"], a: float, b: float, kernels: Kernels = "auto"
) -> UInt8[Tensor, "n h w c"]:
    """The last layer, quantised; NaN becomes 0, so that whoever wants to know must look at `eps`."""
    check(x, eps, None, None)
    if runs(kernels, x):
        out = torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
        launch(x, eps, out, a, b, 0.0, None, None, 0)
        return out.permute(0, 2, 3, 1)
    return quantise(step_reference(x, eps, a, b)).permute(0, 2, 3, 1).contiguous()


def check(x: Tensor, eps: Tensor, log_gamma: Tensor | None, streams: Tensor | None) -> None:
    """Raise ValueError for shapes that do not belong together; the kernel trusts them."""
    map_fits = log_gamma is None or log_gamma.ndim == 0 or log_gamma.shape == x.shape[1:]
    if x.ndim != 4 or eps.shape != x.shape or not map_fits or (streams is not None and streams.shape != (len(x), 2)):
        shapes = [None if v is None else tuple(v.shape) for v in (x, eps, log_gamma, streams)]
        raise ValueError(f"hsivi_step: x, eps, log_gamma and streams of shapes {shapes} do not fit")


def step_reference(
    x: Tensor,
    eps: Tensor,
    a: float,
    b: float,
    c1: float = 0.0,
    log_gamma: Tensor | None = None,
    streams: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """The same by torch's own operations; with x and eps in float64 it is the reference."""
    out = a * x + b * eps.to(x.dtype)
    if streams is None or c1 == 0:
        return out
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    std = c1 if log_gamma is None else c1 * log_gamma.to(kind).exp()
    return out + (std * normals(streams, layer, tuple(x.shape[1:]), kind)).to(x.dtype)


def quantise(x: Tensor) -> UInt8[Tensor, "..."]:
    """Images in [-1, 1] to the nearest of 256 levels; ties to even, NaN to 0."""
    levels = (x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).clamp(-1, 1) + 1) * 127.5
    return levels.nan_to_num(0.0).round().to(torch.uint8)


def launch(
    x: Tensor,
    eps: Tensor,
    out: Tensor,
    a: float,
    b: float,
    c1: float,
    log_gamma: Tensor | None,
    streams: Tensor | None,
    layer: int,
) -> None:
    """Write the step into `out`; any strides will do."""
    pixels = x.shape[2] * x.shape[3]
    x, eps = flat(x), flat(eps)
    noisy = streams is not None and c1 != 0
    per_element = log_gamma is not None and log_gamma.ndim > 0
    log_gamma = None if log_gamma is None else log_gamma.contiguous()
    streams = None if streams is None else streams.contiguous()
    with torch.cuda.device_of(x):
        step_kernel[grid(x)](
            x, eps, out, log_gamma, streams, layer, a, b, c1, x[0].numel(), pixels, *strides(x, eps, out),
            NOISE=noisy, GAMMA=log_gamma is not None and noisy, PER_ELEMENT=per_element,
            QUANTISE=out.dtype == torch.uint8, BLOCK=BLOCK,
        )  # fmt: skip


@jit(do_not_specialize=["layer", "a", "b", "c1"])
def step_kernel(
    x, eps, out, log_gamma, streams, layer, a, b, c1, elements, pixels,
    x_n, x_c, x_p, eps_n, eps_c, eps_p, out_n, out_c, out_p,
    NOISE: tl.constexpr, GAMMA: tl.constexpr, PER_ELEMENT: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Four elements a Philox block, a quarter of the sample apart; the grid is (samples, blocks of BLOCK)."""
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += sample * x_n
    eps += sample * eps_n
    out += sample * out_n
    z0 = tl.zeros([BLOCK], tl.float32)
    z1, z2, z3 = z0, z0, z0
    std = c1
    if NOISE:
        seed = tl.load(streams + 2 * sample)
        index = tl.load(streams + 2 * sample + 1)
        z0, z1, z2, z3 = philox_normals(seed, index, layer, block)
        if GAMMA and not PER_ELEMENT:
            std = c1 * tl.exp(tl.load(log_gamma).to(tl.float32))
    for lane in tl.static_range(4):
        element, channel, pixel, mask = locate(block, elements, pixels, lane)
        mean = a * tl.load(x + channel * x_c + pixel * x_p, mask=mask, other=0.0).to(tl.float32)
        mean += b * tl.load(eps + channel * eps_c + pixel * eps_p, mask=mask, other=0.0).to(tl.float32)
        if NOISE:
            z = pick(z0, z1, z2, z3, lane)
            if PER_ELEMENT:
                mean += c1 * tl.exp(tl.load(log_gamma + element, mask=mask, other=0.0).to(tl.float32)) * z
            else:
                mean += std * z
        place = out + channel * out_c + pixel * out_p
        if QUANTISE:
            level = (tl.minimum(tl.maximum(mean, -1.0), 1.0) + 1.0) * 127.5
            level = tl.where(mean == mean, level, 0.0)
            # adding 1.5 * 2^23 leaves no room for a fraction: rounds to even, as torch does
            tl.store(place, ((level + 12582912.0) - 12582912.0).to(tl.int32).to(tl.uint8), mask=mask)
        else:
            tl.store(place, mean.to(out.dtype.element_ty), mask=mask)

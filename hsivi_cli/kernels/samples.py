"""How a kernel walks a batch of images in the order of its noise: Philox blocks, and strides of any memory format."""

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels, use_triton
from hsivi_cli.kernels.runtime import jit, tl

BLOCK = 256  # Philox blocks, of four elements each, that a program has
MOST = 65535 * 4 * BLOCK  # elements of a sample: the grid's second axis ends there
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(kernels: Kernels, *tensors: Tensor) -> bool:
    """Whether a kernel takes these batches of images; raises InputError where `kernels` insists and none can run."""
    fits = all(v.ndim == 4 and v.dtype in DTYPES and v.numel() > 0 and v[0].numel() <= MOST for v in tensors)
    return fits and use_triton(kernels, tensors[0])


def grid(x: Tensor) -> tuple[int, int]:
    """Programs for `x`: (samples, runs of BLOCK blocks)."""
    return len(x), -(-x[0].numel() // (4 * BLOCK))


def flat(x: Tensor) -> Tensor:
    """`x`, copied unless one stride walks all pixels of a channel, as in NCHW and channels_last."""
    one = 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3)
    return x if one else x.contiguous()


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output for a kernel: shaped as `x`, in its memory format where that is `flat`, else in NCHW."""
    out = torch.empty_like(x, dtype=dtype)
    return out if flat(out) is out else torch.empty_like(out, memory_format=torch.contiguous_format)


def per_sample(values: Float[Tensor, " n"], like: Float[Tensor, " n *shape"]) -> Float[Tensor, " n *ones"]:
    """One number a sample, shaped and typed to multiply `like`."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def strides(*tensors: Tensor) -> list[int]:
    """Strides of sample, channel and pixel of each `flat` tensor, in the order of the kernels' arguments."""
    # the stride of a dimension of one pixel means nothing
    return [s for v in tensors for s in (v.stride(0), v.stride(1), v.stride(3 if v.shape[3] > 1 else 2))]


@jit()
def locate(block, elements, pixels, LANE: tl.constexpr):
    """Which element of its sample lane LANE of each Philox block serves: element, channel, pixel, whether there is one.

    The four lanes of a block lie a quarter of the sample apart (kernels.philox).
    """
    quarter = (elements + 3) // 4
    element = block + LANE * quarter
    return element, element // pixels, element % pixels, (block < quarter) & (element < elements)


@jit()
def pick(z0, z1, z2, z3, LANE: tl.constexpr):
    """One lane of the four normals of each block."""
    z = z0
    if LANE == 1:
        z = z1
    if LANE == 2:
        z = z2
    if LANE == 3:
        z = z3
    return z

"""Nearest-neighbour upsampling and the 3 x 3 convolution behind it as one transposed convolution.

Each of the four pixels that an input pixel becomes sees 2 x 2 different inputs under its 3 x 3 kernel. Summing the
weights that meet the same input gives a transposed convolution with stride 2 and a 4 x 4 kernel: the same sums with
4/9 of the multiplications, and the enlarged activation is never made.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def summed_kernel(weight: Float[Tensor, "out c 3 3"]) -> Float[Tensor, "c out 4 4"]:
    """The transposed convolution's weights, differentiable in the convolution's: neighbours summed, both ways."""
    taps = weight.flip(2, 3).transpose(0, 1)
    rows = F.pad(taps, (0, 0, 0, 1)) + F.pad(taps, (0, 0, 1, 0))
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


def upsample_convolve(
    x: Float[Tensor, "n c h w"], kernel: Float[Tensor, "c out 4 4"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "n out 2h 2w"]:
    """As `upsample_convolve_reference`, up to rounding, for `kernel = summed_kernel(weight)`."""
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)


def upsample_convolve_reference(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "out c 3 3"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "n out 2h 2w"]:
    """The same as diffusers' Upsample2D computes it."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

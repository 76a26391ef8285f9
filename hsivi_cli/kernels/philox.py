"""Philox4x32-10 noise keyed by (seed of the sample, layer, element): the same on every device and in any batch.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A sample's stream is the pair (seed, index).
The key is the seed, the counter is (block, layer, index), so nothing depends on which other samples are drawn with it,
in which order, or by which process. A block gives four normals by Box-Muller; block b of Q = ceil(E / 4) serves the
elements b, Q + b, 2Q + b and 3Q + b of a sample, so that a kernel's loads of each of the four lie side by side.

The uniforms are exact in float32 wherever they are computed (one rounding), and so is the angle up to its product with
pi; normals therefore differ between devices only by the rounding of log, sqrt, sin and cos.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hsivi_cli.kernels.choice import Kernels, use_triton
from hsivi_cli.kernels.runtime import jit, tl
from hsivi_cli.kernels.samples import BLOCK, MOST

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key is raised by after every round
MASK = 0xFFFFFFFF
START = 0  # the "layer" of x_K, the chain's starting noise; the layers' own noise is 1, 2, ... as they are walked

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def make_streams(seed: int, indices: Iterable[int], device: torch.device | str = "cpu") -> Int64[Tensor, "n 2"]:
    """The streams of the samples `indices` of `seed`: a row (seed, index) each. Both below 2^63."""
    rows = [[seed, index] for index in indices]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).to(device)


@dataclass(frozen=True)
class Draw:
    """A draw of several streams that is named but not made, so that a kernel can make it where it needs it."""

    streams: Int64[Tensor, "n 2"]
    number: int
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def normals(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kernels: Kernels = "torch"
    ) -> Float[Tensor, " n *shape"]:
        """The draw itself, made once."""
        if (shape, dtype) not in self._made:
            self._made[shape, dtype] = normals(self.streams, self.number, shape, dtype, kernels)
        return self._made[shape, dtype]

    def part(self, rows: slice) -> "Draw":
        """The draw of some of the rows."""
        return Draw(self.streams[rows], self.number)


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four 32-bit words from four of counter and two of key; all int64 tensors with values in [0, 2^32), broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap at 2^64, which leaves both 32-bit halves right
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & MASK ^ c1 ^ k0, p1 & MASK, (p0 >> 32) & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def box_muller(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words (int64 tensors)."""
    u = x.to(torch.float32) * 2.0**-32 + 2.0**-33  # in (0, 1], never 0
    half_turns = torch.where(y >= 2**31, y - 2**32, y).to(torch.float32) * 2.0**-31  # in [-1, 1]
    angle = half_turns.to(dtype) * math.pi
    radius = (-2 * u.to(dtype).log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def normals(
    streams: Int64[Tensor, "n 2"],
    layer: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "torch",
) -> Float[Tensor, " n *shape"]:
    """Standard normals of one layer for every stream, on the streams' device; float64 is the kernels' reference.

    By torch they take some 200 operations, which a GPU would have to be told one by one: `kernels` makes it one.
    """
    if dtype == torch.float32 and math.prod(shape) <= MOST and use_triton(kernels, streams):
        return normals_triton(streams, layer, shape)
    return normals_of_layers(streams, range(layer, layer + 1), shape, dtype)[0]


def normals_of_layers(
    streams: Int64[Tensor, "n 2"], layers: range, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Float[Tensor, " k n *shape"]:
    """As `normals`, of several layers at once: no more operations than for one."""
    elements, device = math.prod(shape), streams.device
    block = torch.arange((elements + 3) // 4, device=device)
    layer = torch.arange(layers.start, layers.stop, layers.step, device=device)[:, None, None]
    seed, index = streams[:, :1], streams[:, 1:]
    key = (seed & MASK, (seed >> 32) & MASK)
    words = philox4x32((block, layer, index & MASK, (index >> 32) & MASK), key)
    lanes = [*box_muller(words[0], words[1], dtype), *box_muller(words[2], words[3], dtype)]
    return torch.cat(lanes, 2)[..., :elements].reshape(len(layers), len(streams), *shape)


@jit()
def philox_normals(seed, index, layer, block):
    """The four normals of each `block` (int32); `seed` and `index` are int64 scalars, `layer` an int32."""
    zero = block * 0
    x0, x1, x2, x3 = tl.philox(seed, block, zero + layer, zero + index.to(tl.int32), zero + (index >> 32).to(tl.int32))
    z0, z1 = box_muller_kernel(x0, x1)
    z2, z3 = box_muller_kernel(x2, x3)
    return z0, z1, z2, z3


@jit()
def box_muller_kernel(x, y):
    """As `box_muller`, for uint32 words."""
    u = x.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(u))
    # sin and cos of pi t for t in [-1, 1): the nearest quarter turn q, then Taylor series within pi / 4. The library's
    # functions would bring a branch for huge angles, and its stack
    t = y.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    q = tl.floor(2.0 * t + 0.5)
    a = (t - 0.5 * q) * 3.141592653589793
    a2 = a * a
    s = a + a * a2 * (-1 / 6 + a2 * (1 / 120 + a2 * (-1 / 5040 + a2 * (1 / 362880))))
    c = 1.0 + a2 * (-1 / 2 + a2 * (1 / 24 + a2 * (-1 / 720 + a2 * (1 / 40320 - a2 * (1 / 3628800)))))
    quarter = q.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    return radius * cos, radius * tl.where(quarter >= 2, -sin, sin)


@jit(do_not_specialize=["layer"])
def normals_kernel(out, streams, layer, elements, BLOCK: tl.constexpr):
    """Write a sample's normals; the grid is (samples, blocks of BLOCK)."""
    sample = tl.program_id(0)
    blocks = (elements + 3) // 4
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(streams + 2 * sample)
    index = tl.load(streams + 2 * sample + 1)
    z0, z1, z2, z3 = philox_normals(seed, index, layer, block)
    row = out + sample.to(tl.int64) * elements
    inside = block < blocks
    tl.store(row + block, z0, mask=inside & (block < elements))
    tl.store(row + blocks + block, z1, mask=inside & (blocks + block < elements))
    tl.store(row + 2 * blocks + block, z2, mask=inside & (2 * blocks + block < elements))
    tl.store(row + 3 * blocks + block, z3, mask=inside & (3 * blocks + block < elements))


def normals_triton(
    streams: Int64[Tensor, "n 2"], layer: int, shape: tuple[int, ...], block: int = BLOCK
) -> Float[Tensor, " n *shape"]:
    """As `normals` in float32, by one kernel."""
    elements = math.prod(shape)
    out = torch.empty(len(streams), *shape, device=streams.device)
    grid = (len(streams), -(-max((elements + 3) // 4, 1) // block))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):
        normals_kernel[grid](out, streams.contiguous(), layer, elements, BLOCK=block)
    return out

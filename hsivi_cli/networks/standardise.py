"""Shift and scale of parameters and observations, found from prior draws and simulated data, kept with the network."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hsivi_cli.errors import InputError

HEAVY = 20.0
"""A column with values so many robust standard deviations off its median has a heavy tail (N(0, 1): one in 10^88)."""
CONSTANT = 1e-9
"""A column whose spread is below this share of its size does not move."""
ROWS = 200_000
"""More rows do not tell more about a scale."""

Pooling = Literal["column", "last", "channel"]


class Standardiser(nn.Module):
    """`u = (v - shift) / scale`, a pair for each column of vectors, each column of the rows of a set, or each channel.

    Mean and standard deviation; median and interquartile range where the tails are heavy; scale 1 where a column does
    not move. With `squash`, heavy columns also go through asinh: for what enters a network, never for what a density is
    of. The buffers are float64 and part of the state dict; before `fit` it is the identity.
    """

    shift: Tensor
    scale: Tensor
    heavy: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, shape: tuple[int, ...], pooling: Pooling = "column", squash: bool = False) -> None:
        super().__init__()
        self.shape, self.pooling, self.squash = shape, pooling, squash
        size = shape if pooling == "column" else shape[-1:] if pooling == "last" else (shape[0], 1, 1)
        self.register_buffer("shift", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(size, dtype=torch.float64))
        self.register_buffer("heavy", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("lowest", torch.full(size, -torch.inf, dtype=torch.float64))
        self.register_buffer("highest", torch.full(size, torch.inf, dtype=torch.float64))

    def fit(self, values: Float[Tensor, " n *shape"]) -> None:
        """Find shift and scale. Rows with anything not finite are left out; raises InputError without two others."""
        values = values.detach().double().reshape(len(values), *self.shape)[:ROWS]
        values = values[torch.isfinite(values).flatten(1).all(1)]
        if len(values) < 2:
            raise InputError(f"{len(values)} finite rows to standardise by: two at least are needed")
        table = values.flatten(1)
        if self.pooling == "last":
            table = values.reshape(-1, self.shape[-1])
        elif self.pooling == "channel":
            table = values.transpose(0, 1).flatten(1).T
        shift, scale, heavy = robust_scales(table)
        for buffer, found in (
            (self.shift, shift),
            (self.scale, scale),
            (self.heavy, heavy),
            (self.lowest, table.amin(0)),
            (self.highest, table.amax(0)),
        ):
            buffer.copy_(found.reshape(buffer.shape))

    def forward(self, values: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Standardised values, float64; the last axes are those of `shape`."""
        u = (values.double() - self.shift) / self.scale
        return torch.where(self.heavy, torch.asinh(u), u) if self.squash else u

    def inverse(self, u: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The values again; for a standardiser without `squash`."""
        assert not self.squash
        return self.shift + self.scale * u.double()

    @property
    def log_jacobian(self) -> Float[Tensor, ""]:
        """Log of |du / dv|, what a density of u gains as one of v; columns only."""
        assert not self.squash
        assert self.pooling == "column"
        return -self.scale.log().sum()

    def beyond(self, values: Float[Tensor, " b *shape"]) -> Float[Tensor, " b"]:
        """How far the farthest entry lies outside of what was seen in `fit`, in scales: 0 within; NaN counts as inf."""
        values = values.double().reshape(len(values), *self.shape)
        off = torch.maximum(self.lowest - values, values - self.highest).clamp_min(0) / self.scale
        return off.nan_to_num(nan=torch.inf, posinf=torch.inf).flatten(1).amax(1)


def robust_scales(
    table: Float[Tensor, "n p"],
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"], Bool[Tensor, " p"]]:
    """Shift and scale of every column, and which ones have heavy tails."""
    quantiles = np.quantile(table.numpy(), [0.25, 0.5, 0.75], axis=0)
    lower, middle, upper = (torch.from_numpy(row) for row in quantiles)
    robust = (upper - lower) / 1.349  # the standard deviation of a Gaussian with these quartiles
    size = table.abs().amax(0)
    unit = size.clamp_min(torch.finfo(torch.float64).tiny)  # squares of huge or tiny numbers leave float64
    mean, sd = table.mean(0), (table / unit).std(0) * unit
    moving = robust > CONSTANT * size
    heavy = moving & ((table - middle).abs().amax(0) > HEAVY * robust)
    shift, scale = torch.where(heavy, middle, mean), torch.where(heavy, robust, sd)
    constant = ~(scale > CONSTANT * size)
    return torch.where(constant, middle, shift), torch.where(constant, torch.ones_like(scale), scale), heavy & ~constant

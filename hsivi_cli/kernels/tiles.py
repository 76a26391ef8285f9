"""How an activation is cut into the groups of its channels: launch plans, and sums over a group inside a kernel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsivi_cli.kernels.runtime import jit, next_power_of_2, tl

SECTOR = 32  # bytes a GPU fetches at least
A_WARP = 256  # elements a warp has of a tile; with twice that, threads need up to 164 registers, or spill
LOOP_TILE = 2048  # elements at a time where a group does not fit a program


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched: the grid, its compile-time constants and its warps."""

    grid: tuple[int]
    constants: dict[str, Any]
    warps: int


def make_plan(shape: torch.Size, groups: int, channels_last: bool, itemsize: int, tile: int) -> Plan:
    """Tiles for an activation `shape` in memory order NCHW or channels_last.

    `tile` is what a program keeps in registers at most.
    """
    samples, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    per_group = channels // groups
    together = 1
    while channels_last and together < groups and together * per_group * itemsize < SECTOR:
        together *= 2
    tile_channels = next_power_of_2(together * per_group)
    tile_pixels = next_power_of_2(pixels)
    single = tile_channels * tile_pixels <= tile
    if not single:
        tile_pixels = max(LOOP_TILE // tile_channels, 1)
    constants = {"GROUPS": together, "CHANNELS": tile_channels, "PIXELS": tile_pixels, "SINGLE": single}
    warps = min(max(tile_channels * tile_pixels // A_WARP, 1), 16)
    return Plan((samples * -(-groups // together),), constants, warps)


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """`x`, copied if it is neither NCHW nor channels_last, and whether it is channels_last."""
    if x.is_contiguous():
        return x, False
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(), False


def geometry(x: Tensor, groups: int, eps: float, channels_last: bool) -> tuple[int | float, ...]:
    """Sizes and strides of a dense activation, in the order of the kernels' arguments."""
    channels, pixels = x.shape[1], math.prod(x.shape[2:])
    strides = (1, channels) if channels_last else (pixels, 1)
    return channels, pixels, groups, channels // groups, eps, channels * pixels, *strides, channels, channels


@jit()
def to_channels(values, member):
    """One number a group, as one a channel; `member` (groups, channels) says which channel is whose."""
    return tl.sum(tl.where(member, values[:, None], 0.0), 0)


@jit()
def to_groups(values, member):
    """Sums over each group of one number a channel; a NaN stays in its group."""
    return tl.sum(tl.where(member, values[None, :], 0.0), 1)

"""What the converters of UNets share: renaming, joint q-k-v weights, and weights for layers that a network lacks."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError

Module = tuple[str, str]  # (name there, name in diffusers), without ".weight" and ".bias"


def take(tensors: Mapping[str, Tensor], name: str, path: Path, dims: int) -> Tensor:
    """One weight by its name; raises InputError where it is not there, is empty or has not `dims` dimensions."""
    if name not in tensors:
        raise InputError(f"{path}: weight {name} is missing: the checkpoint is incomplete")
    tensor = tensors[name]
    if tensor.ndim != dims or tensor.numel() == 0:
        raise InputError(f"{path}: weight {name} has shape {list(tensor.shape)}, which is not {dims}-dimensional")
    return tensor


def level_channels(tensors: Mapping[str, Tensor], name: str, path: Path) -> int:
    """Channels of a level by a convolution inside it; being square, it bounds what is allocated by the file."""
    weight = take(tensors, f"{name}.weight", path, 4)
    if weight.shape[0] != weight.shape[1]:
        raise InputError(f"{path}: weight {name}.weight has shape {list(weight.shape)}, which is not square")
    return weight.shape[0]


def check_stem(stem: Tensor, first: int, path: Path) -> None:
    """Raise InputError where the first convolution and the first level differ in channels."""
    if stem.shape[0] != first:
        raise InputError(
            f"{path}: the first convolution has {stem.shape[0]} channels, the first level {first}, which diffusers "
            "cannot express: use --network my_net.py:build for it"
        )


def rename(modules: Iterable[Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights and biases of `modules` under diffusers' names; what is not there is left for the fit to report."""
    return {
        f"{here}.{part}": tensors[f"{there}.{part}"]
        for there, here in modules
        for part in ("weight", "bias")
        if f"{there}.{part}" in tensors
    }


def attention(
    tensors: Mapping[str, Tensor], joint: str, out: str, here: str, path: Path, heads: int | None = None
) -> dict[str, Tensor]:
    """A 1x1-convolution attention (`joint` makes q, k and v, `out` projects back) as diffusers' four linear layers."""
    renamed = {}
    for part in ("weight", "bias"):
        for name in (f"{joint}.{part}", f"{out}.{part}"):
            if name not in tensors:
                raise InputError(f"{path}: weight {name} is missing: the checkpoint is incomplete")
        rows, projection = tensors[f"{joint}.{part}"], tensors[f"{out}.{part}"]
        if not rows.ndim or rows.shape[0] != 3 * projection.shape[:1].numel() or rows.shape[0] % (3 * (heads or 1)):
            raise InputError(f"{path}: weight {joint}.{part} has shape {list(rows.shape)}, which is no q, k and v")
        for name, value in zip(("to_q", "to_k", "to_v"), split_qkv(rows, heads), strict=True):
            renamed[f"{here}.{name}.{part}"] = value
        renamed[f"{here}.to_out.0.{part}"] = projection.flatten(1) if projection.ndim > 1 else projection
    return renamed


def split_qkv(rows: Tensor, heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (3C, C, 1, ...) or biases (3C,) of a joint projection as those of three linear layers.

    With `heads`, the rows go head by head, each with its q, k and v; without, all of q come first.
    """
    flat = rows.flatten(1) if rows.ndim > 1 else rows
    if heads is None:
        q, k, v = flat.chunk(3, 0)
    else:
        q, k, v = (part.flatten(0, 1) for part in flat.unflatten(0, (heads, 3, -1)).unbind(1))
    return q, k, v


def average_pool_convolution(channels: int, padding: int) -> Float[Tensor, "c c 3 3"]:
    """The 3x3 convolution of stride 2 that averages 2x2 pixels, for layers that have no convolution of their own.

    `padding` is diffusers' `downsample_padding`: with 1 the kernel's centre sits on the first pixel of each square,
    with 0 (a row of zeros below and right) its corner does.
    """
    weight = torch.zeros(channels, channels, 3, 3)
    every = torch.arange(channels)
    for row in (padding, padding + 1):
        for column in (padding, padding + 1):
            weight[every, every, row, column] = 0.25
    return weight


def identity_convolution(channels: int) -> Float[Tensor, "c c 3 3"]:
    """The 3x3 convolution that changes nothing, for upsampling without one."""
    weight = torch.zeros(channels, channels, 3, 3)
    every = torch.arange(channels)
    weight[every, every, 1, 1] = 1
    return weight


def resampling(channels: list[int], padding: int) -> dict[str, Tensor]:
    """Convolutions that pool and repeat pixels, for UNets without convolutions there: `channels` of each level."""
    renamed: dict[str, Tensor] = {}
    last = len(channels) - 1
    for level in range(last):
        renamed[f"down_blocks.{level}.downsamplers.0.conv.weight"] = average_pool_convolution(channels[level], padding)
        renamed[f"down_blocks.{level}.downsamplers.0.conv.bias"] = torch.zeros(channels[level])
        up = f"up_blocks.{level}.upsamplers.0.conv"
        renamed[f"{up}.weight"] = identity_convolution(channels[last - level])
        renamed[f"{up}.bias"] = torch.zeros(channels[last - level])
    return renamed

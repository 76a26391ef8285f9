"""tqch/ddpm-torch checkpoints (CIFAR-10, CelebA) as a diffusers UNet2DModel with the same outputs.

They are Ho et al.'s UNet (arXiv 2006.11239): sines before cosines with half - 1 steps of frequency, GroupNorm's epsilon
1e-6, one attention head, and zeros below and right of what is halved.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.architecture import (
    Fields,
    check_known,
    choice,
    integer,
    nested,
    number,
    scheduler,
)
from hsivi_cli.targets.checkpoints.build import Converted, build_network
from hsivi_cli.targets.checkpoints.layout import Module, attention, check_stem, level_channels, rename, resampling, take

MAX_LEVELS, MAX_BLOCKS = 12, 64
SIDES = {"mnist": 32, "cifar10": 32, "celeba": 64, "celeba_hq": 256}
SCHEDULES = {"linear": "linear", "quad": "scaled_linear"}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample"}
DIFFUSION = {"timesteps", "beta_schedule", "beta_start", "beta_end", "model_mean_type", "model_var_type", "loss_type"}
KNOWN = DIFFUSION | {"format", "image_size", "dataset", "seed", "diffusion", "model", "train"}


@dataclass(frozen=True)
class Architecture:
    """What the shapes tell: `channels` and `attends` for each level, `blocks` residual blocks on the way down."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    attends: tuple[bool, ...]
    blocks: int
    convolves: bool
    embedding: int


def convert(tensors: Mapping[str, Tensor], fields: Fields, path: Path, shape: tuple[int, int, int] | None) -> Converted:
    """The UNet2DModel that computes what the ddpm-torch UNet with these weights computes.

    `fields` may be a configuration of that project (`configs/cifar10.json`) as it is. Raises InputError for weights
    that do not make such a UNet, and for what diffusers cannot express.
    """
    check_known(fields, KNOWN)
    diffusion = {**nested(fields, "diffusion"), **{name: fields[name] for name in DIFFUSION if name in fields}}
    check_known(diffusion, DIFFUSION)
    if nested(fields, "model").get("block_size", 1) != 1:
        raise InputError(f"{path} works on shuffled pixels (block_size): use --network my_net.py:build for it")
    found = infer(tensors, path)
    side, notes = _side(found, fields, shape)
    network = build_network(UNet2DModel, configuration(found, side), converted_tensors(found, tensors, path), path)
    if not diffusion:
        notes.append(
            "Taken for linear betas 1e-4 to 0.02 over 1000 steps and predicted noise, as in its CIFAR-10 and CelebA."
        )
    prediction = PREDICTIONS[choice(diffusion, "model_mean_type", "eps", PREDICTIONS)]
    schedule = scheduler(
        SCHEDULES[choice(diffusion, "beta_schedule", "linear", SCHEDULES)],
        integer(diffusion, "timesteps", 1000, 2, 1_000_000),
        number(diffusion, "beta_start", 1e-4, 0, 1),
        number(diffusion, "beta_end", 0.02, 0, 1),
        prediction,
    )
    return Converted(network, prediction, schedule, tuple(notes))


def infer(tensors: Mapping[str, Tensor], path: Path) -> Architecture:
    """Read the architecture off names and shapes."""
    levels = 0
    while levels < MAX_LEVELS and _first(tensors, levels):
        levels += 1
    if not levels:
        raise InputError(f"{path}: downsamples.level_0 has no residual block: it is no ddpm-torch UNet")
    attends = tuple(f"downsamples.level_{level}.0.1.project_in.weight" in tensors for level in range(levels))
    blocks = 0
    while blocks < MAX_BLOCKS and f"{_block('downsamples', 0, blocks, attends[0])}.conv1.weight" in tensors:
        blocks += 1
    channels = tuple(level_channels(tensors, f"{_first(tensors, level)}.conv2", path) for level in range(levels))
    stem = take(tensors, "in_conv.weight", path, 4)
    check_stem(stem, channels[0], path)
    return Architecture(
        in_channels=stem.shape[1],
        out_channels=take(tensors, "out_conv.2.weight", path, 4).shape[0],
        channels=channels,
        attends=attends,
        blocks=blocks,
        convolves=levels == 1 or f"downsamples.level_0.{blocks}.1.weight" in tensors,
        embedding=take(tensors, "embed.0.weight", path, 2).shape[0],
    )


def configuration(found: Architecture, side: tuple[int, int]) -> dict[str, Any]:
    """The configuration of the UNet2DModel."""
    return {
        "sample_size": side[0] if side[0] == side[1] else side,
        "in_channels": found.in_channels,
        "out_channels": found.out_channels,
        "block_out_channels": found.channels,
        "layers_per_block": found.blocks,
        "down_block_types": tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in found.attends),
        "up_block_types": tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(found.attends)),
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "time_embedding_dim": found.embedding if found.embedding != 4 * found.channels[0] else None,
    }


def converted_tensors(found: Architecture, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under diffusers' names; those that nothing names keep theirs, for the fit to report."""
    blocks = list(_blocks(found))
    renamed = rename(_plain_modules(found, blocks), tensors)
    used = {f"{there}.{part}" for there, _ in _plain_modules(found, blocks) for part in ("weight", "bias")}
    for there, here in _attentions(found):
        renamed |= rename([(f"{there}.norm", f"{here}.group_norm")], tensors)
        renamed |= attention(tensors, f"{there}.project_in", f"{there}.project_out", here, path)
        used |= {f"{there}.{n}.{part}" for n in ("norm", "project_in", "project_out") for part in ("weight", "bias")}
    if not found.convolves:
        renamed |= resampling(list(found.channels), padding=0)
    return renamed | {name: tensor for name, tensor in tensors.items() if name not in used}


def _blocks(found: Architecture) -> Iterator[Module]:
    last = len(found.channels) - 1
    for level, attends in enumerate(found.attends):
        for block in range(found.blocks):
            yield _block("downsamples", level, block, attends), f"down_blocks.{level}.resnets.{block}"
        for block in range(found.blocks + 1):
            yield _block("upsamples", level, block, attends), f"up_blocks.{last - level}.resnets.{block}"
    yield from (("middle.0", "mid_block.resnets.0"), ("middle.2", "mid_block.resnets.1"))


def _plain_modules(found: Architecture, blocks: list[Module]) -> Iterator[Module]:
    inside = ("norm1", "norm1"), ("conv1", "conv1"), ("fc", "time_emb_proj"), ("norm2", "norm2"), ("conv2", "conv2")
    yield from (("in_conv", "conv_in"), ("out_conv.0", "conv_norm_out"), ("out_conv.2", "conv_out"))
    yield from (("embed.0", "time_embedding.linear_1"), ("embed.2", "time_embedding.linear_2"))
    for there, here in blocks:
        yield from ((f"{there}.{name}", f"{here}.{ours}") for name, ours in (*inside, ("skip", "conv_shortcut")))
    last = len(found.channels) - 1
    for level in range(last):
        yield f"downsamples.level_{level}.{found.blocks}.1", f"down_blocks.{level}.downsamplers.0.conv"
        yield f"upsamples.level_{level + 1}.{found.blocks + 1}.1", f"up_blocks.{last - level - 1}.upsamplers.0.conv"


def _attentions(found: Architecture) -> Iterator[Module]:
    last = len(found.channels) - 1
    yield "middle.1", "mid_block.attentions.0"
    for level, attends in enumerate(found.attends):
        if attends:
            for block in range(found.blocks):
                yield f"downsamples.level_{level}.{block}.1", f"down_blocks.{level}.attentions.{block}"
            for block in range(found.blocks + 1):
                yield f"upsamples.level_{level}.{block}.1", f"up_blocks.{last - level}.attentions.{block}"


def _block(way: str, level: int, block: int, attends: bool) -> str:
    return f"{way}.level_{level}.{block}" + (".0" if attends else "")


def _first(tensors: Mapping[str, Tensor], level: int) -> str:
    """Name of the first residual block of a level, or "" where there is none."""
    for attends in (False, True):
        if f"{_block('downsamples', level, 0, attends)}.conv1.weight" in tensors:
            return _block("downsamples", level, 0, attends)
    return ""


def _side(found: Architecture, fields: Fields, shape: tuple[int, int, int] | None) -> tuple[tuple[int, int], list[str]]:
    """Height and width, and what was taken for granted: the project always attends at 16 x 16 pixels."""
    if shape is not None:
        return shape[1:], []
    if "image_size" in fields:
        side = integer(fields, "image_size", 32, 1, 4096)
        return (side, side), []
    known = SIDES.get(str(fields.get("dataset")))
    if known:
        return (known, known), []
    if sum(found.attends) != 1:
        raise InputError("the size of its images is not in a ddpm-torch checkpoint: name it with --shape C,H,W")
    side = 16 * 2 ** found.attends.index(True)
    return (side, side), [f"Taken for images of {side} x {side} pixels (attention at 16 x 16); otherwise give --shape."]

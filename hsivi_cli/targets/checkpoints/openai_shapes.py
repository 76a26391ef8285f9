"""The architecture of an OpenAI UNet (improved-diffusion, guided-diffusion), read off names and shapes of weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.layout import Module, check_stem, level_channels, take

MAX_LEVELS, MAX_BLOCKS = 12, 600


@dataclass(frozen=True)
class Architecture:
    """What the shapes tell. `width` is that of the sinusoids, `channels` and `attends` go by level; `convolves` says
    whether resampling has weights, `resblock_updown` whether residual blocks do it."""

    width: int
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    attends: tuple[bool, ...]
    blocks: int
    convolves: bool
    resblock_updown: bool
    scale_shift: bool
    classes: int

    @property
    def attending(self) -> tuple[int, ...]:
        """The levels with attention."""
        return tuple(level for level, attends in enumerate(self.attends) if attends)


def infer(tensors: Mapping[str, Tensor], path: Path) -> Architecture:
    """Read the architecture off; raises InputError for classifiers, upsamplers and anything that is no such UNet."""
    if "output_blocks.0.0.in_layers.2.weight" not in tensors:
        raise InputError(f"{path} has no way up (output_blocks): it is a classifier or an encoder, not a score network")
    blocks_up = 0
    while blocks_up < MAX_BLOCKS and f"output_blocks.{blocks_up}.0.in_layers.2.weight" in tensors:
        blocks_up += 1
    # a level ends where a convolution or a residual block doubles the size, or (without weights) at a hole further down
    ends = {kind: [k for k in range(blocks_up) if _resamples(tensors, k, kind)] for kind in ("conv", "in_layers.2")}
    holes = [k for k in range(1, blocks_up) if not any(f"input_blocks.{k}.0.{w}.weight" in tensors for w in _FIRST)]
    levels = 1 + max(len(ends["conv"]), len(ends["in_layers.2"]), len(holes))
    if levels > MAX_LEVELS or blocks_up % levels or blocks_up // levels < 2:
        raise InputError(f"{path}: {blocks_up} output_blocks do not make {levels} equal levels: it is no OpenAI UNet")
    each = blocks_up // levels
    firsts = [f"input_blocks.{level * each + 1}" for level in range(levels)]
    channels = tuple(level_channels(tensors, f"{first}.0.out_layers.3", path) for first in firsts)
    stem = take(tensors, "input_blocks.0.0.weight", path, 4)
    time = take(tensors, "time_embed.0.weight", path, 2)
    check_stem(stem, channels[0], path)
    labels = tensors.get("label_emb.weight")
    first = take(tensors, "input_blocks.1.0.emb_layers.1.weight", path, 2)
    found = Architecture(
        width=time.shape[1],
        in_channels=stem.shape[1],
        out_channels=take(tensors, "out.2.weight", path, 4).shape[0],
        channels=channels,
        attends=tuple(f"{first}.1.qkv.weight" in tensors for first in firsts),
        blocks=each - 1,
        convolves=levels == 1 or bool(ends["conv"]) or bool(ends["in_layers.2"]),
        resblock_updown=bool(ends["in_layers.2"]),
        scale_shift=first.shape[0] == 2 * channels[0],
        classes=0 if labels is None or not labels.ndim else labels.shape[0],
    )
    if found.in_channels == 6:
        raise InputError(
            f"{path} takes 6 channels: it is an upsampler, which wants a small image as well: not supported"
        )
    if time.shape[0] != 4 * found.width or found.out_channels not in (found.in_channels, 2 * found.in_channels):
        raise InputError(f"{path}: time_embed or the output has a shape that OpenAI's UNets do not have")
    return found


def blocks(found: Architecture) -> Iterator[Module]:
    """(name there, name in diffusers) of the residual blocks."""
    for there, here in _places(found):
        yield f"{there}.0", here.replace("#", "resnets")
    yield from (("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1"))
    if found.resblock_updown:
        yield from resamplers(found)


def attentions(found: Architecture) -> Iterator[tuple[str, str, int, bool]]:
    """(name there, name in diffusers, level, whether it is on the way up) of the attention blocks."""
    yield "middle_block.1", "mid_block.attentions.0", len(found.channels) - 1, False
    each, last = found.blocks + 1, len(found.channels) - 1
    for there, here in _places(found):
        way, place = there.split(".")
        up = way == "output_blocks"
        level = last - int(place) // each if up else (int(place) - 1) // each
        if found.attends[level]:
            yield f"{there}.1", here.replace("#", "attentions"), level, up


def resamplers(found: Architecture) -> Iterator[Module]:
    """(name there, name in diffusers) of what halves and doubles, where that has weights."""
    each, last = found.blocks + 1, len(found.channels) - 1
    down, up = ("", "") if found.resblock_updown else (".op", ".conv")
    ours_down, ours_up = ("", "") if found.resblock_updown else (".conv", ".conv")
    for step in range(last if found.convolves else 0):
        yield f"input_blocks.{(step + 1) * each}.0{down}", f"down_blocks.{step}.downsamplers.0{ours_down}"
        child = 2 if found.attends[last - step] else 1
        yield f"output_blocks.{(step + 1) * each - 1}.{child}{up}", f"up_blocks.{step}.upsamplers.0{ours_up}"


_FIRST = ("op", "in_layers.2")


def _places(found: Architecture) -> Iterator[Module]:
    """Residual blocks there, and here with # for "resnets" or "attentions"."""
    each = found.blocks + 1
    for level in range(len(found.channels)):
        for block in range(found.blocks):
            yield f"input_blocks.{level * each + 1 + block}", f"down_blocks.{level}.#.{block}"
        for block in range(each):
            yield f"output_blocks.{level * each + block}", f"up_blocks.{level}.#.{block}"


def _resamples(tensors: Mapping[str, Tensor], block: int, kind: str) -> bool:
    return any(f"output_blocks.{block}.{child}.{kind}.weight" in tensors for child in (1, 2))

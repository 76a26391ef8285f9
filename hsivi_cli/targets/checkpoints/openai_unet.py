"""OpenAI's UNets (improved-diffusion, guided-diffusion) as a diffusers UNet with the same outputs.

A plain UNet2DModel where it can express the network; a MultiheadUNet where heads differ in width by level, or time
steps are rescaled. The q-k-v rows go head by head (both repositories' first order) or all q, all k, all v ("new").
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.networks.multihead_unet import MultiheadUNet
from hsivi_cli.targets.checkpoints.architecture import WHERE, Fields, check_known, choice, flag, integer, scheduler
from hsivi_cli.targets.checkpoints.build import Converted, build_network
from hsivi_cli.targets.checkpoints.layout import attention, rename, resampling
from hsivi_cli.targets.checkpoints.openai_public import SIDES, multipliers, published
from hsivi_cli.targets.checkpoints.openai_shapes import Architecture, attentions, blocks, infer, resamplers

EXAMPLE = '{"format": "openai", "num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 4000}'
# OpenAI's own names of flags; those that the shapes tell are compared with them
SETTINGS = {
    "num_heads",
    "num_head_channels",
    "num_heads_upsample",
    "use_new_attention_order",
    "noise_schedule",
    "diffusion_steps",
    "rescale_timesteps",
    "predict_xstart",
    "image_size",
}
TOLD = {"num_channels", "num_res_blocks", "learn_sigma", "class_cond", "use_scale_shift_norm", "resblock_updown"}
IGNORED = {
    "attention_resolutions",
    "channel_mult",
    "dropout",
    "use_fp16",
    "use_checkpoint",
    "use_kl",
    "rescale_learned_sigmas",
    "sigma_small",
}
ALIASES = {"beta_schedule": "noise_schedule", "num_train_timesteps": "diffusion_steps"}
KNOWN = SETTINGS | TOLD | IGNORED | {"format"} | set(ALIASES)


def convert(tensors: Mapping[str, Tensor], fields: Fields, path: Path, shape: tuple[int, int, int] | None) -> Converted:
    """The diffusers network that computes what the OpenAI UNet with these weights computes.

    Raises InputError for weights that make no such UNet, and where neither a published checkpoint nor `fields` says how
    many heads it has.
    """
    check_known(fields, KNOWN)
    found = infer(tensors, path)
    given = {ALIASES.get(name, name): value for name, value in fields.items() if name not in IGNORED}
    _check_told(given, found)
    public = published(found)
    settings = {**(public.fields if public else {}), **given}
    notes = []
    if "num_heads" in given or "num_head_channels" in given:  # one of the two, not the published other
        settings.update({name: given.get(name, -1) for name in ("num_heads", "num_head_channels")})
    if public and not set(public.fields) <= set(given):
        said = ", ".join(f"{name} {value}" for name, value in public.fields.items() if name not in given)
        notes.append(
            f"Taken for {public.name} by its shapes: {said}; if it is another, say so with --network arch.json."
        )
    if not public and settings.get("num_heads", -1) == settings.get("num_head_channels", -1) == -1:
        raise InputError(
            f"{path} is an OpenAI UNet, but its weights do not tell its attention heads: write them into a JSON, like "
            f"{EXAMPLE}, and name it with --network"
        )
    heads = _heads(settings, found, "num_heads")
    up = _heads(settings, found, "num_heads_upsample") if settings.get("num_heads_upsample", -1) != -1 else heads
    new_order = flag(settings, "use_new_attention_order", False)
    steps = integer(settings, "diffusion_steps", 1000, 2, 1_000_000)
    # improved-diffusion rescales by default, guided-diffusion (which alone has resblock_updown) does not
    scale = 1000 / steps if flag(settings, "rescale_timesteps", not found.resblock_updown) else 1.0
    kind, config = configuration(found, _side(settings, found, shape, path), heads, up, scale)
    network = build_network(
        kind, config, converted_tensors(found, tensors, path, None if new_order else (heads, up)), path
    )
    if steps != 1000 and "rescale_timesteps" not in settings:
        notes.append(f"Taken for time steps scaled by {scale:g}; if not so, give rescale_timesteps in the JSON.")
    if found.out_channels == 2 * found.in_channels:
        notes.append("It learned its variance as well; that half of the output is not used.")
    prediction = "sample" if flag(settings, "predict_xstart", False) else "epsilon"
    return Converted(network, prediction, _schedule(settings, steps, prediction), tuple(notes), found.classes)


def configuration(
    found: Architecture, side: tuple[int, int], heads: tuple[int, ...], up: tuple[int, ...], timestep_scale: float
) -> tuple[type[UNet2DModel], dict[str, Any]]:
    """The class and its configuration; `heads` are numbers of heads for each level, on the way down and up."""
    names = {True: ("AttnDownBlock2D", "AttnUpBlock2D"), False: ("DownBlock2D", "UpBlock2D")}
    if found.resblock_updown:
        names[False] = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    resample = "resnet" if found.resblock_updown else "conv"
    config: dict[str, Any] = {
        "sample_size": side[0] if side[0] == side[1] else side,
        "in_channels": found.in_channels,
        "out_channels": found.out_channels,
        "block_out_channels": found.channels,
        "layers_per_block": found.blocks,
        "down_block_types": tuple(names[attends][0] for attends in found.attends),
        "up_block_types": tuple(names[attends][1] for attends in reversed(found.attends)),
        "downsample_type": resample,
        "upsample_type": resample,
        "norm_eps": 1e-5,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if found.scale_shift else "default",
        "num_class_embeds": found.classes or None,
    }
    widths = [channels // count for channels, count in zip(found.channels, heads, strict=True)]
    widths_up = [channels // count for channels, count in zip(found.channels, up, strict=True)]
    attending = {*found.attending, len(found.channels) - 1}  # the middle block attends as well
    used = {widths[level] for level in attending} | {widths_up[level] for level in found.attending}
    plain = timestep_scale == 1 and found.width == found.channels[0]
    if plain and len(used) == 1:
        return UNet2DModel, {**config, "attention_head_dim": used.pop()}
    if plain and all(heads[level] == up[level] == 1 for level in attending):
        return UNet2DModel, {**config, "attention_head_dim": None}
    config |= {"attention_head_dim": widths, "timestep_scale": timestep_scale}
    if widths_up != widths:
        config["up_attention_head_dim"] = widths_up
    if found.width != found.channels[0]:
        config["timestep_channels"] = found.width
    return MultiheadUNet, config


def converted_tensors(
    found: Architecture,
    tensors: Mapping[str, Tensor],
    path: Path,
    by_head: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> dict[str, Tensor]:
    """The weights under diffusers' names; `by_head` are the heads of each level where q-k-v rows go head by head.

    Weights that nothing names keep theirs, for the fit to report.
    """
    inside = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    modules = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")]
    modules += [("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    modules += [("label_emb", "class_embedding")]
    modules += [(f"{there}.{a}", f"{here}.{b}") for there, here in blocks(found) for a, b in inside.items()]
    if not found.resblock_updown:
        modules += resamplers(found)
    renamed = rename(modules, tensors)
    used = {there for there, _ in modules}
    for there, here, level, up in attentions(found):
        heads = by_head[int(up)][level] if by_head else None
        renamed |= rename([(f"{there}.norm", f"{here}.group_norm")], tensors)
        renamed |= attention(tensors, f"{there}.qkv", f"{there}.proj_out", here, path, heads)
        used |= {f"{there}.norm", f"{there}.qkv", f"{there}.proj_out"}
    if not found.convolves:
        renamed |= resampling(list(found.channels), padding=1)
    return renamed | {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in used}


def _heads(settings: Fields, found: Architecture, name: str) -> tuple[int, ...]:
    """The number of heads at each level; `num_head_channels` goes before `num_heads`, as there."""
    width = integer(settings, "num_head_channels", -1, -1, 4096)
    count = integer(settings, name, -1, -1, 4096)
    if width == 0 or count == 0 or (width == -1 and count == -1):
        raise InputError(f"{WHERE}: num_heads and num_head_channels must be at least 1 (or -1 for the other one)")
    heads = []
    for level, channels in enumerate(found.channels):
        attends = found.attends[level] or level == len(found.channels) - 1
        if attends and channels % (width if width != -1 else count):
            named = f"num_head_channels {width}" if width != -1 else f"{name} {count}"
            raise InputError(f"{WHERE}: {named} does not divide the {channels} channels of level {level}")
        heads.append(1 if not attends else channels // width if width != -1 else count)
    return tuple(heads)


def _schedule(settings: Fields, steps: int, prediction: str) -> dict[str, Any]:
    """OpenAI's linear betas keep their integral: 1e-4 to 0.02 at 1000 steps, less each at more steps."""
    if choice(settings, "noise_schedule", "linear", ("linear", "cosine")) == "cosine":
        return scheduler("squaredcos_cap_v2", steps, 1e-4, 0.02, prediction)
    return scheduler("linear", steps, 0.1 / steps, 20 / steps, prediction)


def _check_told(given: Fields, found: Architecture) -> None:
    """Raise InputError where a flag of the JSON contradicts the weights."""
    told = {
        "num_channels": found.width,
        "num_res_blocks": found.blocks,
        "learn_sigma": found.out_channels == 2 * found.in_channels,
        "class_cond": bool(found.classes),
        "use_scale_shift_norm": found.scale_shift,
        "resblock_updown": found.resblock_updown,
    }
    for name, value in told.items():
        if name in given and given[name] != value:
            raise InputError(f"{WHERE}: {name} is {given[name]!r:.60}, but the weights are those of {name} {value!r}")


def _side(settings: Fields, found: Architecture, shape: tuple[int, int, int] | None, path: Path) -> tuple[int, int]:
    if shape is not None:
        return shape[1:]
    side = integer(settings, "image_size", SIDES.get(multipliers(found), 0), 0, 4096)
    if not side:
        raise InputError(f"{path}: the size of its images is not in an OpenAI checkpoint: name it with --shape C,H,W")
    return side, side

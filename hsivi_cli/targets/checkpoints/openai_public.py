"""The public checkpoints of OpenAI's two repositories: what their READMEs say and their shapes do not.

Heads, the order of q-k-v rows and the noise schedule leave no trace in a state dict. A network whose shapes are those
of a published checkpoint is taken for it, with a note; any other needs the JSON.
"""

from dataclasses import dataclass
from typing import Any

from hsivi_cli.targets.checkpoints.openai_shapes import Architecture

IMPROVED = {"num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True}
GUIDED = {"num_head_channels": 64, "noise_schedule": "linear", "diffusion_steps": 1000}


@dataclass(frozen=True)
class Public:
    """A published checkpoint: the shapes that tell it (`multipliers` of `width` channels a level), and its `fields`."""

    name: str
    width: int
    multipliers: tuple[float, ...]
    blocks: int
    attends: tuple[int, ...]
    classes: int
    resblock_updown: bool
    fields: dict[str, Any]
    scale_shift: bool = True


PUBLIC = (
    Public("improved-diffusion imagenet64_uncond_100M_1500K.pt", 128, (1, 2, 3, 4), 3, (2, 3), 0, False, IMPROVED),
    Public("improved-diffusion cifar10_uncond_50M_500K.pt", 128, (1, 2, 2, 2), 3, (1, 2), 0, False, IMPROVED),
    Public(
        "improved-diffusion imagenet64_cond_270M_250K.pt",
        192,
        (1, 2, 3, 4),
        3,
        (2, 3),
        1000,
        False,
        IMPROVED | {"rescale_timesteps": False},
    ),
    Public(
        "improved-diffusion lsun_uncond_100M_1200K_bs128.pt",
        128,
        (1, 1, 2, 2, 4, 4),
        2,
        (4,),
        0,
        False,
        {"num_heads": 1, "noise_schedule": "linear", "diffusion_steps": 1000},
        scale_shift=False,
    ),
    Public(
        "guided-diffusion 64x64_diffusion.pt",
        192,
        (1, 2, 3, 4),
        3,
        (1, 2, 3),
        1000,
        True,
        GUIDED | {"use_new_attention_order": True, "noise_schedule": "cosine"},
    ),
    Public(
        "guided-diffusion 128x128_diffusion.pt",
        256,
        (1, 1, 2, 3, 4),
        2,
        (2, 3, 4),
        1000,
        True,
        {"num_heads": 4, "noise_schedule": "linear", "diffusion_steps": 1000},
    ),
    Public("guided-diffusion 256x256_diffusion.pt", 256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 1000, True, GUIDED),
    Public(
        "guided-diffusion 256x256_diffusion_uncond.pt or lsun_*.pt",
        256,
        (1, 1, 2, 2, 4, 4),
        2,
        (3, 4, 5),
        0,
        True,
        GUIDED,
    ),
    Public("guided-diffusion 512x512_diffusion.pt", 256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), 1000, True, GUIDED),
)
SIDES = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}


def published(found: Architecture) -> Public | None:
    """The published checkpoint with these shapes, if there is one; all are of colour images and learned a variance."""
    for public in PUBLIC:
        shapes = (public.width, public.multipliers, public.blocks, public.attends, public.classes)
        own = (found.width, multipliers(found), found.blocks, found.attending, found.classes)
        kind = (public.resblock_updown, public.scale_shift, True, 3, 6)
        if shapes == own and kind == (
            found.resblock_updown,
            found.scale_shift,
            found.convolves,
            found.in_channels,
            found.out_channels,
        ):
            return public
    return None


def multipliers(found: Architecture) -> tuple[float, ...]:
    """Channels of each level over the network's width."""
    return tuple(channels / found.width for channels in found.channels)

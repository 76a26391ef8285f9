"""EDM checkpoints (NVlabs/edm): weights as safetensors and a JSON of what their network was built with.

NVIDIA's files are pickles of whole objects, which run code when they are opened; a few lines in EDM's own environment
turn one into the two files (assets/docs/score_networks.md).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.networks.edm_unet import DHARIWAL, SONG, EDMUNet
from hsivi_cli.targets.checkpoints.architecture import (
    WHERE,
    Fields,
    check_known,
    choice,
    integer,
    integers,
    number,
    scheduler,
)
from hsivi_cli.targets.checkpoints.build import Converted, build_network

SONG_ONLY = {"embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"}
IGNORED = {"use_fp16", "augment_dim", "sigma_min", "sigma_max"}
OTHER_PRECONDITIONING = {"beta_d", "beta_min", "epsilon_t", "M", "C_1", "C_2"}
NETWORK = {
    "model_type",
    "img_resolution",
    "img_channels",
    "label_dim",
    "sigma_data",
    "model_channels",
    "channel_mult",
    "channel_mult_emb",
    "num_blocks",
    "attn_resolutions",
    "dropout",
    "label_dropout",
}
KNOWN = NETWORK | SONG_ONLY | IGNORED | {"format", "precond"}
EXAMPLE = '{"format": "edm", "precond": "EDMPrecond", "model_type": "SongUNet", "img_resolution": 32, ...}'


def convert(tensors: Mapping[str, Tensor], fields: Fields, path: Path, shape: tuple[int, int, int] | None) -> Converted:
    """The EDMUNet that predicts the noise which EDM's denoiser with these weights implies, at 1000 linear betas.

    Raises InputError without a JSON, for another preconditioning than EDM's, and for weights that do not fit the JSON.
    """
    if not fields:
        raise InputError(f"{path} is an EDM network: name the JSON of its architecture with --network, like {EXAMPLE}")
    precond = fields.get("precond", "EDMPrecond")
    if precond != "EDMPrecond" or OTHER_PRECONDITIONING & set(fields) or "u" in tensors:
        named = precond if precond != "EDMPrecond" else "VPPrecond or iDDPMPrecond"
        raise InputError(f"{path} has {named!r:.60}, an older preconditioning; only EDMPrecond is supported")
    check_known(fields, KNOWN)
    config = configuration(fields)
    schedule = scheduler("linear", 1000, 1e-4, 0.02, "epsilon")
    if shape is not None and shape != (config["in_channels"], config["sample_size"], config["sample_size"]):
        raise InputError(f"--shape {','.join(map(str, shape))} is not the img_channels and img_resolution of {WHERE}")
    # filters are made from the JSON, and augmentation is for training
    used = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("resample_filter") and not name.startswith("map_augment.")
    }
    network = build_network(EDMUNet, {**config, "schedule": schedule}, used, path)
    notes = ["EDM's noise levels are mapped onto the schedule: sigma = sqrt(1 / abar - 1), 0.01 to 157 by default."]
    if "precond" not in fields:
        notes.append("Taken for EDMPrecond; an older VPPrecond or VEPrecond network would give wrong images.")
    return Converted(network, "epsilon", schedule, tuple(notes), config["num_class_embeds"] or 0)


def configuration(fields: Fields) -> dict[str, Any]:
    """The configuration of the EDMUNet, with the defaults of EDM's own constructors."""
    kind = choice(fields, "model_type", DHARIWAL, (SONG, DHARIWAL))
    song = kind == SONG
    if not song and SONG_ONLY & set(fields):
        raise InputError(f"{WHERE}: {sorted(SONG_ONLY & set(fields))[0]} belongs to a {SONG}, not to a {DHARIWAL}")
    if "img_resolution" not in fields:
        raise InputError(f"{WHERE}: img_resolution is missing")
    side = integer(fields, "img_resolution", 32, 1, 4096)
    multiples = integers(fields, "channel_mult", (1, 2, 2, 2) if song else (1, 2, 3, 4), 1, 64, 12)
    if not multiples or side % 2 ** (len(multiples) - 1):
        raise InputError(f"{WHERE}: img_resolution {side} cannot be halved {max(len(multiples) - 1, 0)} times")
    config: dict[str, Any] = {
        "model_type": kind,
        "sample_size": side,
        "in_channels": integer(fields, "img_channels", 3, 1, 64),
        "num_class_embeds": integer(fields, "label_dim", 0, 0, 100_000) or None,
        "sigma_data": number(fields, "sigma_data", 0.5, 1e-6, 1e6),
        "model_channels": integer(fields, "model_channels", 128 if song else 192, 4, 4096),
        "channel_mult": multiples,
        "channel_mult_emb": integer(fields, "channel_mult_emb", 4, 1, 64),
        "num_blocks": integer(fields, "num_blocks", 4 if song else 3, 1, 64),
        "attn_resolutions": integers(fields, "attn_resolutions", (16,) if song else (32, 16, 8), 1, 4096, 12),
        "dropout": number(fields, "dropout", 0.1, 0, 1),
        "label_dropout": number(fields, "label_dropout", 0, 0, 1),
    }
    if song:
        config |= {
            "embedding_type": choice(fields, "embedding_type", "positional", ("positional", "fourier")),
            "channel_mult_noise": integer(fields, "channel_mult_noise", 1, 1, 64),
            "encoder_type": choice(fields, "encoder_type", "standard", ("standard", "skip", "residual")),
            "decoder_type": choice(fields, "decoder_type", "standard", ("standard", "skip")),
            "resample_filter": integers(fields, "resample_filter", (1, 1), 1, 64, 8),
        }
    return config

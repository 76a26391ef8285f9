"""A pretrained diffusion score network as a target: a diffusers pipeline directory, checked before it is trusted."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hsivi_cli.bridges.schedule import NoiseSchedule, schedule_from_config
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json

if TYPE_CHECKING:
    from diffusers import UNet2DModel

MAX_SIDE = 4096
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class ScoreNet:
    """A frozen epsilon-predicting network and the schedule it was trained on.

    The score of the data noised to time t is `-eps(x, t) / s_t`. `sha256` hashes the weights and both configurations.
    """

    unet: "UNet2DModel"
    schedule: NoiseSchedule
    path: Path
    sha256: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return image_shape(self.unet)

    def eps(self, x: Float[Tensor, "n c h w"], t: Int[Tensor, " n"] | int) -> Float[Tensor, "n c h w"]:
        """Predicted noise at time `t`."""
        return self.unet(x, t).sample


def image_shape(unet: "UNet2DModel") -> tuple[int, int, int]:
    """(channels, height, width) that a UNet was built for."""
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return unet.config["in_channels"], height, width


def load_score_net(path: Path, device: str = "cpu") -> ScoreNet:
    """Load a frozen score network from a diffusers directory (`unet/` beside `scheduler/`).

    Raises InputError for anything that is not an epsilon-predicting UNet2DModel with finite safetensors weights and a
    variance-preserving schedule.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(f"{path} is a file: name a diffusers directory that holds unet/ and scheduler/")
    if not path.is_dir():
        raise InputError(f"{path} does not exist: name a diffusers directory that holds unet/ and scheduler/")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not (path / "unet").is_dir() or not scheduler.is_file() or (path / "hsivi.json").is_file():
        hint = "is it an unfinished run of hsivi train, or of hsivi distill?"
        if (path / "hsivi.json").is_file():
            hint = "it is a student: name its teacher"
        raise InputError(f"{path} is no score network: it needs unet/ and scheduler/scheduler_config.json ({hint})")
    config = read_json(scheduler)
    schedule = schedule_from_config(config, where=str(scheduler))
    unet = load_unet(path / "unet").to(device).eval().requires_grad_(False)
    return ScoreNet(unet, schedule, path, score_net_sha256(path / "unet", schedule))


def score_net_sha256(unet_directory: Path, schedule: NoiseSchedule) -> str:
    """Hash of everything a score network computes with: weights, architecture and schedule."""
    digest = hashlib.sha256((unet_directory / WEIGHTS).read_bytes())
    architecture = {k: v for k, v in read_json(unet_directory / "config.json").items() if not k.startswith("_")}
    digest.update(json.dumps([architecture, schedule.config], sort_keys=True).encode())
    return digest.hexdigest()


def load_unet(directory: Path) -> "UNet2DModel":
    """Load a UNet2DModel from its directory; nothing is unpickled. Raises InputError naming the file at fault."""
    config_path, weights_path = directory / "config.json", directory / WEIGHTS
    config = read_json(config_path)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise InputError(f"{config_path}: {config['_class_name']} is not supported, only UNet2DModel")
    _check_pixel_space(config, config_path)
    tensors = _read_weights(weights_path, directory)
    with torch.device("meta"):  # without memory: a hostile configuration must not exhaust it
        _check_keys(_build(config, config_path), tensors, weights_path)
    unet = _build(config, config_path)
    unet.load_state_dict(tensors)
    return unet


def _check_pixel_space(config: dict[str, Any], where: Path) -> None:
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if out_channels != channels:
        raise InputError(
            f"{where}: {out_channels} output channels for {channels} inputs (learned variance?): not supported"
        )
    size = config.get("sample_size")
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise InputError(f"{where}: sample_size {size!r} is no image size: set it to the pixels of a side")
    levels = config.get("block_out_channels")
    if isinstance(levels, list) and any(side % 2 ** (len(levels) - 1) for side in sides):
        raise InputError(f"{where}: sample_size {size} cannot be halved as often as block_out_channels asks")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise InputError(f"{where}: class-conditional networks are not supported")


def _read_weights(path: Path, directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        pickled = [file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickled:
            raise InputError(f"{directory / pickled[0]} is a pickle, which can run code: convert it to {WEIGHTS} first")
        raise InputError(f"{path} does not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as err:
        raise InputError(f"{path} is damaged or no safetensors file ({err}): fetch or write it again") from err
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: weight {name} holds NaN or infinity: the checkpoint is broken")
    return tensors


def _build(config: dict[str, Any], where: Path) -> "UNet2DModel":
    from diffusers import UNet2DModel

    try:
        unet = UNet2DModel.from_config(config)
    except Exception as err:  # diffusers raises whatever its layers raise
        raise InputError(f"{where} does not describe a UNet2DModel ({err})") from err
    assert isinstance(unet, UNet2DModel)
    return unet


def _check_keys(unet: "UNet2DModel", tensors: dict[str, Tensor], where: Path) -> None:
    expected = unet.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong = wrong or [name for name, tensor in expected.items() if tensor.shape != tensors[name].shape]
    if wrong:
        raise InputError(f"{where} does not fit its config.json: {len(wrong)} weights differ, the first is {wrong[0]}")

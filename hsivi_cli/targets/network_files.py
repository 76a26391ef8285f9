"""Networks on disk: `config.json` beside safetensors weights, as diffusers writes them; nothing is unpickled.

`_class_name` in the configuration says which network it is. A user's own (`PlainNetwork`) needs the file that builds
it, named anew each time: a directory must not run code by being opened.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import check_sums, read_json, write_json
from hsivi_cli.networks.noise_prediction import PLAIN, PlainNetwork
from hsivi_cli.targets.checkpoints.fit import check_floating, whole_numbers
from hsivi_cli.targets.checkpoints.read import read_tensors

# classes that a directory may name, and the modules they are in
NETWORKS = {
    "UNet2DModel": "diffusers",
    "MultiheadUNet": "hsivi_cli.networks.multihead_unet",
    "EDMUNet": "hsivi_cli.networks.edm_unet",
}
MAX_SIDE = 4096
WEIGHTS, PICKLED = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONFIG = "config.json"


def image_shape(net: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a network was built for."""
    config: Any = net.config
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return config["in_channels"], height, width


def load_network(directory: Path, network: str | None = None) -> nn.Module:
    """Load a network from its directory, weights checked. Raises InputError naming the file at fault.

    `network` is the user's `FILE:FUNCTION`, for a network of theirs.
    """
    check_sums(directory)
    config = read_json(directory / CONFIG)
    kind = config.get("_class_name", "UNet2DModel")
    if kind == PLAIN:
        return _load_plain(directory, config, network)
    if network is not None:
        raise InputError(f"--network {network}: {directory} holds a {kind}, which needs none: leave it out")
    if kind not in NETWORKS:
        raise InputError(f"{directory / CONFIG}: {kind} is not supported, only {', '.join(NETWORKS)}")
    check_pixel_space(config, directory / CONFIG)
    tensors = read_weights(directory)
    return fill(lambda: _build(kind, config, directory / CONFIG), tensors, weights_file(directory))


def save_network(net: nn.Module, directory: Path) -> None:
    """Write a network as `load_network` reads it; diffusers' own class opens a UNet2DModel."""
    if not isinstance(net, PlainNetwork):
        net.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]
        return
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    # a copy each: modules may share weights, which safetensors refuses
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in net.net.state_dict().items()}, directory / WEIGHTS)
    write_json(directory / CONFIG, net.config)


def _load_plain(directory: Path, config: dict[str, Any], network: str | None) -> PlainNetwork:
    from hsivi_cli.targets.user_network import build_user_network, try_network

    if network is None:
        was = config.get("network")
        raise InputError(f"{directory} holds a network of your own: add --network {was}, the file that builds it")
    try:
        shape = (int(config["in_channels"]), *(int(side) for side in config["sample_size"]))
        channels, height, width = shape
    except (KeyError, TypeError, ValueError) as err:
        raise InputError(f"{directory / CONFIG} does not say the shape of an image ({err!r})") from err
    net = build_user_network(network, (channels, height, width))
    if net.config["network_sha256"] != config.get("network_sha256"):
        # names no directory: it may be one that a single file was unpacked into
        changed = "the file has changed since this network was saved with it: its images may be others"
        warnings.warn(f"--network {network}: {changed}", stacklevel=2)
    tensors = read_weights(directory)
    check_keys(net.net.state_dict(), tensors, directory / WEIGHTS)
    net.net.load_state_dict(tensors)
    try_network(net.eval(), network)
    return net


def check_pixel_space(config: dict[str, Any], where: Path) -> None:
    """Raise InputError unless a UNet's configuration is one of a network on pixels that we can sample."""
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if not isinstance(channels, int) or channels < 1 or out_channels not in (channels, 2 * channels):
        raise InputError(
            f"{where}: {out_channels} output channels for {channels} inputs are not supported: only as many, or twice "
            "as many with a learned variance"
        )
    size = config.get("sample_size")
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in sides):
        raise InputError(f"{where}: sample_size {size!r} is no image size: set it to the pixels of a side")
    levels = config.get("block_out_channels")
    if isinstance(levels, list) and any(side % 2 ** (len(levels) - 1) for side in sides):
        raise InputError(f"{where}: sample_size {size} cannot be halved as often as block_out_channels asks")
    if config.get("class_embed_type"):
        raise InputError(
            f"{where}: class_embed_type {config['class_embed_type']!r} is not supported, only class numbers"
        )
    classes = config.get("num_class_embeds")
    if classes is not None and not (isinstance(classes, int) and classes > 0):
        raise InputError(f"{where}: num_class_embeds {classes!r} is no number of classes")


def weights_file(directory: Path) -> Path:
    """The file with a network's weights: safetensors, or what older versions of diffusers wrote, a `.bin`."""
    pickled = directory / PICKLED
    return pickled if pickled.is_file() and not (directory / WEIGHTS).is_file() else directory / WEIGHTS


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Finite tensors of a network's directory, under today's names; nothing is run. InputError: see `read_tensors`."""
    return {_modern(name): tensor for name, tensor in read_tensors(weights_file(directory)).tensors.items()}


def _modern(name: str) -> str:
    """What diffusers calls a weight today; the `google/ddpm-*` networks are older than its attention's names."""
    *modules, layer, kind = name.split(".") if name.count(".") > 1 else ("", name)
    if layer in OLD_ATTENTION and len(modules) > 1 and modules[-2] == "attentions":
        return ".".join([*modules, OLD_ATTENTION[layer], kind])
    return name


def fill(build: Any, tensors: dict[str, Tensor], where: Path) -> nn.Module:
    """A network from `build()` with these weights; a configuration that does not fit them costs no memory."""
    with torch.device("meta"):  # without memory: a hostile configuration must not exhaust it
        check_keys(build().state_dict(), tensors, where)
    net: nn.Module = build()
    net.load_state_dict(tensors)
    return net


def check_keys(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: Path) -> None:
    """Raise InputError unless names, shapes and types are those expected."""
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong = wrong or [name for name, tensor in expected.items() if tensor.shape != tensors[name].shape]
    if wrong:
        raise InputError(f"{where} does not fit its {CONFIG}: {len(wrong)} weights differ, the first is {wrong[0]}")
    check_floating(whole_numbers(tensors, expected), where)


def _build(kind: str, config: dict[str, Any], where: Path) -> nn.Module:
    cls = getattr(importlib.import_module(NETWORKS[kind]), kind)
    try:
        unet: nn.Module = cls.from_config(config)
    except Exception as err:  # diffusers raises whatever its layers raise
        raise InputError(f"{where} does not describe a {kind} ({err})") from err
    return unet

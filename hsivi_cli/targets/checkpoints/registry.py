"""One door for foreign checkpoints: the format is told from the names of the weights."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints import ddpm_torch, edm, openai_unet
from hsivi_cli.targets.checkpoints.architecture import WHERE, Fields, choice
from hsivi_cli.targets.checkpoints.build import Converted
from hsivi_cli.targets.checkpoints.read import read_tensors

Converter = Callable[[Mapping[str, Tensor], Fields, Path, tuple[int, int, int] | None], Converted]
# format -> (two names that its state dicts alone have, the converter)
FORMATS: dict[str, tuple[tuple[str, str], Converter]] = {
    "ddpm-torch": (("in_conv.weight", "embed.0.weight"), ddpm_torch.convert),
    "openai": (("input_blocks.0.0.weight", "time_embed.0.weight"), openai_unet.convert),
    "edm": (("map_layer0.weight", "map_layer1.weight"), edm.convert),
}


def convert_checkpoint(
    path: Path, architecture: Fields | None = None, shape: tuple[int, int, int] | None = None
) -> Converted:
    """The network in the file `path`, converted; `architecture` is the JSON beside it, where there is one.

    `shape` is (channels, height, width) of its images, for formats that do not say. Raises InputError in one line for a
    file that cannot be read, a format that is not known, and whatever its converter refuses.
    """
    path = Path(path)
    fields = dict(architecture or {})
    foreign = read_tensors(path)
    asked = choice(fields, "format", "", FORMATS) if "format" in fields else ""
    try:
        kind, prefix = recognise(foreign.tensors, path)
    except InputError as err:
        raise InputError(f"{err} ({WHERE} asks for {asked!r}, whose names it has not)" if asked else str(err)) from err
    wanted = asked or kind
    if wanted != kind:
        raise InputError(f"{WHERE}: format is {wanted!r}, but the names in {path} are those of {kind!r}")
    tensors = {name[len(prefix) :]: value for name, value in foreign.tensors.items() if name.startswith(prefix)}
    if kind == "ddpm-torch" and prefix.endswith("_model."):
        raise InputError(f"{path} works on shuffled pixels (block_size): use --network my_net.py:build for it")
    notes = [f"Read as an {kind} checkpoint." if kind[0] in "aeiou" else f"Read as a {kind} checkpoint."]
    if prefix:
        left = len(foreign.tensors) - len(tensors)
        others = f"; {left} tensors without it were left" if left else ""
        notes.append(f"The prefix {prefix!r} was stripped from the names in the file{others}.")
    converted = FORMATS[kind][1](tensors, fields, path, shape)
    channels = converted.network.config["in_channels"]
    if shape is not None and shape[0] != channels:
        raise InputError(f"--shape {','.join(map(str, shape))}, but the network in {path} has {channels} channels")
    notes = [*notes, *foreign.notes, *converted.notes]
    return Converted(converted.network, converted.prediction_type, converted.schedule, tuple(notes), converted.classes)


def recognise(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, str]:
    """(format, prefix of its names); raises InputError where none of the formats is met."""
    if any(name.startswith(("first_stage_model.", "cond_stage_model.")) for name in tensors):
        raise InputError(f"{path} is a latent diffusion model: only networks on pixels are supported")
    for kind, ((sign, also), _) in FORMATS.items():
        prefixes = [name[: -len(sign)] for name in tensors if name == sign or name.endswith("." + sign)]
        prefixes = [prefix for prefix in prefixes if prefix + also in tensors]
        if prefixes:
            return kind, max(prefixes, key=lambda prefix: ("ema" in prefix, -len(prefix)))
    if any(name.endswith("down_blocks.0.resnets.0.conv1.weight") for name in tensors):
        raise InputError(f"{path} holds a diffusers UNet: name the directory that has its config.json as well")
    raise InputError(
        f"{path} is in none of the formats {', '.join(FORMATS)}: give the code of its network with "
        "--network my_net.py:build and --shape C,H,W"
    )

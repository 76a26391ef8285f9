"""A whole student in one safetensors file: `unet.*` and `log_gamma`, and its JSON files in the metadata.

The file is the directory in another wrapping: it is opened by unpacking it, so that every network and every check is
the directory's, and so is the hash.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.exported import refuse_program
from hsivi_cli.io.files import parse_json, read_json, write_json
from hsivi_cli.methods.student import DESCRIPTION, LOG_GAMMA
from hsivi_cli.targets.network_files import CONFIG, WEIGHTS

KEY = "hsivi"  # of the metadata: one JSON object
PREFIX = "unet."
OF_STUDENT = "name the student's directory, or the .safetensors of hsivi export"


def write_student_file(student: Path, file: Path) -> None:
    """Pack the student directory (or copy the student file) `student` into `file`."""
    if student.is_file():
        file.write_bytes(student.read_bytes())
        return
    weights = student / "unet" / WEIGHTS
    with safe_open(weights, framework="pt") as header:
        metadata = header.metadata()
    contents = {
        "description": read_json(student / DESCRIPTION),
        "unet": read_json(student / "unet" / CONFIG),
        "unet_metadata": metadata,
    }
    tensors = {PREFIX + name: tensor for name, tensor in load_file(weights).items()}
    save_file(tensors | load_file(student / LOG_GAMMA), file, metadata={KEY: json.dumps(contents)})


def read_contents(file: Path) -> dict[str, Any]:
    """The JSON of a student file: `description`, `unet`, `unet_metadata`; raises InputError if it is no student's."""
    refuse_program(file, OF_STUDENT)
    try:
        with safe_open(file, framework="pt") as header:
            contents = parse_json((header.metadata() or {})[KEY])
    except (SafetensorError, OSError, ValueError) as err:
        raise InputError(f"{file} is damaged or no safetensors file ({err}): fetch or write it again") from err
    except KeyError as err:
        raise InputError(f"{file} holds no student: name a file that hsivi export wrote, or a directory") from err
    fields = ("description", "unet", "unet_metadata")
    kinds = (dict, dict, dict | None)
    if not isinstance(contents, dict) or not all(
        isinstance(contents.get(name), kind) for name, kind in zip(fields, kinds, strict=True)
    ):
        raise InputError(f"{file}: its metadata describe no student: write it again with hsivi export")
    return contents


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """The student directory in `file`, for as long as the context lasts; an InputError from inside names `file`."""
    contents = read_contents(file)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as err:
        raise InputError(f"{file} is damaged or no safetensors file ({err}): fetch or write it again") from err
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if tensors.keys() != {"log_gamma", *(PREFIX + name for name in weights)} or not weights:
        raise InputError(f"{file} holds other tensors than {PREFIX}* and log_gamma: write it again with hsivi export")
    with tempfile.TemporaryDirectory(prefix="hsivi-") as name:
        directory = Path(name)
        (directory / "unet").mkdir()
        write_json(directory / DESCRIPTION, contents["description"])
        write_json(directory / "unet" / CONFIG, contents["unet"])
        metadata = contents["unet_metadata"]
        if metadata is not None:
            metadata = {str(key): str(value) for key, value in metadata.items()}
        save_file(weights, directory / "unet" / WEIGHTS, metadata=metadata)
        save_file({"log_gamma": tensors["log_gamma"]}, directory / LOG_GAMMA)
        try:
            yield directory
        except InputError as err:
            raise InputError(str(err).replace(f"{directory}/", f"{file}: ").replace(name, str(file))) from err

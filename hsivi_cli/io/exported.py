"""Programs that torch saved (TorchScript, torch.export), told by the names in their archive; nothing of them is run.

`hsivi export` writes such files with a description beside the program, in the extra file `hsivi.json`.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import parse_json

DESCRIPTION = "hsivi.json"  # as in a student's directory
MAX_DESCRIPTION = 2**22  # bytes; what hsivi writes has a few thousand
OPENED_BY = {"torchscript": "torch.jit.load", "torch-export": "torch.export.load"}
# the last parts of names that such archives alone have; torch.export wrote the last one until torch 2.7
_MARKS = {
    "constants.pkl": "torchscript",
    "archive_format": "torch-export",
    "serialized_exported_program.json": "torch-export",
}


@dataclass(frozen=True)
class SavedProgram:
    """A file that torch alone opens; `description` is None where it is not of `hsivi export`."""

    format: str
    description: dict[str, Any] | None


def saved_program(path: Path) -> SavedProgram | None:
    """What program `path` holds, None if it is no such file; raises InputError for a description that is damaged."""
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            kinds = [_MARKS[name.split("/")[-1]] for name in names if name.split("/")[-1] in _MARKS]
            if not kinds:
                return None
            extra = [name for name in names if name.split("/")[-1] == DESCRIPTION]
            return SavedProgram(kinds[0], _description(archive, extra[0], path) if extra else None)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError):
        return None


def refuse_program(path: Path, instead: str) -> None:
    """Raise InputError, with what to name instead, if `path` is a program that torch alone opens."""
    found = saved_program(path)
    if found is not None:
        what = "an exported sampler" if found.description is not None else "a saved program"
        raise InputError(
            f"{path} is {what} ({found.format}), which torch alone opens, by {OPENED_BY[found.format]}: {instead}"
        )


def _description(archive: zipfile.ZipFile, name: str, path: Path) -> dict[str, Any]:
    broken = f"{path}: its {DESCRIPTION} is damaged: write it again with hsivi export"
    if archive.getinfo(name).file_size > MAX_DESCRIPTION:
        raise InputError(broken)
    try:
        fields = parse_json(archive.read(name).decode())
    except (ValueError, zipfile.BadZipFile) as err:
        raise InputError(broken) from err
    if not isinstance(fields, dict):
        raise InputError(broken)
    return fields

"""Run directories: a resolved configuration beside what the run writes, opened fresh or to be resumed."""

from pathlib import Path
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json, sweep_temporaries, write_json

CONFIG = "config.json"


def check_run(directory: Path, config: dict[str, Any], resume: bool) -> bool:
    """Whether `directory` holds a run to be resumed; nothing is written.

    Raises InputError if the directory is occupied and `resume` is not asked for, if it holds no run, or if the run's
    configuration differs; the message names the first option that does.
    """
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if not occupied:
        return False
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory} exists and holds no run of ours: choose another --out")
    if not resume:
        raise InputError(f"{directory} exists already: add --resume to go on with it, or choose another --out")
    before = read_json(directory / CONFIG)
    changed = sorted(key for key in before.keys() | config.keys() if before.get(key) != config.get(key))
    if changed:
        was, now = before.get(changed[0]), config.get(changed[0])
        raise InputError(f"--resume: {changed[0]} was {was!r}, now {now!r}: repeat the first command's options")
    return True


def open_run(directory: Path, config: dict[str, Any], resume: bool) -> bool:
    """Create `directory` with its resolved configuration, or accept a run to be resumed; returns whether it is one.

    Temporaries that a killed process left behind are removed. Raises InputError as `check_run` does, or if the
    directory cannot be written.
    """
    if check_run(directory, config, resume):
        sweep_temporaries(directory)
        return True
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / CONFIG, config)
    except OSError as err:
        raise InputError(f"cannot write to {directory} ({err.strerror}): choose another --out") from err
    return False

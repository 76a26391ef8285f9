"""Run directories: a resolved configuration beside what the run writes, opened fresh or to be resumed, by one process.

A run that fails before it has anything to go on from leaves nothing behind, so that the same command works again.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.event_log import EVENTS
from hsivi_cli.io.files import DISK_BROKEN, DISK_FULL, read_json, sweep_temporaries, write_json

CONFIG = "config.json"  # what a run computes: the fingerprint that resuming compares
OPTIONS = "config.toml"  # the options it was begun with, for people and for --config
POSTERIOR = "posterior"  # the `kind` in the configuration of a fit
CHECKPOINT = "checkpoint.safetensors"  # the only one, in runs of earlier versions
METRICS = "metrics.jsonl"
REPORT = "report.json"  # what a finished fit says of itself
LOCK = ".lock"
WIDEST = 40  # characters of a setting in the line that tells what differs
ATTEMPTS = 100  # at a lock file that others remove under our hands
_PREVIEW = re.compile(r"samples-\d+\.png")
_STEPPED = re.compile(r"checkpoint-(\d+)\.safetensors")


def is_posterior_fit(path: Path) -> bool:
    """Whether a directory is a run of `hsivi fit-posterior --save`."""
    return (path / CONFIG).is_file() and read_json(path / CONFIG).get("kind") == POSTERIOR


def is_amortised_fit(path: Path) -> bool:
    """Whether such a run is of `--amortize`."""
    return is_posterior_fit(path) and bool(read_json(path / CONFIG).get("amortize"))


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"checkpoint-{step:06d}.safetensors"


def checkpoint_step(path: Path) -> int | None:
    """The step that a checkpoint's name tells; None for the one without a number."""
    match = _STEPPED.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a training, the newest first; the one without a number is older than all others."""
    found = [path for path in directory.glob("checkpoint*.safetensors") if checkpoint_step(path) is not None]
    found.sort(key=lambda path: checkpoint_step(path) or 0, reverse=True)
    return found + [directory / CHECKPOINT] * (directory / CHECKPOINT).is_file()


def check_run(directory: Path, config: dict[str, Any], resume: bool, flags: Mapping[str, str] | None = None) -> bool:
    """Whether `directory` holds a run to go on with; nothing is written.

    `flags` says how settings of `config` are called on the command line, the parts of a nested one as `name.*`; what
    does not begin with a dash is a whole sentence to say instead of the two values.

    Raises InputError if another process is writing it, if it is occupied and `resume` is not asked for, if it holds no
    run, or if the run's configuration differs; the message names every option that does. A run of the very same
    configuration that was killed before its first checkpoint needs no `resume`: it has nothing to lose.
    """
    if _occupied(directory):
        check_free(directory)
    return _check(directory, config, resume, flags or {})


def check_free(directory: Path) -> None:
    """Raise InputError, naming the process, if one is writing the run in `directory`."""
    with suppress(OSError), (directory / LOCK).open("rb") as file:
        _flock(file.fileno(), fcntl.LOCK_SH, directory)


@contextmanager
def run_directory(
    directory: Path, config: dict[str, Any], resume: bool, flags: Mapping[str, str] | None = None
) -> Iterator[bool]:
    """Hold `directory` for this process alone, with its resolved configuration in it; yields whether it held a run.

    Temporaries that a killed process left behind are removed. When the body fails before a checkpoint or a product was
    written, what is left of the run is removed with it; otherwise the error says how to go on. Raises InputError as
    `check_run` does, or if the directory cannot be written.
    """
    check_run(directory, config, resume, flags)
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        with lock_run(directory):
            had_run = _check(directory, config, resume, flags or {})  # again: now nobody else can change it
            try:
                if had_run:
                    sweep_temporaries(directory)
                else:
                    _write_config(directory, config)
                yield had_run
            except BaseException as err:
                _raise_helpful(err, directory, kept=not _clear(directory))
                raise
    except BaseException:
        for path in made:
            with suppress(OSError):  # it holds something
                path.rmdir()
        raise


@contextmanager
def lock_run(directory: Path) -> Iterator[None]:
    """Be the only process that writes the run in `directory`, which is made if it is missing.

    The lock belongs to the process and vanishes with it, however it ends; a lock file without its process is nothing.
    Raises InputError, naming the process that has it, or if the directory cannot be written; RunError for a full disk.
    """
    try:
        handle = _acquire(directory)
    except OSError as err:
        if err.errno in DISK_FULL:
            raise RunError(f"the disk is full, nothing can be written to {directory}: make room and try again") from err
        raise InputError(f"cannot write to {directory} ({err.strerror}): choose another --out") from err
    try:
        yield
    finally:
        (directory / LOCK).unlink(missing_ok=True)
        os.close(handle)


def _acquire(directory: Path) -> int:
    path = directory / LOCK
    for _ in range(ATTEMPTS):
        directory.mkdir(parents=True, exist_ok=True)
        handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _flock(handle, fcntl.LOCK_EX, directory)
            # between our opening and our locking, the last owner may have removed the file: then it locks nothing
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except FileNotFoundError:
            pass  # the last owner removed the file, or the directory with it
        except BaseException:
            if handle >= 0:
                os.close(handle)
            raise
        if handle >= 0:
            os.close(handle)
    raise InputError(f"{path} cannot be locked, it is replaced again and again: choose another --out")


def _flock(handle: int, kind: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError as err:
        owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
        who = f"process {owner}" if owner.isdigit() else "another process"
        raise InputError(f"{directory} is in use by {who}: wait for it, stop it, or choose another --out") from err
    except OSError as err:
        if err.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system that has no locks
            raise


def _occupied(directory: Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(path.name != LOCK for path in directory.iterdir()))


def _check(directory: Path, config: dict[str, Any], resume: bool, flags: Mapping[str, str]) -> bool:
    if not _occupied(directory):
        return False
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory} exists and holds no run of ours: choose another --out")
    before = read_json(directory / CONFIG)
    changed = sorted(key for key in before.keys() | config.keys() if before.get(key) != config.get(key))
    if not resume and (changed or not all(_is_litter(path, directory) for path in _files(directory))):
        raise InputError(f"{directory} exists already: add --resume to go on with it, or choose another --out")
    if changed:
        told = _differences(before, config, directory, flags)
        options = any(" was " in line and ", now " in line for line in told)
        way_on = "repeat the first command's options" if options else "name the first ones, or choose another --out"
        raise InputError(f"--resume: {'; '.join(told)}: {way_on}")
    return True


def _differences(
    before: dict[str, Any], now: dict[str, Any], directory: Path, flags: Mapping[str, str], prefix: str = ""
) -> list[str]:
    """Every setting that is not what it was, with both values, in the words of `flags` (see `check_run`)."""
    told: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        was, value = before.get(key), now.get(key)
        if was == value:
            continue
        known = flags.get(prefix + key) or flags.get(f"{prefix}*")
        name = known or prefix + key
        if known is not None and not known.startswith("-"):
            told.append(known)
        elif known and isinstance(was, dict) and isinstance(value, dict) and was.keys() != value.keys():
            told.append(f"{name} was {','.join(was)}, now {','.join(value)}")
        elif isinstance(was, dict) and isinstance(value, dict):
            told += _differences(was, value, directory, flags, "" if key == "source" else f"{prefix}{key}.")
        elif key == "data":
            told.append(f"the data are not those that {directory} was begun with")
        else:
            told.append(f"{name} was {_short(was)}, now {_short(value)}")
    # one option may stand behind several settings: its first tells enough
    first: dict[str, str] = {}
    for line in told:
        first.setdefault(line.split(" was ")[0], line)
    return list(first.values())


def _short(value: Any) -> str:
    """A setting as one would type it, but for the middle of what is long."""
    text = repr(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST // 2]}..{text[-WIDEST // 2 :]}"


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    try:
        write_json(directory / CONFIG, config)
    except OSError as err:
        if err.errno in DISK_FULL:
            raise
        raise InputError(f"cannot write to {directory} ({err.strerror}): choose another --out") from err


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if not path.is_dir()]


def _is_litter(path: Path, directory: Path) -> bool:
    """Whether a file of a run is worth nothing: configuration, log, previews and the checkpoint of step 0."""
    temporary = any(part.startswith(".") and part.endswith(".tmp") for part in path.relative_to(directory).parts)
    return temporary or path in (directory / CONFIG, directory / OPTIONS, directory / LOCK) or _worthless(path.name)


def _worthless(name: str) -> bool:
    logged = name == METRICS or name.startswith(EVENTS) or _PREVIEW.fullmatch(name) is not None
    return logged or checkpoint_step(Path(name)) == 0


def _clear(directory: Path) -> bool:
    """Remove a run that has nothing to go on from; returns whether it had nothing. No other file is ever touched."""
    if not all(_is_litter(path, directory) for path in _files(directory)):
        return False
    with suppress(OSError):
        sweep_temporaries(directory)
        for path in _files(directory):
            if path.name != LOCK:
                path.unlink(missing_ok=True)
        for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
            path.rmdir()
    return True


def _raise_helpful(err: BaseException, directory: Path, kept: bool) -> None:
    """Raise a failure again with how to go on, where it is one that the user is told in one line."""
    way_on = f"; {directory} is kept: --resume goes on with it, another --out starts afresh" if kept else ""
    if isinstance(err, OSError):
        where = err.filename or directory
        if err.errno in DISK_FULL:
            raise RunError(f"the disk is full, {where} was not written: make room and try again{way_on}") from err
        if kept and (err.filename or err.errno in DISK_BROKEN):
            raise RunError(f"{where} cannot be written or read: {err.strerror or err}{way_on}") from err
    if kept and isinstance(err, RunError):
        raise RunError(f"{err}{way_on}") from err

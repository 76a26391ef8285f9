"""Atomic writes, hashes and JSON: a file is the old one or the new one, never half of one; so is a directory (where the
system cannot swap two names, it has none for a moment)."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hsivi_cli.errors import InputError, RunError

SUMS = "SHA256SUMS"
DEEPEST = 100  # levels of JSON that are read: ours have a dozen, and what walks a tree calls itself once a level
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_BROKEN = (errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


def check_writable(out: str, parent: Path) -> None:
    """Raise InputError, naming `--out`, if nothing can be written into the folder `parent`."""
    if not parent.is_dir():
        raise InputError(f"--out {out}: the folder {parent} does not exist: make it first")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as err:
        raise InputError(f"--out {out} cannot be written ({err.strerror}): choose another path") from err


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Raise RunError in one line where the output `path` cannot be written after all."""
    try:
        yield
    except OSError as err:
        if err.errno in DISK_FULL:
            raise RunError(f"the disk is full, {path} was not written: make room or choose another --out") from err
        raise RunError(f"{path} was not written: {err.strerror or err}") from err


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, on failure removed.

    Raises InputError if the folder is missing or cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = _temporary_name(path)
    try:
        yield temporary
        _share(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except PermissionError as err:
        raise InputError(f"cannot write {path}: permission denied") from err
    except SafetensorError as err:  # how safetensors reports a full disk
        raise RunError(_not_written(path, err)) from err
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it takes the name `path`, on failure it is removed.

    Raises InputError if `path` exists and is not an empty directory, unless `overwrite`.
    """
    path = Path(os.path.abspath(path))
    occupied = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if occupied and not overwrite:
        raise InputError(f"{path} exists already: choose another path or remove it first")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = _temporary_name(path)
    retired = temporary.with_name(temporary.name + ".old")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _share(file)
            _sync(file)
        if not path.exists():
            os.replace(temporary, path)
        elif not _swap(temporary, path):
            os.replace(path, retired)
            os.replace(temporary, path)
        _sync(path.parent)
    except PermissionError as err:
        raise InputError(f"cannot write {path}: permission denied") from err
    except SafetensorError as err:  # how safetensors reports a full disk
        raise RunError(_not_written(path, err)) from err
    finally:
        if not path.exists() and retired.exists():
            os.replace(retired, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def sweep_temporaries(root: Path) -> None:
    """Remove what interrupted writes left under `root`; a directory caught between two names gets its own back."""
    for retired in root.rglob(".*.tmp.old"):
        name = retired.name[1:].rsplit(".", 3)[0]
        if not (retired.parent / name).exists():
            os.replace(retired, retired.parent / name)
    for left in [*root.rglob(".*.tmp"), *root.rglob(".*.tmp.old")]:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write a JSON object atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises InputError if the file is missing, is not JSON, or is not an object."""
    try:
        payload = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise InputError(f"{path} does not exist") from err
    except (ValueError, OSError) as err:
        raise InputError(f"{path} cannot be read as JSON ({err})") from err
    if not isinstance(payload, dict):
        raise InputError(f"{path} holds no JSON object")
    return payload


def parse_json(text: str) -> Any:
    """`json.loads` of text from anywhere: whatever is wrong with it, nested too deeply included, is a ValueError."""
    try:
        payload = json.loads(text)
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err
    depth, level = 0, [payload]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        level = [inside for node in level for inside in (node.values() if isinstance(node, dict) else node)]
    return payload


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(directory: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Write the SHA-256 of every file in a directory into it, as `sha256sum -c SHA256SUMS` reads them."""
    names = sorted(name for name in _inside(directory) if name not in (SUMS, *leave_out))
    lines = [f"{sha256(directory / name)}  {name}\n" for name in names]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path) -> None:
    """Raise InputError naming the file, if one is missing or is not what SHA256SUMS says; without that file, nothing.

    Files that SHA256SUMS does not name are no concern of it.
    """
    if not (directory / SUMS).is_file():
        return
    inside = _inside(directory)
    for line in (directory / SUMS).read_bytes().splitlines():
        digest, _, rest = line.decode(errors="replace").partition("  ")
        if len(digest) != 64 or not rest:
            raise InputError(f"{directory / SUMS} is damaged: remove it to do without it, or write {directory} anew")
        if rest not in inside:
            raise InputError(f"{directory / rest} is missing, though {SUMS} names it: fetch or write it again")
        if sha256(directory / rest) != digest:
            raise InputError(
                f"{directory / rest} is damaged: it is not what {SUMS} beside it says (if it was changed on purpose,"
                f" remove {SUMS})"
            )


def _inside(directory: Path) -> set[str]:
    return {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}


def asset(name: str) -> Path:
    """Path of a shipped asset, in an installed wheel or in a checkout; raises InputError if it is not there."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    root = checkout / "assets" if (checkout / "pyproject.toml").is_file() else package / "assets"
    if (root / name).exists():
        return root / name
    raise InputError(f"the shipped asset {name} is missing from this installation: reinstall hsivi")


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one act, so that neither is ever missing; returns whether the system could (Linux)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    done: bool = rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    return done


def _not_written(path: Path, err: SafetensorError) -> str:
    if any(f"os error {number}" in str(err) for number in DISK_FULL):
        return f"the disk is full, {path} was not written: make room and try again"
    return f"{path} was not written ({err}): make room and try again"


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _share(path: Path) -> None:
    """Give a file the permissions that the user's umask asks for; some writers make theirs private."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

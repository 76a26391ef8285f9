"""What this machine can hold: a request that cannot fit is refused before hours of work, not after."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from hsivi_cli.errors import InputError

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def free_memory() -> int:
    """Bytes of memory that this process may hope for: what the kernel calls available, less in a smaller cgroup."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = min(free, next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # "max", or no such file
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free


def free_disk(folder: Path) -> int:
    """Bytes that may still be written in `folder`."""
    return shutil.disk_usage(folder).free


def block_size(folder: Path) -> int:
    """Bytes that the smallest file takes in `folder`."""
    return os.statvfs(folder).f_frsize


def check_memory(what: str, needed: int, free: int | None = None) -> None:
    """Raise InputError if `needed` bytes do not fit memory; `what` begins the line, as "-n 10".

    `free` are the bytes of another memory than this machine's own, such as a GPU's.
    """
    if needed > (free := free_memory() if free is None else free):
        raise InputError(f"{what} takes {human(needed)} of memory, and {human(free)} are free: ask for fewer")


def check_disk(what: str, needed: int, folder: Path) -> None:
    """Raise InputError if `needed` bytes do not fit the disk of `folder`; `what` begins the line."""
    if needed > (free := free_disk(folder)):
        raise InputError(f"{what} takes {human(needed)} in {folder}, and {human(free)} are free: ask for fewer")


def human(size: int) -> str:
    """A size in bytes with four digits and a unit."""
    power = min((max(size, 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.4g} {_UNITS[power]}"

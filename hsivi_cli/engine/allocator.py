"""Freed memory that the process keeps: on a CPU, a network's activations otherwise cost page faults in every call."""

import ctypes
import os
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
KEPT = 2**30
LARGEST_OF_OLD = 2**25  # what glibc before 2.35 takes for the first
# with one of these in the environment the user has said how memory is to be allocated
SAID = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Have glibc reuse what is freed, up to 1 GiB, instead of giving it back; returns whether it does.

    It gives back blocks of some megabytes as soon as they are freed, and the kernel clears every page anew when the
    next layer asks for as much. Elsewhere than under glibc, and where the environment says otherwise, nothing changes.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SAID):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    kept = mallopt(MMAP_THRESHOLD, KEPT) or mallopt(MMAP_THRESHOLD, LARGEST_OF_OLD)
    return bool(kept) and bool(mallopt(TRIM_THRESHOLD, KEPT))

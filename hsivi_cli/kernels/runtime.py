"""Triton, and what stands in for it where it cannot be imported, so that the files with kernels in them always can."""

import contextlib
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

triton: Any = None
tl: Any = SimpleNamespace(constexpr=object)  # kernels have to be defined all the same: their signatures name it
with contextlib.suppress(ImportError):
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")


def jit(**options: Any) -> Callable[[Any], Any]:
    """`triton.jit`, or a decorator that leaves the function alone where there is no Triton."""
    if triton is None:
        return lambda function: function
    return triton.jit(**options) if options else triton.jit


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (block sizes must be powers of two)."""
    return 1 << max(n - 1, 0).bit_length()

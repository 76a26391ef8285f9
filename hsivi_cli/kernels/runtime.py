"""Where Triton can run, and what stands in for it where it cannot be imported (it is published for Linux only).

Kernels are written against `tl` and `jit` from here. Triton reads `TRITON_INTERPRET` when it is imported: with it set,
the same kernels run on CPU tensors in numpy, which is how they are tested without a GPU.
"""

import contextlib
import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from hsivi_cli.errors import InputError

Kernels = Literal["auto", "triton", "torch"]

triton: Any = None
tl: Any = SimpleNamespace(constexpr=object)  # kernels have to be defined all the same: their signatures name it
with contextlib.suppress(ImportError):
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

# Triton compares the variable with a few spellings of true; so do we
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
MIN_CAPABILITY = (8, 0)  # older GPUs have no bfloat16


def jit(**options: Any) -> Callable[[Any], Any]:
    """`triton.jit`, or a decorator that leaves the function alone where there is no Triton."""
    if triton is None:
        return lambda function: function
    return triton.jit(**options) if options else triton.jit


def triton_can_run(tensor: Tensor) -> bool:
    """Whether a kernel can be launched on this tensor's device."""
    if triton is None or torch.version.hip is not None:
        return False
    if tensor.device.type == "cpu":
        return INTERPRETED
    return tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) >= MIN_CAPABILITY


def use_triton(kernels: Kernels, tensor: Tensor) -> bool:
    """Resolve `--kernels` for a tensor; raises InputError where `triton` was asked for and cannot run."""
    if kernels == "torch":
        return False
    can = triton_can_run(tensor)
    if kernels == "triton" and not can:
        why = "Triton is not installed" if triton is None else f"Triton's kernels do not run on {tensor.device}"
        raise InputError(f"--kernels triton: {why}: use --kernels auto or torch")
    return can


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (block sizes must be powers of two)."""
    return 1 << max(n - 1, 0).bit_length()

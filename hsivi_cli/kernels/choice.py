"""Which side computes: `--kernels auto|triton|torch`, decided without importing Triton where it cannot run."""

import importlib
import os
from typing import Literal

import torch
from torch import Tensor

from hsivi_cli.errors import InputError

Kernels = Literal["auto", "triton", "torch"]

# Triton reads this when it is imported; with it set, kernels run on CPU tensors in numpy (for tests)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
MIN_CAPABILITY = (8, 0)  # older GPUs have no bfloat16


def triton_installed() -> bool:
    """Whether Triton can be imported; it is published for Linux only."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


def triton_can_run(tensor: Tensor) -> bool:
    """Whether a kernel can be launched on this tensor's device."""
    kind = tensor.device.type
    if kind == "cuda":
        here = torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) >= MIN_CAPABILITY
    else:
        here = kind == "cpu" and INTERPRETED
    return here and triton_installed()


def use_triton(kernels: Kernels, tensor: Tensor) -> bool:
    """Resolve `--kernels` for a tensor; raises InputError where `triton` was asked for and cannot run."""
    if kernels == "torch":
        return False
    can = triton_can_run(tensor)
    if kernels == "triton" and not can:
        why = f"its kernels do not run on {tensor.device}" if triton_installed() else "Triton is not installed"
        raise InputError(f"--kernels triton: {why}: use --kernels auto or torch")
    return can

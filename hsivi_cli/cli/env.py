"""`hsivi env`: versions, devices and kernels, to paste into a bug report."""

import importlib.metadata
import os
import platform
from typing import Any

import hsivi_cli
from hsivi_cli.cli import console, options
from hsivi_cli.errors import InputError

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "safetensors",
    "torch-fidelity",
    "typer",
    "numpy",
    "triton",
)


def env(as_json: options.AsJson = False) -> None:
    """Print versions, devices, kernels and shipped models, ready to paste into a bug report."""
    facts = environment()
    if as_json:
        console.result_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            console.result_line(f"{name}:")
            for key, item in value.items():
                console.result_line(f"  {key}: {item}")
        else:
            console.result_line(f"{name}: {', '.join(value) or 'none' if isinstance(value, list) else value}")


def environment() -> dict[str, Any]:
    """What this installation runs on, as plain JSON; a package that is missing is `None`."""
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        gpus.append(f"cuda:{i} {torch.cuda.get_device_name(i)} (capability {major}.{minor})")
    triton = _version("triton")
    return {
        "hsivi": hsivi_cli.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": ["cpu", *gpus],
        "kernels": {"triton": _triton_state(triton, bool(gpus))},
        "assets": _assets(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_state(version: str | None, gpu: bool) -> str:
    if version is None:
        return "not installed"
    if not gpu:
        return "installed, needs a GPU"
    import torch

    from hsivi_cli.kernels.choice import triton_can_run

    return "used by --kernels auto" if triton_can_run(torch.empty(0, device="cuda")) else "installed, GPU too old"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _assets() -> dict[str, str]:
    from hsivi_cli.io.files import asset, sha256

    try:
        root = asset("mnist").parent
    except InputError:
        return {}
    return {str(file.relative_to(root)): sha256(file)[:12] for file in sorted(root.rglob("*.safetensors"))}

"""Options that several subcommands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed; one independent stream a sample.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Samples a network call; the noise does not depend on it.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option("--threads", min=0, max=1024, help="CPU threads; 0 leaves torch's choice.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Solver = Annotated[str | None, typer.Option("--solver", help="Sample a teacher: ddim, dpm++, unipc, deis or ddpm.")]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        help="Solver's times: leading, trailing, linspace or quad (the students' grid; ddim, ddpm and dpm++ only). "
        "Default: best on the shipped teacher at NFE 5 and 10.",
    ),
]
Order = Annotated[
    int | None,
    typer.Option(
        "--order",
        help="Order of dpm++, unipc or deis: 1, 2 or 3. Default: best on the shipped teacher at NFE 5 and 10.",
    ),
]
Clip = Annotated[
    bool, typer.Option("--clip/--no-clip", help="Solver: clamp the predicted image to [-1, 1] in every step.")
]
SamplingPrecision = Annotated[
    str, typer.Option("--precision", help="fp32, or bf16: the network in bfloat16, faster where the hardware has it.")
]
Kernels = Annotated[
    str,
    typer.Option("--kernels", help="auto: fused Triton kernels on a GPU that can run them; triton or torch: insist."),
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Checkpoints to keep: the newest, and those before it.")]
OutDirectory = Annotated[Path, typer.Option("--out", help="Directory to write.")]


def resolve_device(device: str, threads: int = 0) -> str:
    """Turn `auto` into a device, set the thread count, and refuse a device that is not there (InputError)."""
    import torch

    from hsivi_cli.errors import InputError

    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise InputError(f"--device {device} is not available here: use --device auto or cpu") from err
    return device


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise InputError naming them."""
    from hsivi_cli.errors import InputError

    if value not in choices:
        raise InputError(f"{flag} {value!r} is unknown: choose from {', '.join(choices)}")
    return value


def check_precision(value: str) -> Literal["fp32", "bf16"]:
    """Return a precision, or raise InputError."""
    return "bf16" if check_choice("--precision", value, ("fp32", "bf16")) == "bf16" else "fp32"


def resolve_kernels(value: str, device: str) -> Literal["triton", "torch"]:
    """Turn `auto` into what runs on this device; raises InputError for `triton` where it cannot."""
    import torch

    from hsivi_cli.kernels.choice import use_triton

    choice: Any = check_choice("--kernels", value, ("auto", "triton", "torch"))
    return "triton" if use_triton(choice, torch.empty(0, device=device)) else "torch"


def parse_integers(flag: str, value: str) -> list[int]:
    """Read whole numbers separated by commas; raises InputError naming the flag."""
    from hsivi_cli.errors import InputError

    try:
        numbers = [int(item) for item in value.split(",")]
    except ValueError as err:
        raise InputError(f"{flag} {value!r}: give whole numbers separated by commas, as 5,10") from err
    if len(set(numbers)) != len(numbers):
        raise InputError(f"{flag} {value!r} repeats a number")
    return numbers

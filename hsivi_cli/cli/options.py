"""Options that several subcommands share, so that they read the same everywhere."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hsivi_cli.cli import console
from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    from hsivi_cli.kernels.choice import Kernels as KernelChoice
    from hsivi_cli.targets.score_net import NetworkOptions


def _check_tensorboard(wanted: bool) -> bool:
    from hsivi_cli.io.event_log import check_tensorboard

    if wanted:
        check_tensorboard()
    return wanted


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
    str,
    typer.Option(
        "--precision",
        "--mixed-precision",
        help="fp32, or bf16 or fp16: the network in half the bits, faster where the hardware has it.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        "--mixed-precision",
        help="fp32, or mixed: bf16 (twice as fast on new CPUs), or fp16, with the loss scaled.",
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(
        "--accumulate", min=1, help="Parts that each process computes its share of the batch in, to save memory."
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile/--no-compile",
        help="torch.compile the networks: a minute to start, then faster, on a CPU by a twentieth.",
    ),
]
Kernels = Annotated[
    str,
    typer.Option("--kernels", help="auto: fused, by Triton on a GPU that can run it; triton or torch: insist."),
]
Graph = Annotated[
    bool,
    typer.Option(
        "--graph", help="A student's whole chain as one CUDA graph: an NVIDIA GPU is told once, not each time."
    ),
]
Network = Annotated[
    str | None,
    typer.Option(
        "--network",
        help="FILE.py:FUNCTION that builds your own network, called as net(x, t) (the file is run: read it first; "
        "FILE.py alone means its function build), or a .json that says the architecture of weights in a known layout.",
    ),
]
Shape = Annotated[str | None, typer.Option("--shape", help="C,H,W of an image, for a file of weights.")]
Schedule = Annotated[
    str | None,
    typer.Option("--schedule", help="Noise of the teacher where no file says it: linear, scaled_linear or cosine."),
]
BetaStart = Annotated[float | None, typer.Option("--beta-start", help="First beta of that schedule (1e-4).")]
BetaEnd = Annotated[float | None, typer.Option("--beta-end", help="Last beta of that schedule (0.02).")]
Timesteps = Annotated[int | None, typer.Option("--timesteps", min=2, help="Times of that schedule (1000).")]
Prediction = Annotated[
    str | None, typer.Option("--prediction", help="What the teacher predicts: epsilon, v_prediction or sample.")
]
Label = Annotated[int | None, typer.Option("--class", min=0, help="Class to draw; default: all of them in turn.")]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        callback=_check_tensorboard,
        help="Write TensorBoard event files too, beside the metrics of the run.",
    ),
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Checkpoints to keep: the newest, and those before it.")]
OutDirectory = Annotated[Path, typer.Option("--out", help="Directory to write.")]


def resolve_device(device: str, threads: int = 0) -> str:
    """Turn `auto` into a device, set the thread count, and refuse a device that is not there (InputError).

    Several processes join here, each with a device of its own.
    """
    import torch

    from hsivi_cli.engine import processes

    if threads:
        torch.set_num_threads(threads)
    if processes.launched_alone():
        console.warn("accelerate starts one process only on a CPU: for several use torchrun --nproc-per-node N -m ...")
    device = processes.start(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise InputError(f"--device {device} is not available here: use --device auto or cpu") from err
    return device


def image_device(device: str, threads: int = 0) -> str:
    """As `resolve_device`, for commands that run image networks: on a CPU, activations' memory is kept for the next."""
    from hsivi_cli.engine.allocator import keep_freed_memory

    place = resolve_device(device, threads)
    if place == "cpu":
        keep_freed_memory()
    return place


def check_choice(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise InputError naming them."""
    if value not in choices:
        raise InputError(f"{flag} {value!r} is unknown: choose from {', '.join(choices)}")
    return value


def check_precision(value: str, device: str = "") -> Literal["fp32", "bf16", "fp16"]:
    """Return a precision, of which Accelerate calls the first one `no`, or raise InputError."""
    precision: Any = "fp32" if value == "no" else check_choice("--precision", value, ("fp32", "bf16", "fp16"))
    if precision == "fp16" and device == "cpu":
        console.warn("--precision fp16 is slow on a CPU: bf16 is as small, and made for it")
    return precision


SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}


def network_options(
    network: str | None,
    shape: str | None,
    schedule: str | None,
    beta_start: float | None,
    beta_end: float | None,
    timesteps: int | None,
    prediction: str | None,
) -> "NetworkOptions":
    """What the flags say about a network; raises InputError naming the flag."""
    from hsivi_cli.bridges.schedule import PREDICTION_TYPES
    from hsivi_cli.targets.score_net import NetworkOptions

    sides = parse_integers("--shape", shape, distinct=False) if shape else None
    if sides is not None and (len(sides) != 3 or min(sides) < 1):
        raise InputError(f"--shape {shape!r}: give channels, height and width, as 3,32,32")
    if sides is not None:
        check_shape((sides[0], sides[1], sides[2]))
    fields: dict[str, Any] = {}
    if schedule is not None:
        fields["beta_schedule"] = SCHEDULES[check_choice("--schedule", schedule, tuple(SCHEDULES))]
    given = {"beta_start": beta_start, "beta_end": beta_end, "num_train_timesteps": timesteps}
    fields |= {name: value for name, value in given.items() if value is not None}
    if prediction is not None:
        fields["prediction_type"] = check_choice("--prediction", prediction, PREDICTION_TYPES)
    return NetworkOptions(network, (sides[0], sides[1], sides[2]) if sides else None, fields)


def resolve_kernels(value: str, device: str, compiled: bool = False) -> "KernelChoice":
    """Turn `auto` into what runs on this device and agrees with torch there, a moment's check.

    On a CPU it stays `auto`: fused modules that torch computes. Raises InputError for `triton` where it cannot run.
    """
    import torch

    from hsivi_cli.kernels.choice import use_triton

    choice: Any = check_choice("--kernels", value, ("auto", "triton", "torch"))
    if compiled:  # torch writes its own kernels, and cannot look into ours
        if choice == "triton":
            raise InputError("--kernels triton and --compile are two ways to the same end: choose one of them")
        return "torch"
    if not use_triton(choice, torch.empty(0, device=device)):
        return "auto" if choice == "auto" and device == "cpu" else "torch"
    from hsivi_cli.kernels.agreement import agrees

    return "triton" if choice == "triton" or agrees(torch.device(device)) else "torch"


def check_shape(shape: tuple[int, int, int]) -> None:
    """Raise InputError, before a network is tried with two images of this shape, if these alone do not fit memory."""
    from hsivi_cli.io.capacity import free_memory, human

    needed = 4 * 2 * math.prod(shape)
    if needed > (free := free_memory()):
        given, size = ",".join(map(str, shape)), "x".join(map(str, shape))
        raise InputError(
            f"--shape {given}: 2 images of {size} alone take {human(needed)} of memory, and {human(free)} are free: "
            "give smaller ones"
        )


@contextmanager
def from_config(ctx: typer.Context, name: str, config_file: Path | None) -> Iterator[None]:
    """Add to an InputError where the relative path of the option `name` starts, if `--config` gave it."""
    try:
        yield
    except InputError as err:
        path = Path(str(ctx.params.get(name)))
        source = ctx.get_parameter_source(name)
        if config_file is None or source is None or source.name != "DEFAULT_MAP" or path.exists() or path.is_absolute():
            raise
        raise InputError(
            f"{err} ({path} is from {config_file}: its head says which folder its paths are relative to, go there)"
        ) from err


def flags_of(plan: Iterable[str], others: Mapping[str, str]) -> dict[str, str]:
    """How the settings of a run are called on the command line, for `check_run`: by their own name but for `others`."""
    return {name: f"--{name.replace('_', '-')}" for name in plan} | dict(others)


def parse_integers(flag: str, value: str, distinct: bool = True) -> list[int]:
    """Read whole numbers separated by commas, no number twice if `distinct`; raises InputError naming the flag."""

    try:
        numbers = [int(item) for item in value.split(",")]
    except ValueError as err:
        raise InputError(f"{flag} {value!r}: give whole numbers separated by commas, as 5,10") from err
    if distinct and len(set(numbers)) != len(numbers):
        raise InputError(f"{flag} {value!r} repeats a number")
    return numbers

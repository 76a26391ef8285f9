"""What `hsivi bench` measures: whole sampling, a distillation step and each kernel, all sides of a case in one run."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.engine.optimisation import TYPES, Precision, autocast
from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.engine.timing import Timing, copy_bandwidth, matmul_rate, time_sides
from hsivi_cli.io.files import atomic_file
from hsivi_cli.kernels.choice import Kernels, triton_can_run
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.benchmark_peer import PipelineProcess, can_be_piped, pipeline_call
from hsivi_cli.methods.graphed import GraphedChain, graphable
from hsivi_cli.methods.student import Student, sample_student, walk_chain
from hsivi_cli.networks.noise_prediction import predict_eps, sample_labels
from hsivi_cli.targets.score_net import ScoreNet

OURS, EAGER, PIPELINE = "hsivi", "eager", "diffusers DDIMPipeline"
LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, **TYPES}


@dataclass(frozen=True)
class Case:
    """Sides that compute the same, and what it costs at least: bytes moved and floating-point operations a call."""

    name: str
    batch: int
    precision: Precision
    sides: dict[str, Callable[[int], Any]]
    bytes: int = 0
    flops: int = 0
    inner: int = 1


@dataclass(frozen=True)
class Row:
    """One side of a case, measured; shares of the machine's copy bandwidth and matmul rate, None if not counted."""

    case: str
    side: str
    batch: int
    precision: str
    timing: Timing
    bandwidth_share: float | None
    matmul_share: float | None


@dataclass(frozen=True)
class Machine:
    """What a device can do at most, measured in this run."""

    device: str
    copy_bytes_per_second: float
    matmul_flops_per_second: dict[str, float]


def measure_machine(device: torch.device, precisions: list[Precision]) -> Machine:
    """Copy bandwidth, and the rate of a large product in each precision."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Machine(name, copy_bandwidth(device), {p: matmul_rate(device, DTYPES[p]) for p in precisions})


def run_case(
    case: Case,
    machine: Machine,
    repeats: int,
    device: torch.device,
    failed: Callable[[str, Exception], Any] | None = None,
) -> list[Row]:
    """Measure all sides of a case; `failed(side, error)` is told of sides that cannot do it, which are left out."""
    rows = []
    try:
        timings = time_sides(case.sides, repeats, device, case.inner, failed=failed)
    finally:
        for side in case.sides.values():
            if isinstance(side, PipelineProcess):
                side.close()
    for name, timing in timings.items():
        bandwidth = case.bytes / timing.median / machine.copy_bytes_per_second if case.bytes else None
        rate = machine.matmul_flops_per_second[case.precision]
        matmul = case.flops / timing.median / rate if case.flops else None
        rows.append(Row(case.name, name, case.batch, case.precision, timing, bandwidth, matmul))
    return rows


def cifar_student(device: torch.device, nfe: int = 10) -> Student:
    """A student of the size of the CIFAR-10 DDPM (35.7 M parameters), with random weights."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            norm_eps=1e-6,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
    unet = unet.to(device).eval().requires_grad_(False)
    schedule = schedule_from_config(LINEAR)
    return Student(unet, torch.zeros(3, 32, 32, device=device), make_grid("quad", nfe, schedule), 0.2, schedule, {})


def sample_case(student: Student, batch: int, precision: Precision, compile_modes: tuple[str, ...] = ()) -> Case:
    """Whole sampling: ours, the plain loop, the loop with a compiled network, and diffusers' pipeline as it comes.

    The peers are what one would write without us: `torch.randn`, and in half precision on a GPU a network in half the
    bits and channels_last, as our graph has it.
    """
    device = next(student.unet.parameters()).device
    # the fused copy is ours alone: the other sides must see the network as diffusers made it
    mine = dataclasses.replace(student, unet=copy.deepcopy(student.unet))
    theirs = copy.deepcopy(student.unet)
    half = device.type == "cuda" and precision in TYPES
    if half:
        theirs = theirs.to(DTYPES[precision]).to(memory_format=torch.channels_last)
    labels = sample_labels(student.classes, range(batch), student.label, device)

    def noise(i: int) -> PhiloxStreams:
        return PhiloxStreams(i, range(batch), device)

    def loop(network: nn.Module, i: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(i)

        def draw() -> Tensor:
            return torch.randn(batch, *student.shape, device=device, generator=generator)

        def eps(x: Tensor, t: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            if half:
                x = x.to(DTYPES[precision], memory_format=torch.channels_last)
                return predict_eps(network, x, t, student.schedule, labels)
            with autocast(precision, device):
                return predict_eps(network, x, t, student.schedule, labels)

        return walk_chain(eps, student.log_gamma, student.layers, draw)

    def graphed(channels_last: bool) -> Callable[[int], Tensor]:
        chain = functools.cache(lambda: GraphedChain(student, batch, precision, channels_last, kernels))
        return lambda i: chain().run(noise(i).streams)

    kernels: Kernels = "triton" if triton_can_run(student.log_gamma) else "auto"
    sides: dict[str, Callable[[int], Any]] = {
        OURS: lambda i: sample_student(mine, noise(i), precision, kernels),
        EAGER: lambda i: loop(theirs, i),
    }
    for mode in compile_modes:
        compiled: Any = torch.compile(copy.deepcopy(theirs), mode=mode, dynamic=False)
        sides[f"compile ({mode})"] = functools.partial(loop, compiled)
    if device.type == "cuda" and graphable(student):
        sides |= {f"{OURS} (graph)": graphed(False), f"{OURS} (graph, channels_last)": graphed(True)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict_eps(student.unet, torch.zeros(batch, *student.shape, device=device), 1, student.schedule, labels)
    sides = {name: torch.no_grad()(side) for name, side in sides.items()}
    if can_be_piped(student):
        given = (theirs, student.schedule.config, student.nfe, batch, "fp32" if half else precision)
        sides[PIPELINE] = PipelineProcess(*given) if device.type == "cpu" else pipeline_call(*given)
    return Case(f"sample, NFE {student.nfe}", batch, precision, sides, flops=student.nfe * counter.get_total_flops())


class Kept(nn.Module):
    """A network compiled in some mode, its outputs kept: with CUDA graphs the next call would overwrite them."""

    def __init__(self, network: nn.Module, mode: str) -> None:
        super().__init__()
        self.network = network
        self.compiled = torch.compile(network, mode=mode, dynamic=False)

    @property
    def config(self) -> Any:
        """The network's own."""
        return self.network.config

    def forward(self, *given: Any, **more: Any) -> Tensor:
        """The noise it predicts."""
        out: Tensor = self.compiled(*given, **more).sample
        return out.clone()


def distill_case(student: Student, batch: int, precision: Precision, compile_modes: tuple[str, ...] = ()) -> Case:
    """One distillation step (rollout, five critic steps, a student step): ours, eager, and with compiled networks."""
    device = next(student.unet.parameters()).device

    def step(kernels: Kernels, mode: str | None = None) -> Callable[[int], Any]:
        teacher = ScoreNet(copy.deepcopy(student.unet), student.schedule, Path(), "")
        config = hsivi_sm.DistillConfig(
            student.grid, steps=10**6, batch=batch, precision=precision, device=str(device), kernels=kernels
        )
        state = hsivi_sm.init(teacher, config)
        if mode is not None:
            state.student, state.critic = Kept(state.student, mode), Kept(state.critic, mode)
            state.ema_student = Kept(state.ema_student, mode)  # never called: its parameters pair with the student's
            state.teacher = dataclasses.replace(teacher, unet=Kept(teacher.unet, mode))

        def run(i: int) -> dict[str, float]:
            torch.compiler.cudagraph_mark_step_begin()
            return hsivi_sm.step(state, None, generator(0, Stream.TRAIN, i))

        return run

    sides = {EAGER: step("torch")} | {f"compile ({mode})": step("torch", mode) for mode in compile_modes}
    if triton_can_run(student.log_gamma) or device.type == "cpu":
        sides = {OURS: step("auto")} | sides
    return Case(f"distillation step, NFE {student.nfe}", batch, precision, sides)


def relative_to_best(rows: list[Row]) -> list[float]:
    """Each side's time over the fastest side's of its case."""
    keys = [(row.case, row.batch, row.precision) for row in rows]
    best = {key: min(r.timing.median for r, k in zip(rows, keys, strict=True) if k == key) for key in keys}
    return [row.timing.median / best[key] for row, key in zip(rows, keys, strict=True)]


def plot_rows(rows: list[Row], path: Path) -> None:
    """Times of all sides, a bar each with its quartiles, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    medians = [row.timing.median * 1e3 for row in rows]
    below = [(row.timing.median - row.timing.low) * 1e3 for row in rows]
    above = [(row.timing.high - row.timing.median) * 1e3 for row in rows]
    names = [f"{row.case}, {row.batch}, {row.precision}: {row.side}" for row in rows]
    colours = ["tab:green" if row.side.startswith(OURS) else "tab:grey" for row in rows]
    axes.barh(range(len(rows)), medians, xerr=[below, above], color=colours)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms a call (median and quartiles)")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

"""Students as files that need only torch: the whole few-step sampler, noise in and images out."""

import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Int
from torch import Tensor, nn

from hsivi_cli.bridges.schedule import NoiseSchedule
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.files import atomic_file, sha256
from hsivi_cli.methods.student import DESCRIPTION, Student, load_student, sample_student
from hsivi_cli.methods.student_file import write_student_file
from hsivi_cli.networks.noise_prediction import predict_eps, sample_labels
from hsivi_cli.transitions.gaussian_layer import layer_std

SUFFIXES = {".pt": "torchscript", ".ts": "torchscript", ".pt2": "torch-export", ".safetensors": "safetensors"}
FORMATS = ("torchscript", "torch-export", "safetensors")
CHECKED = (1, 3)  # batch sizes that an exported file is compared at
TOLERANCE = 1e-3  # largest difference, of images in [-1, 1], that is rounding


@dataclass(frozen=True)
class Exported:
    """A file that was written and opened again.

    `max_difference` is the largest between its images and the student's, on a scale of [-1, 1], over `images` of them.
    """

    path: Path
    format: str
    bytes: int
    sha256: str
    max_difference: float
    images: int


class NoisePrediction(nn.Module):
    """The student's network as one call that predicts the noise, whatever the network predicts."""

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Noise in `x`, shape (n, c, h, w), at the time `t`, shape ()."""
        return predict_eps(self.network, x, t, self.schedule, labels)


class FewStepSampler(nn.Module):
    """The whole chain: `sampler(noise)`, of shape (K, n, c, h, w), gives images (n, c, h, w) in about [-1, 1].

    `noise[0]` is x_K, `noise[i]` what the i-th layer adds; a class-conditional student wants `labels`, shape (n,), too.
    """

    # for TorchScript, which knows no jaxtyping either
    conditional: Final[bool]
    times: Tensor
    scale_x: Tensor
    scale_eps: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, student: Student) -> None:
        super().__init__()
        self.network = network
        self.conditional = student.classes > 0
        layers, device = student.layers, student.log_gamma.device
        # in the order they are walked, and in float32, as the student's own coefficients are when they meet an image
        self.register_buffer("times", layers.times[1:].flip(0).to(device))
        self.register_buffer("scale_x", layers.A[1:].flip(0).float().to(device))
        self.register_buffer("scale_eps", layers.B[1:].flip(0).float().to(device))
        like = torch.empty(1, *student.shape, device=device)
        noisy = range(student.nfe, 1, -1)  # the last layer adds none
        stds = [layer_std(student.log_gamma, torch.tensor([k]), layers, like)[0].expand(student.shape) for k in noisy]
        self.register_buffer("std", torch.stack(stds) if stds else torch.zeros_like(like))

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Walk the layers; fails, in every format, if `noise` has not one draw a layer."""
        assert noise.shape[0] == self.times.shape[0], "noise wants one draw a network evaluation: (K, n, c, h, w)"
        x = noise[0]
        for i in range(self.times.shape[0]):
            if self.conditional:
                assert labels is not None
                eps = self.network(x, self.times[i], labels)
            else:
                eps = self.network(x, self.times[i])
            x = self.scale_x[i] * x + self.scale_eps[i] * eps
            if i + 1 < self.times.shape[0]:
                x = x + self.std[i] * noise[i + 1]
        return x


Run = Callable[..., Tensor]  # noise and, of a class-conditional student, labels to images


def choose_format(out: Path, asked: str | None) -> str:
    """The format that `--format` or the file's ending asks for; raises InputError if they say nothing or differ."""
    by_suffix = SUFFIXES.get(out.suffix)
    if asked is not None and asked not in FORMATS:
        raise InputError(f"--format {asked!r} is unknown: choose from {', '.join(FORMATS)}")
    if asked is None and by_suffix is None:
        endings = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise InputError(f"--out {out} has none of the endings {endings}: choose one, or say --format")
    chosen = asked or by_suffix
    assert chosen is not None
    if ".safetensors" in (out.suffix, ".safetensors" if chosen == "safetensors" else "") and by_suffix != chosen:
        raise InputError(f"--out {out}: a file ends in .safetensors exactly if --format is safetensors")
    return chosen


def check_out(out: Path, force: bool) -> None:
    """Raise InputError if `out` exists, unless `force`."""
    if out.exists() and not force:
        raise InputError(f"--out {out} exists already: choose another path or add --force")


def export_student(student: Student, out: Path, kind: str, network: str | None = None, force: bool = False) -> Exported:
    """Write `student` to the file `out` as `kind` says, open it again, and compare.

    `network` is the `FILE:FUNCTION` of a user's own network. Raises InputError if `out` exists, unless `force`;
    RunError, and then nothing is written, if the student cannot be exported that way or the file draws other images.
    """
    check_out(out, force)
    with atomic_file(out) as temporary:
        if kind == "safetensors":
            assert student.path is not None
            write_student_file(student.path, temporary)
        else:
            write = write_torchscript if kind == "torchscript" else write_torch_export
            write(student, temporary)
        run = open_exported(temporary, kind, student, network)
        with _told(kind):  # a program that was made for one batch size fails at another
            difference = largest_difference(student, run)
        if not difference <= TOLERANCE:
            raise RunError(f"{out} was not written: opened again, its images are {difference:.3g} from the student's")
        size, digest = temporary.stat().st_size, sha256(temporary)
    return Exported(out, kind, size, digest, difference, sum(CHECKED))


def write_torchscript(student: Student, file: Path) -> None:
    """The sampler as TorchScript: the network traced, the loop around it scripted; for any batch, on this device."""
    prediction = NoisePrediction(student.unet, student.schedule)
    example = tuple(value[0] if i == 0 else value for i, value in enumerate(_inputs(student, 2)))
    x, labels = example[0], example[1:]
    t = torch.tensor(student.grid[-1], device=x.device)
    with _told("torchscript"), torch.no_grad():
        traced = torch.jit.trace(prediction, (x, t, *labels), check_trace=False)
        scripted = torch.jit.script(FewStepSampler(traced, student))
        torch.jit.save(scripted, file, _extra_files={DESCRIPTION: json.dumps(student.description)})


def write_torch_export(student: Student, file: Path) -> None:
    """The sampler as a `torch.export` program, its K layers unrolled; for any batch."""
    sampler = FewStepSampler(NoisePrediction(student.unet, student.schedule), student).eval()
    batch = torch.export.Dim("batch")
    inputs = _inputs(student, 2)
    dynamic = ({1: batch}, *({0: batch} for _ in inputs[1:]))
    buffer = io.BytesIO()  # a temporary name has not the ending that torch asks for
    with _told("torch-export"), torch.no_grad(), batch_free_upsampling(student.unet):
        # the batch is known by its symbol only, so that no size is taken for a constant
        program = torch.export.export(sampler, inputs, dynamic_shapes=dynamic)
        torch.export.save(program, buffer, extra_files={DESCRIPTION: json.dumps(student.description)})
    file.write_bytes(buffer.getvalue())


def open_exported(file: Path, kind: str, student: Student, network: str | None = None) -> Run:
    """A written file as anyone would open it: a call from noise, and labels, to images."""
    device = student.log_gamma.device
    with _told(kind):
        if kind == "torchscript":
            return torch.jit.load(file, map_location=device)
        if kind == "torch-export":
            return torch.export.load(io.BytesIO(file.read_bytes())).module()
    again = load_student(file, str(device), network)
    return FewStepSampler(NoisePrediction(again.unet, again.schedule), again).eval()


@torch.no_grad()
def largest_difference(student: Student, run: Run) -> float:
    """Between the images of the student and of `run`, for the same noise in batches of CHECKED sizes."""
    largest = 0.0
    for n in CHECKED:
        expected = sample_student(student, PhiloxStreams(0, range(n)))
        # the second call of a script is another program: optimised
        for _ in range(2):
            largest = max(largest, float((run(*_inputs(student, n)) - expected).abs().max().nan_to_num(torch.inf)))
    return largest


@contextmanager
def batch_free_upsampling(network: nn.Module) -> Iterator[None]:
    """Let diffusers' upsampling not look at the size of the batch: an exported program would be bound to less than 64.

    What it looks for (old defects of CUDA kernels) changes the memory format only.
    """
    from diffusers.models.upsampling import Upsample2D

    changed = [m for m in network.modules() if type(m) is Upsample2D and m.interpolate and not m.use_conv_transpose]
    changed = [module for module in changed if module.norm is None]

    def upsample(module: Any, x: Tensor, size: Any) -> Tensor:
        fine = {"scale_factor": 2.0} if size is None else {"size": size}
        x = nn.functional.interpolate(x, **fine, mode="nearest")
        convolution = module.conv if module.name == "conv" else module.Conv2d_0
        return convolution(x) if module.use_conv else x

    for module in changed:
        module.forward = lambda x, output_size=None, m=module: upsample(m, x, output_size)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _inputs(student: Student, n: int) -> tuple[Tensor, ...]:
    """The noise of `sample_student` for the samples 0 .. n - 1 of seed 0, all draws stacked, and any labels."""
    device, streams = student.log_gamma.device, PhiloxStreams(0, range(n))
    noise = torch.stack([streams.draw(student.shape, device) for _ in range(student.nfe)])
    labels: Int[Tensor, " n"] | None = sample_labels(student.classes, range(n), student.label, device)
    return (noise,) if labels is None else (noise, labels)


@contextmanager
def _told(kind: str) -> Iterator[None]:
    """Raise RunError for a network that a format cannot hold; torch's warnings about its own future stay out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (InputError, RunError, OSError, MemoryError):
        raise
    except Exception as err:  # whatever the tracers raise
        # of a program that fails, the last line is the reason, after pages of where
        reason = " ".join((str(err).strip().splitlines() or [""])[-1 if kind == "torchscript" else 0].split())[:200]
        other = "torchscript" if kind == "torch-export" else "torch-export"
        raise RunError(
            f"this network cannot be exported as {kind}: try --format {other} or safetensors, and x.shape[0] for "
            f"len(x), which makes the batch's size a constant ({type(err).__name__}: {reason})"
        ) from err

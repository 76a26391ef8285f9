"""What kernels must not change: the images of a student, their FID, and the losses of a distillation.

Where Triton cannot run, the kernels' torch references stand in for them, fused modules and layers included: a smaller
check of the same paths.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from hsivi_cli.engine.optimisation import Precision, autocast
from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.kernels.choice import Kernels, triton_can_run
from hsivi_cli.kernels.convert import fused
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.sampling import to_uint8
from hsivi_cli.methods.student import Student, sample_student, walk_fused
from hsivi_cli.networks.noise_prediction import predict_eps, sample_labels
from hsivi_cli.targets.score_net import ScoreNet

Fid = Callable[[UInt8[np.ndarray, "n h w c"]], float]
LOSSES = ("critic_loss", "student_loss", "fisher", "critic_gap")


@dataclass(frozen=True)
class SameImages:
    """The same `n` seeds drawn with and without kernels: how far apart they are in grey levels, and the FID of each.

    `with_kernels` is "triton", or "auto" for the references; `moved` the share of values that differ at all.
    """

    with_kernels: Kernels
    precision: Precision
    n: int
    max_difference: int
    moved: float
    fid_with: float | None
    fid_without: float | None


@dataclass(frozen=True)
class SameLosses:
    """`steps` of two distillations that start alike, with and without kernels: the largest relative differences."""

    with_kernels: Kernels
    precision: Precision
    steps: int
    objective: str
    max_relative_difference: dict[str, float]


def side(student: Student) -> Kernels:
    """What stands for the kernels on this student's device."""
    return "triton" if triton_can_run(student.log_gamma) else "auto"


def same_images(student: Student, n: int, batch: int, precision: Precision, fid: Fid | None = None) -> SameImages:
    """Draw samples 0 .. n-1 of seed 0 both ways; `fid` measures each lot."""
    kernels, lots = side(student), {}
    mine = dataclasses.replace(student, unet=copy.deepcopy(student.unet))
    for name in ("with", "without"):
        batches = []
        for start in range(0, n, batch):
            noise = PhiloxStreams(0, range(start, min(start + batch, n)))
            draw = _by_kernels(mine, noise, precision, kernels) if name == "with" else None
            batches.append(to_uint8(sample_student(student, noise, precision, "torch") if draw is None else draw))
        lots[name] = np.concatenate(batches)
    apart = np.abs(lots["with"].astype(int) - lots["without"])
    fids = [fid(lot) if fid else None for lot in lots.values()]
    return SameImages(kernels, precision, n, int(apart.max()), float((apart > 0).mean()), *fids)


@torch.no_grad()
def _by_kernels(student: Student, noise: PhiloxStreams, precision: Precision, kernels: Kernels) -> Tensor:
    """As `sample_student`, but fused whatever the device."""
    device = next(student.unet.parameters()).device
    labels = sample_labels(student.classes, noise.indices, student.label, device)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        with autocast(precision, device):
            return predict_eps(student.unet, x, t, student.schedule, labels)

    with fused(student.unet, kernels):
        return walk_fused(eps, student.log_gamma.to(device), student.layers, student.shape, noise, kernels)


def same_losses(
    student: Student, steps: int, batch: int, precision: Precision, objective: hsivi_sm.Objective = "diffused-kl"
) -> SameLosses:
    """Distil the student's network twice, as if it were a teacher, with what `hsivi distill` does by default."""
    kernels, device = side(student), next(student.unet.parameters()).device
    logs: list[list[dict[str, float]]] = []
    sides: tuple[Kernels, Kernels] = (kernels, "torch")
    for chosen in sides:
        teacher = ScoreNet(copy.deepcopy(student.unet), student.schedule, Path(), "")
        config = hsivi_sm.DistillConfig(
            student.grid, steps, objective, batch=batch, precision=precision, device=str(device), kernels=chosen
        )
        state = hsivi_sm.init(teacher, config)
        draws = [generator(config.seed, Stream.TRAIN, i + 1) for i in range(steps)]
        logs.append([hsivi_sm.step(state, None, drawn) for drawn in draws])
    found = {}
    for name in LOSSES:
        pairs = [(a[name], b[name]) for a, b in zip(*logs, strict=True)]
        size = max(abs(b) for _, b in pairs)
        # the critic starts as the teacher: the first steps' gap is rounding, and is judged on the scale of the rest
        found[name] = max(abs(a - b) / max(abs(b), 1e-3 * size) for a, b in pairs) if size else 0.0
    return SameLosses(kernels, precision, steps, objective, found)

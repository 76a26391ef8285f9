"""Images from a student or from a solver on its teacher, behind one small object, so that both are measured alike."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hsivi_cli.engine import processes
from hsivi_cli.engine.optimisation import Precision, autocast
from hsivi_cli.engine.run_view import refuse_unfinished
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.exported import refuse_program
from hsivi_cli.io.files import asset
from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.convert import fused
from hsivi_cli.methods.graphed import GraphedSampler, graphable
from hsivi_cli.methods.student import DESCRIPTION, Student, find_students, load_student, sample_student, select_student
from hsivi_cli.methods.student_file import OF_STUDENT
from hsivi_cli.networks.compiled import CompiledNetwork
from hsivi_cli.networks.noise_prediction import sample_labels
from hsivi_cli.targets.score_net import SCHEDULER_PLACES, NetworkOptions, ScoreNet, load_score_net
from hsivi_cli.transitions.solvers import SOLVERS, best_spacing, resolve_order, solve, solver_times

DEFAULT_NFE = 10
SHIPPED_TEACHER = "mnist/teacher"
QUANTISATION = "uint8, round((clamp(x, -1, 1) + 1) * 127.5)"


@dataclass(frozen=True)
class Sampler:
    """Something that turns noise into images at a fixed cost.

    `run(noise)` returns one image a stream, shape `(n, c, h, w)` and in about [-1, 1], or `(n, h, w, c)` in uint8;
    `shape` is `(c, h, w)`; `description` is plain JSON that says what made the images.
    """

    name: str
    nfe: int
    shape: tuple[int, int, int]
    run: Callable[[PhiloxStreams], Tensor]
    description: dict[str, Any]
    compiles: bool = False  # during the first batch, which says nothing then about the pace


def open_sampler(
    path: Path | None,
    nfe: int | None = None,
    solver: str | None = None,
    spacing: str | None = None,
    device: str = "cpu",
    order: int | None = None,
    clip: bool = False,
    precision: Precision = "fp32",
    kernels: Kernels = "torch",
    options: NetworkOptions | None = None,
    label: int | None = None,
    compiled: bool = False,
    graph: bool = False,
) -> Sampler:
    """The sampler that a user's path, NFE and solver name; `path` None is what ships with the package.

    Without `solver`, `path` is a student or a run of students; with it, the directory of a score network, and
    `spacing`, `order` and `clip` are as in `solver_sampler`. `options` say what the network's files do not, `label` is
    the class to draw, `compiled` has torch compile the network, `graph` captures a student's chain as a CUDA graph.
    Raises InputError, naming the command to type instead, for anything else.
    """
    options = options or NetworkOptions()
    one_file = path is not None and path.is_file() and path.suffix == ".safetensors"  # of hsivi export, if of ours
    if path is not None and not path.is_dir() and not one_file and solver is None:
        refuse_program(path, OF_STUDENT)
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: name the directory of a student, of a run, or (with --solver) of a teacher")
    if path is not None and solver is None:
        refuse_unfinished(path, nfe)
    is_teacher = path is not None and any((path / place).is_file() for place in SCHEDULER_PLACES)
    if path is not None and (path / DESCRIPTION).is_file():
        is_teacher = False  # a student has a scheduler too, for diffusers
    if graph and solver is not None:
        raise InputError("--graph is for students, not for --solver: leave it out")
    if graph and (compiled or torch.device(device).type != "cuda"):
        why = (
            "--compile is another way to the same end" if compiled else f"it needs an NVIDIA GPU, and this is {device}"
        )
        raise InputError(f"--graph: {why}: leave it out")
    if solver is not None:
        if path is not None and not is_teacher and find_students(path):
            raise InputError(
                f"{path} holds students, --solver samples their teacher: name its directory, or drop --solver"
            )
        score_net = load_score_net(asset(SHIPPED_TEACHER) if path is None else path, device, options)
        steps = DEFAULT_NFE if nfe is None else nfe
        if compiled:
            score_net = dataclasses.replace(score_net, unet=CompiledNetwork(score_net.unet))
        return solver_sampler(score_net, solver, steps, spacing, order, clip, precision, kernels, label)
    for flag, given in (("--spacing", spacing is not None), ("--order", order is not None), ("--clip", clip)):
        if given:
            raise InputError(f"{flag} belongs to a solver: pass --solver too")
    if is_teacher:
        raise InputError(
            f"{path} is a score network, no student: pass --solver {'|'.join(SOLVERS)}, or hsivi distill it"
        )
    if path is None and nfe is None:
        nfe = DEFAULT_NFE
    for flag, said in (("--shape", options.shape), ("--schedule", options.schedule)):
        if said:
            raise InputError(f"{flag} is for a teacher: a student knows its own, leave it out")
    student = load_student(select_student(path, nfe), device, options.network)
    check_label(label, student.classes)
    if compiled:
        student = dataclasses.replace(student, unet=CompiledNetwork(student.unet))
    if graph and not graphable(student):
        raise InputError("--graph wants a student that predicts the noise, without classes: leave it out")
    return student_sampler(dataclasses.replace(student, label=label), precision, kernels, graph)


def check_label(label: int | None, classes: int) -> None:
    """Raise InputError unless `label` is one of the network's classes, or None."""
    if label is not None and not label < classes:
        known = f"has classes 0 to {classes - 1}" if classes else "is not conditioned on classes: leave it out"
        raise InputError(f"--class {label}: the network {known}")


def student_sampler(
    student: Student, precision: Precision = "fp32", kernels: Kernels = "torch", graph: bool = False
) -> Sampler:
    """The sampler of a distilled student; the network computes in `precision`, the chain in float32."""
    description = {
        "kind": "student",
        "sha256": student.sha256,
        "teacher_sha256": student.description.get("teacher_sha256"),
        "nfe": student.nfe,
        "grid": list(student.grid),
        "eta": student.eta,
        "precision": precision,
        "quantisation": QUANTISATION,
    } | _labelled(student.classes, student.label)
    name = f"HSIVI student, NFE {student.nfe}"
    run: Callable[[PhiloxStreams], Tensor]
    if graph:
        run = GraphedSampler(student, precision, kernels)
    else:
        run = lambda noise: sample_student(student, noise, precision, kernels, pixels=True)  # noqa: E731
    return Sampler(name, student.nfe, student.shape, run, description, isinstance(student.unet, CompiledNetwork))


def solver_sampler(
    score_net: ScoreNet,
    solver: str,
    nfe: int,
    spacing: str | None = None,
    order: int | None = None,
    clip: bool = False,
    precision: Precision = "fp32",
    kernels: Kernels = "torch",
    label: int | None = None,
) -> Sampler:
    """A diffusers solver on a score network; spacing and order default to the best on the shipped teacher.

    `clip` keeps every predicted x_0 in [-1, 1]. Raises InputError for an unknown solver, spacing or order, and for an
    NFE the solver cannot meet exactly.
    """
    spacing = spacing or best_spacing(solver, nfe)
    order = resolve_order(solver, order)
    times = solver_times(solver, nfe, spacing, score_net.schedule)
    description = {
        "kind": "solver",
        "teacher_sha256": score_net.sha256,
        "solver": solver,
        "spacing": spacing,
        "order": order,
        "clip": clip,
        "nfe": nfe,
        # a thousand times say nothing that the spacing does not
        "times": list(times) if nfe <= 50 else None,
        "precision": precision,
        "quantisation": QUANTISATION,
    } | _labelled(score_net.classes, label)
    check_label(label, score_net.classes)
    device = next(score_net.unet.parameters()).device

    def run(noise: PhiloxStreams) -> Float[Tensor, "n c h w"]:
        labels = sample_labels(score_net.classes, noise.indices, label, device)

        def eps(x: Tensor, t: Tensor) -> Tensor:
            with autocast(precision, device):
                return score_net.eps(x, t, labels)

        draw = lambda: noise.draw(score_net.shape, device)  # noqa: E731
        with fused(score_net.unet, kernels):
            return solve(eps, score_net.schedule, solver, nfe, spacing, draw, order, clip)

    recipe = [spacing] + ([f"order {order}"] if order else []) + (["clipped"] if clip else [])
    name = f"{solver} ({', '.join(recipe)}), NFE {nfe}"
    return Sampler(name, nfe, score_net.shape, run, description, isinstance(score_net.unet, CompiledNetwork))


def _labelled(classes: int, label: int | None) -> dict[str, Any]:
    """What a description says of the classes drawn."""
    return {"class": f"j mod {classes}" if label is None else label} if classes else {}


def draw_images(
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[int], object] | None = None,
    first: int = 0,
) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """Images `first .. first + n - 1` of `seed`, in batches, uint8 and channels last; several processes take turns.

    Image j has its own noise stream, named by `seed` and `j`: the noise does not depend on `batch_size` or on where the
    range starts; rounding may move a pixel by one grey level. `on_batch(count)` is told after each batch. Raises
    InputError for a seed above 63 bits, RunError if an image is not finite.
    """
    if first + n > 2**63 or seed >= 2**63:
        flag = f"--seed {seed}" if seed >= 2**63 else f"-n {n}"
        raise InputError(f"{flag} is too large: choose a number below 2^63")

    def draw(indices: range) -> Tensor:
        return torch.from_numpy(to_uint8(_run(sampler, PhiloxStreams(seed, indices), indices.start)))

    for images in processes.in_turns(draw, n, batch_size, first):
        if on_batch is not None:
            on_batch(len(images))
        yield images.numpy()


def to_uint8(images: Float[Tensor, "n c h w"] | UInt8[Tensor, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
    """Quantise images in [-1, 1], clamped, by rounding to the nearest of 256 levels; those in uint8 are left so."""
    if images.dtype == torch.uint8:
        return images.contiguous().cpu().numpy()
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _run(sampler: Sampler, noise: PhiloxStreams, start: int) -> Tensor:
    with torch.inference_mode():
        images = sampler.run(noise)
    broken = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise RunError(
            f"{sampler.name}: image {start + broken[0]} has values that are not finite (the network diverged)"
        )
    return images

"""A distilled student on disk and in memory, and how to draw from it.

A student is a diffusers directory: `unet/` opens with plain `UNet2DModel.from_pretrained`; `log_gamma.safetensors`
holds the learned noise levels; `hsivi.json` holds the grid, eta, the schedule and where it all came from.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

import hsivi_cli
from hsivi_cli.bridges.schedule import NoiseSchedule, make_grid, schedule_from_config
from hsivi_cli.engine.optimisation import Precision, autocast
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import asset, atomic_directory, check_sums, read_json, write_json, write_sums
from hsivi_cli.io.run_directory import CONFIG, check_free, lock_run
from hsivi_cli.kernels.choice import Kernels, use_triton
from hsivi_cli.kernels.convert import fused
from hsivi_cli.networks.noise_prediction import PlainNetwork, class_count, predict_eps, sample_labels
from hsivi_cli.targets.network_files import WEIGHTS, image_shape, load_network, save_network
from hsivi_cli.transitions.gaussian_layer import LayerCoefficients, layer_coefficients, layer_mean, layer_std

FORMAT = 1
DESCRIPTION = "hsivi.json"
LOG_GAMMA = "log_gamma.safetensors"
TEACHER_FID = "teacher_fid"
PREVIEW_FID = "preview_fid"
_BEST = re.compile(r"nfe(\d+)-best")
# what a recorded FID of the teacher must say, and what kind of thing that is
TEACHER_FID_FIELDS: dict[str, type | tuple[type, ...]] = {
    "value": (int, float),
    "n": int,
    "solver": str,
    "nfe": int,
    "teacher_sha256": str,
    "reference_sha256": str,
    "extractor_sha256": str,
}


@dataclass(frozen=True)
class Student:
    """A few-step sampler: `unet` predicts the noise in each layer, `log_gamma` scales the layer's own noise.

    `log_gamma` is a scalar, a map `(C, H, W)` or a map a layer `(K, C, H, W)`. `description` is `hsivi.json`. A
    class-conditional student draws the class `label`; None: sample j is of class `j mod classes`.
    """

    unet: nn.Module
    log_gamma: Float[Tensor, "..."]
    grid: tuple[int, ...]
    eta: float
    schedule: NoiseSchedule
    description: dict[str, Any]
    path: Path | None = None
    sha256: str = ""
    label: int | None = None

    @property
    def classes(self) -> int:
        """How many classes the network is conditioned on; 0: none."""
        return class_count(self.unet)

    @property
    def nfe(self) -> int:
        """Network evaluations an image costs: the number of layers."""
        return len(self.grid) - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return image_shape(self.unet)

    @property
    def layers(self) -> LayerCoefficients:
        """Coefficients of the student's layers."""
        return layer_coefficients(self.grid, self.eta, self.schedule)


@torch.no_grad()
def sample_student(
    student: Student,
    noise: PhiloxStreams,
    precision: Precision = "fp32",
    kernels: Kernels = "torch",
    pixels: bool = False,
) -> Float[Tensor, "n c h w"] | UInt8[Tensor, "n h w c"]:
    """Walk the chain from `x_K ~ N(0, I)` to images in about [-1, 1]; the last layer adds no noise.

    `kernels` other than "torch" swaps fused modules into the network for as long as this takes; where Triton can run,
    the layers are fused too, noise included, and with `pixels` the last one quantises. The images are the same up to
    rounding.
    """
    first = next(student.unet.parameters())
    device = first.device

    labels = sample_labels(student.classes, noise.indices, student.label, device)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        with autocast(precision, device):
            return predict_eps(student.unet, x, t, student.schedule, labels)

    log_gamma = student.log_gamma.to(device)
    with fused(student.unet, kernels):
        if use_triton(kernels, first):
            return walk_fused(eps, log_gamma, student.layers, student.shape, noise, kernels, pixels)
        return walk_chain(eps, log_gamma, student.layers, lambda: noise.draw(student.shape, device))


def walk_fused(
    student_eps: Callable[[Tensor, Tensor], Tensor],
    log_gamma: Float[Tensor, "..."],
    layers: LayerCoefficients,
    shape: tuple[int, ...],
    noise: PhiloxStreams,
    kernels: Kernels = "auto",
    pixels: bool = False,
) -> Float[Tensor, " n *shape"] | UInt8[Tensor, "n h w c"]:
    """As `walk_chain`, each layer in one pass that draws its own noise.

    With `pixels` the last one writes the pictures, unless something is not finite: then it leaves what that came to.
    """
    from hsivi_cli.kernels.hsivi_step import final_step, hsivi_step

    x = noise.draw(shape, log_gamma.device, kernels)
    for layer in range(layers.nfe, 0, -1):
        eps = student_eps(x, layers.times[layer])
        a, b, c1 = (float(v[layer]) for v in (layers.A, layers.B, layers.c1))
        if layer == 1:
            if pixels and bool((x + eps).isfinite().all()):
                return final_step(x, eps, a, b, kernels)
            return hsivi_step(x, eps, a, b, kernels=kernels)
        gamma = log_gamma[layer - 1] if log_gamma.ndim == x.ndim else log_gamma
        x = hsivi_step(x, eps, a, b, c1, gamma, noise.streams, noise.take(), kernels)
    return x


def walk_chain(
    student_eps: Callable[[Tensor, Tensor], Tensor],
    log_gamma: Float[Tensor, "..."],
    layers: LayerCoefficients,
    draw: Callable[[], Float[Tensor, " n *shape"]],
    visit: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Float[Tensor, " n *shape"]:
    """Sample every layer from `x_K = draw()` down to `x_0`, without noise in the last.

    `visit(k, x_k, eps_k)` sees each layer's input and the student's prediction there.
    """
    x = draw()
    for layer in range(layers.nfe, 0, -1):
        k = torch.full((len(x),), layer)
        eps = student_eps(x, layers.times[layer].to(x.device))
        if visit is not None:
            visit(layer, x, eps)
        x = layer_mean(x, eps, k, layers)
        if layer > 1:
            x = x + layer_std(log_gamma, k, layers, x) * draw()
    return x


def save_student(student: Student, path: Path) -> None:
    """Write a student directory, replacing an older one whole; a crash leaves one of the two."""
    from safetensors.torch import save_file

    with atomic_directory(path, overwrite=True) as directory:
        save_network(student.unet, directory / "unet")
        save_file({"log_gamma": student.log_gamma.detach().cpu().contiguous()}, directory / LOG_GAMMA)
        fields = chain_fields(student.grid, student.eta, student.schedule) | student.description
        write_json(directory / DESCRIPTION, fields | {"chain_sha256": chain_sha256(fields)})
        write_sums(directory, leave_out=(DESCRIPTION,))
        save_pipeline_files(student, directory)  # after the sums: no part of a student, and not missed


def chain_fields(grid: Sequence[int], eta: float, schedule: NoiseSchedule) -> dict[str, Any]:
    """What a student's description says of its chain."""
    fields = {"format": FORMAT, "nfe": len(grid) - 1, "grid": list(grid), "eta": eta}
    return fields | {"schedule": schedule.config, "hsivi_version": hsivi_cli.__version__}


def save_pipeline_files(student: Student, directory: Path) -> None:
    """Write model_index.json and scheduler/, by which diffusers opens a student; we read neither ourselves.

    A network of the user's own gets the scheduler only: diffusers cannot build it.
    """
    from hsivi_cli.methods.pipeline import HSIVIPipeline

    pipeline = HSIVIPipeline.from_student(student)
    pipeline.scheduler.save_pretrained(directory / "scheduler")
    if not isinstance(student.unet, PlainNetwork):
        pipeline.save_config(directory)


def load_student(path: Path, device: str = "cpu", network: str | None = None) -> Student:
    """Load a student directory, or a file of `hsivi export`; raises InputError naming the file at fault.

    `network` is the `FILE:FUNCTION` of a user's own network, which is run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_file():
        from hsivi_cli.methods.student_file import unpacked

        with unpacked(path) as directory:
            student = load_student(directory, device, network)
            return replace(student, path=path, log_gamma=student.log_gamma.clone())  # not mapped from what goes now
    fields = read_json(path / DESCRIPTION)
    if fields.get("format") != FORMAT:
        raise InputError(f"{path / DESCRIPTION}: format {fields.get('format')!r} is not {FORMAT}: upgrade hsivi")
    try:
        schedule = schedule_from_config(fields["schedule"], where=str(path / DESCRIPTION))
        grid = make_grid([int(t) for t in fields["grid"]], int(fields["nfe"]), schedule)
        eta = float(fields["eta"])
        if not 0 <= eta <= 1:
            raise InputError(f"{path / DESCRIPTION}: eta {eta} is not between 0 and 1")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise InputError(f"{path / DESCRIPTION} is not a student's description: {err!r}") from err
    if fields.get("chain_sha256", chain_sha256(fields)) != chain_sha256(fields):
        raise InputError(f"{path / DESCRIPTION} is damaged: nfe, grid, eta or schedule do not match its chain_sha256")
    check_sums(path)
    unet = load_network(path / "unet", network).to(device).eval().requires_grad_(False)
    try:
        log_gamma = load_file(path / LOG_GAMMA)["log_gamma"]
    except (SafetensorError, OSError, KeyError, ValueError) as err:
        raise InputError(f"{path / LOG_GAMMA} is missing or damaged ({err})") from err
    shape = image_shape(unet)
    if tuple(log_gamma.shape) not in ((), shape, (len(grid) - 1, *shape)) or not bool(log_gamma.isfinite().all()):
        raise InputError(
            f"{path / LOG_GAMMA}: shape {tuple(log_gamma.shape)} does not fit images of {shape}, or not finite"
        )
    return Student(unet, log_gamma.float().to(device), grid, eta, schedule, fields, path, student_sha256(path))


def chain_sha256(fields: dict[str, Any]) -> str:
    """Hash of what a student's description computes with; the rest of it (paths, recipe, FIDs) may be written to."""
    chain = {name: fields[name] for name in ("format", "nfe", "grid", "eta", "schedule")}
    return hashlib.sha256(json.dumps(chain, sort_keys=True).encode()).hexdigest()


def student_sha256(path: Path) -> str:
    """Hash of everything a student computes with, and of nothing else: weights, noise levels, architecture and chain.

    Where it came from and what was measured on it (paths, recipe, FIDs) is not part of it.
    """
    fields = read_json(path / DESCRIPTION)
    architecture = {k: v for k, v in read_json(path / "unet" / "config.json").items() if not k.startswith("_")}
    schedule = schedule_from_config(fields["schedule"], where=str(path / DESCRIPTION)).config
    chain = [fields["nfe"], fields["grid"], fields["eta"], schedule]
    digest = hashlib.sha256(json.dumps([chain, architecture], sort_keys=True).encode())
    for name in (f"unet/{WEIGHTS}", LOG_GAMMA):
        digest.update((path / name).read_bytes())
    return digest.hexdigest()


def check_recordable(student: Path, teacher_sha256: str) -> None:
    """Raise InputError unless `student` is a student of this teacher that may be written to now."""
    theirs = read_json(student / DESCRIPTION).get("teacher_sha256")
    if theirs != teacher_sha256:
        raise InputError(f"{student} is a student of another teacher ({theirs} in its {DESCRIPTION}): name its own")
    check_free(student.parent)


def record_teacher_fid(student: Path, fields: dict[str, Any]) -> None:
    """Write the teacher's own FID into a student's description, as the figure to compare the student's own with.

    `fields` is plain JSON with at least TEACHER_FID_FIELDS; `hsivi evaluate` shows it beside the student's FID where
    `n` and both hashes of the protocol agree, so all of them must be those of the images that were measured. Whoever
    calls this vouches for what the fields say about the images. Raises InputError for fields that are missing or
    wrong, for a student of another teacher, and for a run that another process is writing.
    """
    for name, kind in TEACHER_FID_FIELDS.items():
        if not isinstance(fields.get(name), kind) or isinstance(fields[name], bool):
            raise InputError(f"the teacher's FID cannot be recorded: {name} is {fields.get(name)!r}")
    if not (math.isfinite(fields["value"]) and fields["value"] >= 0):
        raise InputError(f"the teacher's FID cannot be recorded: {fields['value']} is no distance")
    check_recordable(student, fields["teacher_sha256"])
    in_run = (student.parent / CONFIG).is_file()
    with lock_run(student.parent) if in_run else contextlib.nullcontext():
        write_json(student / DESCRIPTION, read_json(student / DESCRIPTION) | {TEACHER_FID: fields})


def is_student_file(path: Path) -> bool:
    """Whether `path` is a safetensors file that `hsivi export` wrote; False for a damaged one."""
    from safetensors import SafetensorError, safe_open

    from hsivi_cli.methods.student_file import KEY

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as header:
            return KEY in (header.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False


def description_of(path: Path) -> dict[str, Any]:
    """The description of a student directory or file, unchecked but for its NFE."""
    if path.is_file():
        from hsivi_cli.methods.student_file import read_contents

        fields = read_contents(path)["description"]
    else:
        fields = read_json(path / DESCRIPTION)
    if not isinstance(fields.get("nfe"), int):
        where = path if path.is_file() else path / DESCRIPTION
        raise InputError(f"{where}: nfe {fields.get('nfe')!r} is not a whole number")
    return fields


def find_students(path: Path) -> dict[int, Path]:
    """Students in a run directory, by NFE; a student directory or file is its own only student.

    The best of a run by FID has the NFE of its last: it is asked for by its own path.
    """
    if is_student_file(path):
        return {description_of(path)["nfe"]: path}
    own = path / DESCRIPTION
    found = sorted(path.glob(f"*/{DESCRIPTION}"))
    # a dot begins the temporaries that a killed process leaves behind
    hidden = [file for file in found if file.parent.name.startswith(".") or _BEST.fullmatch(file.parent.name)]
    candidates = [own] if own.is_file() else [file for file in found if file not in hidden]
    students: dict[int, Path] = {}
    for file in candidates:
        nfe = description_of(file.parent)["nfe"]
        if nfe in students:
            raise InputError(f"{students[nfe]} and {file.parent} are both students for NFE {nfe}: name one of them")
        students[nfe] = file.parent
    return dict(sorted(students.items()))


def best_directory(run: Path, nfe: int) -> Path:
    """Where a run keeps the student of this NFE that had the lowest FID at a preview."""
    return run / f"nfe{nfe}-best"


def find_best(path: Path) -> dict[int, Path]:
    """The best students by FID in a run directory, by NFE."""
    matches = [(_BEST.fullmatch(file.parent.name), file.parent) for file in path.glob(f"*/{DESCRIPTION}")]
    return dict(sorted((int(match[1]), folder) for match, folder in matches if match))


def select_student(path: Path | None, nfe: int | None) -> Path:
    """The student directory for `nfe` in a run or student directory, or a student file; None is the shipped run.

    Raises InputError, naming the NFE that exist, if there is no such student.
    """
    root = asset("mnist") if path is None else Path(path)
    if not root.exists():
        raise InputError(f"{root} does not exist: name a run of hsivi distill, or leave it out for the shipped student")
    students = {description_of(root)["nfe"]: root} if root.is_file() else find_students(root)
    if not students:
        raise InputError(f"{root} holds no student: name a run of hsivi distill, or sample a teacher with --solver")
    there = ", ".join(str(k) for k in students)
    if nfe is None and len(students) > 1:
        raise InputError(f"{root} holds students for NFE {there}: choose one with --nfe")
    if nfe is None:
        return next(iter(students.values()))
    if nfe not in students:
        raise InputError(f"--nfe {nfe}: {root} holds students for NFE {there} only: choose one, or distil another")
    return students[nfe]


def chain_states(
    student_eps: Callable[[Tensor, Tensor], Tensor],
    log_gamma: Float[Tensor, "..."],
    layers: LayerCoefficients,
    draw: Callable[[], Float[Tensor, " n *shape"]],
) -> tuple[Float[Tensor, " kn *shape"], Float[Tensor, " kn *shape"], Int[Tensor, " kn"]]:
    """Every layer's input, the student's prediction there and the layer's number, for one rollout of n chains."""
    inputs: list[Tensor] = []
    predictions: list[Tensor] = []
    numbers: list[Tensor] = []

    def visit(layer: int, x: Tensor, eps: Tensor) -> None:
        inputs.append(x)
        predictions.append(eps)
        numbers.append(torch.full((len(x),), layer))

    walk_chain(student_eps, log_gamma, layers, draw, visit)
    return torch.cat(inputs), torch.cat(predictions), torch.cat(numbers)

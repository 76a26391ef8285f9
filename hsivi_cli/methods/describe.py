"""What a path holds (score network, student, run, tensors, statistics), read without running anything."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hsivi_cli.errors import InputError
from hsivi_cli.io.exported import OPENED_BY, SavedProgram, saved_program
from hsivi_cli.io.files import read_json, sha256
from hsivi_cli.io.metrics_log import read_metrics
from hsivi_cli.io.run_directory import CONFIG, METRICS, REPORT, checkpoints, is_posterior_fit
from hsivi_cli.methods.student import (
    DESCRIPTION,
    PREVIEW_FID,
    find_best,
    find_students,
    load_student,
    student_sha256,
)
from hsivi_cli.methods.student_file import KEY, unpacked
from hsivi_cli.networks.noise_prediction import PLAIN
from hsivi_cli.targets.checkpoints.read import PICKLED, read_tensors
from hsivi_cli.targets.checkpoints.registry import recognise
from hsivi_cli.targets.network_files import WEIGHTS
from hsivi_cli.targets.score_net import SCHEDULER_PLACES, load_score_net

KINDS = "a score network, a student, a run, a posterior fit, a .safetensors, .pt or .pt2 file, or an .npz of statistics"
METADATA = 400  # characters of a metadata field that are still worth showing
_ARCHITECTURE = ("sample_size", "in_channels", "block_out_channels", "layers_per_block", "down_block_types")


def describe(path: Path) -> dict[str, Any]:
    """Plain JSON facts about `path`, with `kind` first; raises InputError if it is nothing we know, or is damaged."""
    if not path.exists():
        raise InputError(f"{path} does not exist: name {KINDS}")
    if path.suffix == ".safetensors":
        facts = describe_safetensors(path)
        return describe_student_file(path) if KEY in facts["metadata"] else facts
    program = saved_program(path)
    if program is not None:
        return describe_program(path, program)
    if path.suffix in PICKLED:
        return describe_pickled(path)
    if path.suffix == ".npz":
        return describe_arrays(path)
    if (path / DESCRIPTION).is_file():
        return describe_student(path)
    if is_posterior_fit(path):
        return describe_fit(path)
    if any((path / place).is_file() for place in SCHEDULER_PLACES):
        facts = {"kind": "teacher", "path": str(path)} | _teacher(path)
        # trained by hsivi, it lies in its own run directory
        return facts | (_training(path) if _is_run(path) else {})
    if (path / CONFIG).is_file() and not _is_run(path):
        raise InputError(f"{path} is a network without its noise schedule: name the directory that holds it")
    if path.is_dir() and (_is_run(path) or find_students(path)):
        return describe_run(path)
    raise InputError(f"{path} is not known: name {KINDS}")


def describe_fit(path: Path) -> dict[str, Any]:
    """Facts about a run of `hsivi fit-posterior`: its options and source, and its report once it is finished."""
    facts: dict[str, Any] = {"kind": "posterior fit", "path": str(path), "config": read_json(path / CONFIG)}
    finished = (path / REPORT).is_file()
    report = read_json(path / REPORT) if finished else None
    if report is not None and isinstance(report.get("observations"), list):
        report["observations"] = len(report["observations"])  # each is in the file
    facts |= {"finished": finished, "report": report}
    # the default method trains nothing
    return facts | ({"training": _progress(path)} if (path / METRICS).is_file() else {})


def describe_student(path: Path) -> dict[str, Any]:
    """Facts about a student directory: its chain, its noise levels, its network and where it came from."""
    network = read_json(path / "unet" / CONFIG)
    if network.get("_class_name") == PLAIN:  # a user's own, which only running their file could build
        weights = describe_safetensors(path / "unet" / WEIGHTS)
        facts = {"kind": "student", "path": str(path), "sha256": student_sha256(path)} | read_json(path / DESCRIPTION)
        said = {key: network.get(key) for key in ("network", "network_sha256", "in_channels", "sample_size")}
        return facts | said | {"parameters": weights["parameters"]}
    student = load_student(path)
    own = {"format", "nfe", "grid", "eta", "schedule", "chain_sha256"}
    facts = {"kind": "student", "path": str(path), "sha256": student.sha256, "nfe": student.nfe}
    facts |= {"grid": list(student.grid), "eta": student.eta}
    facts["log_gamma"] = {
        "shape": list(student.log_gamma.shape),
        "min": float(student.log_gamma.min()),
        "max": float(student.log_gamma.max()),
    }
    facts |= {"schedule": student.schedule.config} | _network(student.unet)
    return facts | {key: value for key, value in student.description.items() if key not in own}


def describe_student_file(path: Path) -> dict[str, Any]:
    """Facts about a file of `hsivi export --format safetensors`, as about the directory it was made from."""
    with unpacked(path) as directory:
        return describe_student(directory) | {"path": str(path)}


def describe_run(path: Path) -> dict[str, Any]:
    """Facts about a run directory: its students, the best by FID, and configuration and progress of each training."""
    facts: dict[str, Any] = {"kind": "run", "path": str(path)}
    facts["students"] = {str(nfe): str(where) for nfe, where in find_students(path).items()}
    best = {str(nfe): {"path": str(where)} | _fid(where) for nfe, where in find_best(path).items()}
    return facts | ({"best": best} if best else {}) | _training(path)


def describe_safetensors(path: Path) -> dict[str, Any]:
    """Facts about a safetensors file from its header alone; raises InputError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            tensors = {name: {"dtype": view.get_dtype(), "shape": view.get_shape()} for name, view in views.items()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as err:
        raise InputError(f"{path} is damaged or no safetensors file ({err})") from err
    facts = {"kind": "safetensors", "path": str(path), "sha256": sha256(path), "bytes": path.stat().st_size}
    elements = sum(int(np.prod(tensor["shape"])) for tensor in tensors.values())
    # a checkpoint's metadata is the tree of all that is in it: only its size is of interest here
    metadata = {key: text if len(text) <= METADATA else f"{len(text)} characters" for key, text in metadata.items()}
    return facts | {"parameters": elements, "metadata": metadata, "tensors": tensors}


def describe_program(path: Path, program: SavedProgram) -> dict[str, Any]:
    """Facts about a TorchScript or torch.export file: how it is opened and, if `hsivi export` wrote it, of what."""
    fields = program.description
    facts = {"kind": "program" if fields is None else "exported sampler", "path": str(path), "format": program.format}
    facts |= {"opened_by": f"{OPENED_BY[program.format]}, which runs it"}
    facts |= {} if fields is None else {"see": "assets/docs/students.md"}
    own = {"format", "kind", "path", "sha256", "bytes", "opened_by", "see"}
    described = {key: value for key, value in (fields or {}).items() if key not in own}
    return facts | {"sha256": sha256(path), "bytes": path.stat().st_size} | described


def describe_pickled(path: Path) -> dict[str, Any]:
    """Facts about a `.pt` file, read with `weights_only=True`: its layout, if it is one we know, and its tensors."""
    found = read_tensors(path)
    try:
        layout: str | None = recognise(found.tensors, path)[0]
    except InputError:
        layout = None
    tensors = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in found.tensors.items()
    }
    facts = {"kind": "weights", "path": str(path), "sha256": sha256(path), "layout": layout, "notes": list(found.notes)}
    return facts | {"parameters": sum(t.numel() for t in found.tensors.values()), "tensors": tensors}


def describe_arrays(path: Path) -> dict[str, Any]:
    """Facts about an `.npz`: keys, types and shapes, from the headers alone; raises InputError if it is damaged."""
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    version = np.lib.format.read_magic(file)
                    wide = version != (1, 0)
                    read = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
                    shape, _, dtype = read(file)
                arrays[name.removesuffix(".npy")] = {"dtype": str(dtype), "shape": list(shape)}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as err:
        raise InputError(f"{path} is damaged or no .npz file ({err})") from err
    return {"kind": "arrays", "path": str(path), "sha256": sha256(path), "arrays": arrays}


def _is_run(path: Path) -> bool:
    """Whether hsivi trained here; a diffusers `unet/` has a config.json too, which names its class."""
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {"_class_name": None}
    return "_class_name" not in config or (path / METRICS).is_file() or (path / "training").is_dir()


def _training(path: Path) -> dict[str, Any]:
    """The configuration and progress of a run: of the only training in `path`, or of each in `path/training`."""
    own = _progress(path)
    folders = sorted(path.glob("training/*"), key=lambda folder: (len(folder.name), folder.name))
    # a dot begins the temporaries that a killed process leaves behind
    each = {folder.name: _progress(folder) for folder in folders if folder.is_dir() and folder.name[0] != "."}
    facts: dict[str, Any] = {"training": each or own}
    return facts | ({"config": read_json(path / CONFIG)} if (path / CONFIG).is_file() else {})


def _progress(folder: Path) -> dict[str, Any]:
    """How far one training got: the step and the line it logged last, its checkpoints, and the newest one's bytes."""
    metrics = read_metrics(folder / METRICS)
    latest = metrics[-1] if metrics else None
    kept = checkpoints(folder)
    size = kept[0].stat().st_size if kept else None
    facts = {"step": latest and latest.get("step"), "latest_metrics": latest, "checkpoint_bytes": size}
    return facts | {"checkpoints": [path.name for path in kept]}


def _fid(student: Path) -> dict[str, Any]:
    fields = read_json(student / DESCRIPTION)
    measured = fields.get(PREVIEW_FID)
    measured = measured if isinstance(measured, dict) else {}
    return {"step": fields.get("step"), "fid": measured.get("value"), "images": measured.get("n")}


def _teacher(path: Path) -> dict[str, Any]:
    score_net = load_score_net(path)
    return {"sha256": score_net.sha256, "schedule": score_net.schedule.config} | _network(score_net.unet)


def _network(unet: Any) -> dict[str, Any]:
    architecture = {key: unet.config[key] for key in _ARCHITECTURE if key in unet.config}
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return {"network": type(unet).__name__, "parameters": parameters} | architecture

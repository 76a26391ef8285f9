"""`hsivi evaluate`: FID, KID, inception score, precision and recall of images, or of what a model draws."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsivi_cli.cli import configuration, console, options
from hsivi_cli.engine import processes
from hsivi_cli.errors import GateError, InputError

if TYPE_CHECKING:
    from hsivi_cli.evaluation.extractors import Extractor
    from hsivi_cli.evaluation.metrics import Features, Statistics
    from hsivi_cli.evaluation.report import EvaluationReport
    from hsivi_cli.io.images import ImageSet
    from hsivi_cli.methods.sampling import Sampler

DEFAULT_DRAWS = 5_000
INCEPTION_COLUMNS, DIGITS_COLUMNS = 2048 + 1008, 64 + 10  # features and logits of an image


def evaluate(
    samples: Annotated[
        str,
        typer.Argument(
            help="Image folder, .npy, .npz or idx file, '-' for .npy on stdin, a run or student directory, "
            "a teacher directory (with --solver and --nfe), or 'shipped' for the shipped student."
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="Image folder, array or idx file, an .npz of mu and sigma, or 'digits': MNIST statistics for "
            "28x28 samples, scikit-learn's digits for 8x8.",
        ),
    ],
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="inception, digits, or a TorchScript FILE (uint8 NCHW in, features or (features, logits) out; "
            "loading it runs its code, so trust it first). Default: digits for grey up to 28x28, else inception.",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="torch-fidelity's Inception file; or set HSIVI_INCEPTION_WEIGHTS.")
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples", "-n", min=2, help="Images to draw from a model (5000), or from a set, at random (all)."
        ),
    ] = None,
    nfe: Annotated[
        int | None, typer.Option("--nfe", min=1, help="Which student, or how many solver evaluations (10).")
    ] = None,
    label: options.Label = None,
    solver: options.Solver = None,
    spacing: options.Spacing = None,
    order: options.Order = None,
    clip: options.Clip = False,
    network: options.Network = None,
    shape: options.Shape = None,
    schedule: options.Schedule = None,
    beta_start: options.BetaStart = None,
    beta_end: options.BetaEnd = None,
    timesteps: options.Timesteps = None,
    prediction: options.Prediction = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 256,
    precision: options.SamplingPrecision = "fp32",
    kernels: options.Kernels = "auto",
    compiled: options.Compile = False,
    graph: options.Graph = False,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    max_fid: Annotated[
        float | None, typer.Option("--max-fid", min=0.0, help="Leave with exit code 3 above this FID.")
    ] = None,
    record: Annotated[
        list[Path] | None,
        typer.Option(
            "--record",
            help="Write the FID of a teacher, drawn here with --solver, into this student, or into the students of "
            "this run, to be shown beside theirs. Repeat it for more.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Measure images against a reference: FID, KID, inception score, precision and recall, with the protocol stated."""
    from hsivi_cli.cli.drawing import draw_all
    from hsivi_cli.evaluation.metrics import extract_features
    from hsivi_cli.evaluation.reference import default_features, open_reference
    from hsivi_cli.evaluation.report import evaluation_report
    from hsivi_cli.io.capacity import check_memory
    from hsivi_cli.io.images import ImageSet, image_set

    if max_fid is not None and math.isnan(max_fid):  # older Typers let it pass `min`
        raise InputError("--max-fid nan would let everything pass: name a number")
    device = options.image_device(device, threads)
    solving: dict[str, Any] = {"solver": solver, "spacing": spacing, "order": order, "clip": clip}
    solving["precision"] = options.check_precision(precision, device)
    solving["kernels"] = kernels
    solving |= {
        "label": label,
        "compiled": compiled,
        "graph": graph,
        "options": options.network_options(network, shape, schedule, beta_start, beta_end, timesteps, prediction),
    }
    source, drawn = _open_samples(samples, nfe, solving, device, num_samples)
    students = _recordable(record, drawn)
    height, width, channels = source.shape if isinstance(source, ImageSet) else (*source.shape[1:], source.shape[0])
    choice = features or default_features((height, width, channels))
    # extractor and reference come first: what is wrong with them is known before minutes of drawing
    with console.guarded_stdout():  # of a user's own file
        extractor = _load_extractor(choice, weights, device, defaulted=features is None)
    known = open_reference(reference, extractor, (height, width, channels))
    if isinstance(source, ImageSet) and num_samples is not None and len(source) < num_samples:
        console.warn(f"-n {num_samples}: {samples} holds {len(source)} images only, all of them are used")
    if not isinstance(source, ImageSet):
        count = num_samples or DEFAULT_DRAWS
        # beside the images, their features and logits are kept, in float32
        row = height * width * channels + 4 * (INCEPTION_COLUMNS if extractor.name == "inception" else DIGITS_COLUMNS)
        check_memory(f"-n {count}", count * row * processes.on_this_machine())
        drawn |= {"n": count, "seed": seed}
        console.story(f"drawing {count} images with {source.name}, seed {seed}")
        source = image_set(draw_all("drawing", source, count, seed, batch_size), samples)
    with console.guarded_stdout(), console.progress("features of the samples", len(source)) as advance:
        found = extract_features(source, extractor, batch_size, device, advance)
    if isinstance(known, ImageSet):
        with console.guarded_stdout(), console.progress("features of the reference", len(known)) as advance:
            target: Features | Statistics = extract_features(known, extractor, batch_size, device, advance)
    else:
        target = known
    theirs = _comparable(drawn.pop("teacher_fid", None), found.n, target, extractor)
    drawn |= {"teacher_fid": theirs} if theirs else {}
    report = processes.from_main(lambda: evaluation_report(found, target, extractor, drawn))
    report = _beside_teacher(report, theirs)
    for warning in report.warnings:
        console.warn(warning)
    _print(report, as_json)
    if processes.is_main():
        _record(report, students)
    _gate(report, max_fid)


def _open_samples(
    samples: str, nfe: int | None, solving: dict[str, Any], device: str, limit: int | None
) -> tuple["ImageSet | Sampler", dict[str, Any]]:
    """Images, or a sampler with what the protocol says about it."""
    import sys

    from hsivi_cli.engine.run_view import refuse_unfinished
    from hsivi_cli.io.exported import refuse_program
    from hsivi_cli.io.images import SUBSET_SEED, read_image_stream, read_images
    from hsivi_cli.methods.sampling import open_sampler
    from hsivi_cli.methods.student import description_of, find_students, is_student_file, select_student
    from hsivi_cli.methods.student_file import OF_STUDENT

    solver = solving["solver"]
    path = None if samples == "shipped" else Path(samples)
    directory = path is not None and path.is_dir() and ((path / "unet").is_dir() or find_students(path))
    if path is None or solver or directory or is_student_file(path):
        solving = solving | {"kernels": options.resolve_kernels(solving["kernels"], device, solving["compiled"])}
        with console.guarded_stdout():  # of a user's own file
            sampler = open_sampler(path, nfe, device=device, **solving)
        drawn = {"sampler": sampler.name, "nfe": sampler.nfe, "model": sampler.description}
        drawn["quantisation"] = sampler.description["quantisation"]
        if solver is None:
            drawn["teacher_fid"] = description_of(select_student(path, sampler.nfe)).get("teacher_fid")
        return sampler, drawn
    refuse_program(path, OF_STUDENT)
    refuse_unfinished(path, nfe)
    about = solving["options"]
    given = {"nfe": nfe, "network": about.network, "shape": about.shape, "schedule": about.schedule or None}
    given |= {name: solving[name] for name in ("spacing", "order", "clip", "precision")}
    given |= {"class": solving["label"], "compile": solving["compiled"], "graph": solving["graph"]}
    given["kernels"] = None if solving["kernels"] == "auto" else solving["kernels"]
    for name, value in given.items():
        if value not in (None, False, "fp32"):
            raise InputError(
                f"--{name} is for models, and {samples} is no model's directory: leave it out, or name one"
            )
    if samples == "-" and processes.count() > 1:
        raise InputError("'-' reads images from stdin, which several processes cannot share: name a file")
    if samples == "-" and sys.stdin is None:
        raise InputError("'-' reads images from stdin, which is closed: pipe them in, or name a file")
    images = read_image_stream(sys.stdin.buffer, limit) if samples == "-" else read_images(samples, limit)
    if images.subset_of is None:
        return images, {}
    return images, {"subset": f"{len(images)} of {images.subset_of}, at random, seed {SUBSET_SEED}"}


def _comparable(
    fields: Any, n: int, reference: "Features | Statistics", extractor: "Extractor"
) -> dict[str, Any] | None:
    """The teacher's own FID from a student's description, where it was measured as this evaluation measures."""
    here = {"n": n, "reference_sha256": reference.sha256, "extractor_sha256": extractor.sha256}
    same = isinstance(fields, dict) and all(fields.get(name) == value for name, value in here.items())
    return fields if same else None


def _load_extractor(choice: str, weights: Path | None, device: str, defaulted: bool) -> "Extractor":
    from hsivi_cli.evaluation.extractors import load_extractor

    extractor = load_extractor(choice, weights, device)
    if defaulted:
        console.story(f"features: {choice} (choose with --features)")
    return extractor


def _beside_teacher(report: "EvaluationReport", theirs: dict[str, Any] | None) -> "EvaluationReport":
    """The report with a line that divides the FID by the teacher's own, where that is known."""
    from dataclasses import replace

    from hsivi_cli.evaluation.metrics import Estimate

    if theirs is None or report.fid.value is None or not theirs["value"] > 0:
        return report
    note = f"the teacher's own, {theirs['value']:.5g}, by {theirs.get('solver')} at NFE {theirs.get('nfe')}"
    ratio = Estimate("fid_over_teacher", report.fid.value / theirs["value"], report.fid.n, note)
    return replace(report, metrics=(*report.metrics, ratio))


def _recordable(record: list[Path] | None, drawn: dict[str, Any]) -> list[Path]:
    """The students that --record names; InputError, before anything is drawn, if they cannot take the figure."""
    from hsivi_cli.io.files import asset
    from hsivi_cli.methods.student import check_recordable, find_students

    if not record:
        return []
    model = drawn.get("model", {})
    if model.get("kind") != "solver":
        raise InputError("--record writes what a teacher drew here: name its directory, --solver and --nfe")
    students: list[Path] = []
    for path in record:
        root = asset("mnist") if path == Path("shipped") else path
        here = list(find_students(root).values())
        if not here:
            raise InputError(f"--record {path} is no student and no run that holds one")
        students += here
    for student in students:
        check_recordable(student, model["teacher_sha256"])
    return students


def _record(report: "EvaluationReport", students: list[Path]) -> None:
    from hsivi_cli.methods.student import record_teacher_fid

    if not students:
        return
    protocol = report.protocol
    samples, model = protocol["samples"], protocol["samples"]["model"]
    fields = {
        "value": report.fid.value,
        "n": report.fid.n,
        "seed": samples["seed"],
        "samples_sha256": samples["sha256"],
    }
    kept = ("solver", "nfe", "spacing", "order", "clip", "precision", "quantisation", "teacher_sha256")
    fields |= {name: model[name] for name in kept}
    fields |= {"reference_sha256": protocol["reference"]["sha256"]}
    fields |= {"extractor_sha256": protocol["features"]["weights_sha256"], "versions": protocol["versions"]}
    for student in students:
        record_teacher_fid(student, fields)
        console.story(f"recorded as the teacher's FID in {student}")


def _print(report: "EvaluationReport", as_json: bool) -> None:
    if as_json:
        console.result_json(report.to_json())
        return
    rows: list[tuple[str, ...]] = []
    for metric in report.metrics:
        rows.append((metric.key, "-" if metric.value is None else f"{metric.value:.5g}", metric.note))
    console.result_table("Metrics", rows, ("metric", "value", "how"))
    console.result_table("Protocol", _flat(report.protocol))


def _flat(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, ...]]:
    """Nested JSON as rows `a.b`, value."""
    rows: list[tuple[str, ...]] = []
    for name, value in fields.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


def _gate(report: "EvaluationReport", max_fid: float | None) -> None:
    fid = report.fid
    if max_fid is not None and (fid.value is None or not fid.value <= max_fid):
        raise GateError(f"{fid.key} = {fid.value} is above --max-fid {max_fid:g}")

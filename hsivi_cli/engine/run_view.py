"""What a run directory says of its trainings, also while they are written: it is read only, and never locked."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsivi_cli.engine.diagnosis import HISTORY, averages, diagnose
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import read_json
from hsivi_cli.io.metrics_log import is_number, read_metrics
from hsivi_cli.io.run_directory import CONFIG, LOCK, METRICS, REPORT

Curve = list[tuple[int, float]]
STUDENT = "hsivi.json"  # what a student's directory has
FIRST = ("mismatch", "critic_error", "loss", "elbo")  # what a run is judged by; an FID comes next, then the rest
_OF_THE_LOG = ("step", "seconds_per_step", "fisher", "critic_gap")


@dataclass(frozen=True)
class TrainingView:
    """One training: `step` of `steps` (None: not known), its pace, when it last wrote (seconds since 1970), its curves.

    `advice` is the critic's, in words, of a distillation.
    """

    name: str
    step: int
    steps: int | None
    seconds_per_step: float | None
    written: float | None
    curves: dict[str, Curve]
    advice: str | None

    @property
    def finished(self) -> bool:
        """Whether its last step is logged."""
        return self.steps is not None and self.step >= self.steps

    @property
    def seconds_left(self) -> float | None:
        """At its pace since it was last started; None where that is not known."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return (self.steps - self.step) * self.seconds_per_step


@dataclass(frozen=True)
class RunView:
    """A run: its trainings in their order, the process that writes it (None: none), and whether it is finished."""

    path: Path
    trainings: tuple[TrainingView, ...]
    process: int | None
    finished: bool


def refuse_unfinished(path: Path, nfe: int | None = None) -> None:
    """Raise InputError, with how to go on, if `path` is a run of `train` or `distill` that wrote no network yet.

    With `nfe`: a distillation that was to write that student and has not yet.
    """
    if not (path / CONFIG).is_file() or any((path / name).exists() for name in ("unet", STUDENT)):
        return
    config = read_json(path / CONFIG)
    if isinstance(config.get("grids"), dict):
        done = [k for k in config["grids"] if (path / f"nfe{k}" / STUDENT).is_file()]
        if (done and nfe is None) or str(nfe) in done or (nfe is not None and str(nfe) not in config["grids"]):
            return
        command, what = "distill", "student" + (f" for NFE {nfe}" if done else "")
    elif config.get("method") == "ddpm":
        command, what = "train", "network"
    else:
        return
    process = _writer(path)
    way_on = (
        f"go on with hsivi {command} ... --resume"
        if process is None
        else f"wait for process {process}, which writes it"
    )
    raise InputError(f"{path} is an unfinished run of hsivi {command}, which has no {what} yet: {way_on}")


def view_run(path: Path) -> RunView:
    """Read a run of `distill`, `train` or `fit-posterior --save`; raises InputError if `path` is none."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}: name a run directory")
    places = [path / METRICS, *path.glob(f"training/[!.]*/{METRICS}"), *path.glob(f"compare/[!.]*/{METRICS}")]
    logs = [log.parent for log in places if log.is_file()]
    if not (path / CONFIG).is_file() and not logs:
        raise InputError(f"{path} is no run of hsivi distill, train or fit-posterior --save: it has no {CONFIG}")
    config: dict[str, Any] = {}
    with suppress(InputError):  # it may be written just now
        config = read_json(path / CONFIG)
    steps = config["steps"] if isinstance(config.get("steps"), int) else None
    grids = config["grids"] if isinstance(config.get("grids"), dict) else {}
    order = {f"nfe{nfe}": i for i, nfe in enumerate(grids)}
    waiting = [path / "training" / name for name in order if path / "training" / name not in logs]
    folders = sorted([*logs, *waiting], key=lambda folder: (order.get(folder.name, len(order)), str(folder)))
    trainings = tuple(_view(folder, path, steps) for folder in folders)
    finished = (path / REPORT).is_file() if "kind" in config else bool(trainings) and all(t.finished for t in trainings)
    return RunView(path, trainings, _writer(path), finished)


def _view(folder: Path, run: Path, steps: int | None) -> TrainingView:
    log = folder / METRICS
    records = read_metrics(log)
    written = None
    with suppress(OSError):
        written = log.stat().st_mtime
    last: dict[str, Any] = records[-1] if records else {}
    curves: dict[str, Curve] = {}
    judged = [record for record in records if all(is_number(record.get(name)) for name in ("fisher", "critic_gap"))]
    fisher, claim = [r["fisher"] for r in judged], [r["critic_gap"] for r in judged]
    if judged:
        mismatch, error = averages(fisher, claim)
        curves["mismatch"] = [(r["step"], value) for r, value in zip(judged, mismatch, strict=True)]
        curves["critic_error"] = [(r["step"], value) for r, value in zip(judged, error, strict=True)]
    names = dict.fromkeys(name for record in records for name in record if name not in _OF_THE_LOG)
    for name in sorted(names, key=_rank):
        points = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
        if points and (name not in ("skipped", "rollbacks") or points[-1][1]):
            curves[name] = points
    pace = last.get("seconds_per_step")
    return TrainingView(
        name=" ".join(part for part in folder.relative_to(run).parts if part != "training"),
        step=last.get("step", 0),
        steps=steps if folder.parent.name != "compare" else None,
        seconds_per_step=pace if is_number(pace) else None,
        written=written,
        curves=curves,
        advice=diagnose(fisher[-HISTORY:], claim[-HISTORY:]).advice if judged else None,
    )


def _rank(name: str) -> tuple[int, str]:
    if name in FIRST:
        return FIRST.index(name), name
    return len(FIRST) + (0 if name.startswith("fid@") else 2 if "lr" in name or "norm" in name else 1), name


def _writer(run: Path) -> int | None:
    """The process that the run's lock names, if it lives; the lock itself is not touched."""
    try:
        process = int((run / LOCK).read_text(encoding="ascii", errors="replace").strip())
        if process > 0:  # others mean whole groups
            os.kill(process, 0)
    except PermissionError:  # it lives, and is somebody else's
        return process
    except (OSError, ValueError, OverflowError):
        return None
    return process if process > 0 else None


def seconds_since(written: float) -> float:
    """How long ago a training wrote, in seconds."""
    return max(0.0, time.time() - written)

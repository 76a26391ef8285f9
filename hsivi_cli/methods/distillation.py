"""Distillation runs: one student an NFE in a run directory, each resumable, with previews and loss curves.

A run holds `nfeK/` (the student, see methods.student), `nfeK-best/` where an FID is measured (the student that had the
lowest) and `training/nfeK/` (checkpoints, metrics, previews, curves).
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hsivi_cli.engine import processes
from hsivi_cli.engine.diagnosis import HISTORY, Diagnosis, averages, diagnose
from hsivi_cli.engine.loop import Hooks, LoopConfig, resume, run_loop
from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.io.capacity import check_memory
from hsivi_cli.io.files import read_json
from hsivi_cli.io.metrics_log import is_number, plot_metrics, read_metrics, rewind_metrics
from hsivi_cli.io.run_directory import METRICS, checkpoints
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.sampling import to_uint8
from hsivi_cli.methods.student import (
    DESCRIPTION,
    PREVIEW_FID,
    TEACHER_FID,
    Student,
    best_directory,
    load_student,
    save_student,
)
from hsivi_cli.targets.score_net import ScoreNet

PREVIEW_IMAGES = 64
ROLLBACKS = 3  # before a run that diverges again and again is given up
CURVES = ("critic_loss", "mismatch", "critic_error", "log_gamma", "student_grad_norm")


@dataclass(frozen=True)
class Outputs:
    """What a caller wants to see: log records, steps, preview grids, and optionally an FID of preview images.

    `tell(sentence)` hears of roll-backs and of damaged checkpoints; the last `keep` checkpoints are kept.
    `fid(uint8 NHWC) -> float` is measured on `fid_images` images at every preview; `fid_protocol` says against what.
    """

    on_log: Callable[[dict[str, Any], Diagnosis], None]
    write_grid: Callable[[np.ndarray, Path], None]
    preview_every: int
    fid: Callable[[np.ndarray], float] | None = None
    fid_images: int = 0
    fid_protocol: dict[str, Any] = field(default_factory=dict)
    on_step: Callable[[int], None] = lambda step: None
    tell: Callable[[str], None] = lambda sentence: None
    keep: int = 2


@dataclass(frozen=True)
class DryRun:
    """Measured cost of one step: `memory_bytes` is the peak so far, `total_seconds` the run without previews."""

    seconds_per_step: float
    memory_bytes: int
    total_seconds: float


def student_directory(run: Path, nfe: int) -> Path:
    """Where a run keeps the student of this NFE."""
    return run / f"nfe{nfe}"


def training_directory(run: Path, nfe: int) -> Path:
    """Where a run keeps the checkpoint, metrics and previews of this student's training."""
    return run / "training" / f"nfe{nfe}"


def distill(
    teacher: ScoreNet,
    config: hsivi_sm.DistillConfig,
    run: Path,
    outputs: Outputs,
    start: Path | None,
    network: str | None = None,
) -> Student:
    """Train one student to `config.steps` and save it; goes on from its last checkpoint if there is one.

    `start` names a student directory to start from instead of the teacher's weights; `network` is the user's
    `FILE:FUNCTION`, if the teacher is built by one.
    """
    nfe = len(config.grid) - 1
    target, best, work = student_directory(run, nfe), best_directory(run, nfe), training_directory(run, nfe)
    processes.from_main(lambda: work.mkdir(parents=True, exist_ok=True))
    state = hsivi_sm.init(teacher, config, load_student(start, config.device, network) if start else None)
    progress = None
    if processes.from_main(lambda: bool(checkpoints(work))):
        progress = resume(hsivi_sm, state, work, outputs.tell)
    else:
        processes.from_main(lambda: rewind_metrics(work / METRICS, 0))
    description = {
        "teacher": str(teacher.path),
        "teacher_sha256": teacher.sha256,
        "recipe": resolved(config),
        "started_from": str(start) if start else "teacher",
        "torch_version": torch.__version__,
        "seed": config.seed,
    }
    history = read_metrics(work / METRICS)

    def save(extra: dict[str, Any], where: Path = target) -> None:
        extra = {"step": state.step} | _recorded(where, teacher.sha256) | extra
        save_student(hsivi_sm.averaged_student(state, description | extra), where)

    def preview(step: int) -> dict[str, float]:
        def draw(batch: range) -> Tensor:
            return torch.from_numpy(to_uint8(hsivi_sm.sample(state, PhiloxStreams(config.seed, batch))))

        n = max(PREVIEW_IMAGES, outputs.fid_images)
        images = torch.cat(list(processes.in_turns(draw, n, PREVIEW_IMAGES))).numpy()
        value = None if outputs.fid is None else outputs.fid(images[: outputs.fid_images])
        processes.from_main(lambda: publish(step, images[:PREVIEW_IMAGES], value))
        return {} if value is None else {f"fid@{outputs.fid_images}": value}

    def publish(step: int, images: np.ndarray, value: float | None) -> None:
        outputs.write_grid(images, work / f"samples-{step:06d}.png")
        if value is None:
            save({})
            return
        measured = {"value": value, "n": outputs.fid_images} | outputs.fid_protocol
        save({PREVIEW_FID: measured})
        if _is_better(measured, best):
            save({PREVIEW_FID: measured}, best)

    def on_log(record: dict[str, Any]) -> None:
        while history and history[-1]["step"] >= record["step"]:  # of a course that a roll-back left
            history.pop()
        history.append(record)
        recent = _measured(history)[-HISTORY:] or [record]
        outputs.on_log(record, diagnose([r["fisher"] for r in recent], [r["critic_gap"] for r in recent]))

    loop = LoopConfig(
        config.steps,
        config.seed,
        log_every=10,
        checkpoint_every=200,
        preview_every=outputs.preview_every,
        keep=outputs.keep,
        rollbacks=ROLLBACKS,
    )
    hooks = Hooks(on_log, preview, on_step=outputs.on_step, tell=outputs.tell)
    stopped = run_loop(hsivi_sm, state, loop, work, hooks, progress)

    def finish() -> None:
        if not outputs.preview_every or not target.is_dir():
            save({})
        if stopped:
            raise stopped(f"interrupted after the student for NFE {nfe} was finished; go on with --resume")
        curves = (*CURVES, f"fid@{outputs.fid_images}")
        plot_metrics(_diagnosed(read_metrics(work / METRICS)), curves, work / "curves.png")

    processes.from_main(finish)
    return load_student(target, config.device, network)


def check_memory_of_step(shape: tuple[int, int, int], config: hsivi_sm.DistillConfig) -> None:
    """Raise InputError, at once, if what a step keeps of images (C, H, W) alone cannot fit memory: an estimate from
    below, without the networks."""
    image = 4 * math.prod(shape)  # float32
    mine = 1 if config.device.startswith("cuda") else processes.on_this_machine()
    # x and eps of every layer, of all chains in every process
    rollout = 2 * (len(config.grid) - 1) * config.rollout_chains * image * mine
    # of the rows that are computed at once: x, eps, the image to compare at, and the critic's answer
    rows = 4 * (config.batch * image * mine // (processes.count() * config.accumulate))
    rows += 8 * config.batch  # and which inputs they are
    free = torch.cuda.mem_get_info(config.device)[0] if config.device.startswith("cuda") else None
    if config.rollout and config.rollout_cache:
        check_memory(f"--rollout {config.rollout}", rollout, free)
    check_memory(f"--batch {config.batch}", rollout + rows, free)


def dry_run(teacher: ScoreNet, config: hsivi_sm.DistillConfig) -> DryRun:
    """One warm-up step and one timed step (each a rollout, the critic updates and a student update); writes nothing."""
    import resource

    if config.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(config.device)
    state = hsivi_sm.init(teacher, config)
    seconds = 0.0
    for step in (1, 2):
        started = time.monotonic()
        hsivi_sm.step(state, None, generator(config.seed, Stream.TRAIN, step))
        if config.device.startswith("cuda"):
            torch.cuda.synchronize(config.device)
        seconds = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if config.device.startswith("cuda"):
        memory = torch.cuda.max_memory_allocated(config.device)
    return DryRun(seconds, memory, seconds * config.steps)


def resolved(config: hsivi_sm.DistillConfig) -> dict[str, Any]:
    """A configuration as plain JSON; how it is computed is not part of it."""
    fields = dataclasses.asdict(config)
    for how in ("device", "kernels", "accumulate", "compiled"):
        fields.pop(how)
    return fields | {"grid": list(config.grid), "method": "hsivi-sm"}


def _recorded(student: Path, teacher_sha256: str) -> dict[str, Any]:
    """What `record_teacher_fid` wrote into the student that is about to be replaced: it is about the teacher."""
    fields = read_json(student / DESCRIPTION).get(TEACHER_FID) if (student / DESCRIPTION).is_file() else None
    same = isinstance(fields, dict) and fields.get("teacher_sha256") == teacher_sha256
    return {TEACHER_FID: fields} if same else {}


def _is_better(measured: dict[str, Any], best: Path) -> bool:
    """Whether an FID is lower than that of the best student so far, or that one was measured in another way."""
    if not math.isfinite(measured["value"]):
        return False
    if not (best / DESCRIPTION).is_file():
        return True
    before = read_json(best / DESCRIPTION).get(PREVIEW_FID)
    if not isinstance(before, dict) or not is_number(before.get("value")):
        return True
    same = {**before, "value": None} == {**measured, "value": None}
    return not same or bool(measured["value"] < before["value"])


def _measured(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose step was not skipped in every update since the line before: they have values to average."""
    names = ("fisher", "critic_gap")
    return [r for r in records if all(is_number(r.get(name)) for name in names)]


def _diagnosed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    records = _measured(records)
    mismatch, error = averages([r["fisher"] for r in records], [r["critic_gap"] for r in records])
    rows = zip(records, mismatch, error, strict=True)
    return [record | {"mismatch": m, "critic_error": e} for record, m, e in rows]

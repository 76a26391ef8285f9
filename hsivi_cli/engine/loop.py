"""The one loop that runs any method: steps, logs, previews, checkpoints; stops cleanly and resumes exactly.

Everything random in step i comes from a generator named by (seed, i), so a checkpoint needs no generator state and a
resumed run repeats the uninterrupted one bit for bit on the CPU, skipped steps and roll-backs included.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from hsivi_cli.engine import processes
from hsivi_cli.engine.checkpoint import REGULAR, first_not_finite, keep_checkpoint, load_newest, regular
from hsivi_cli.engine.contract import Method
from hsivi_cli.engine.progress import IN_A_ROW, Progress
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError, InterruptError, RunError, TerminatedError
from hsivi_cli.io.metrics_log import append_metrics, rewind_metrics
from hsivi_cli.io.run_directory import METRICS, checkpoints

SECONDS_BETWEEN_CHECKPOINTS = 300.0  # a slow step count must not cost more than five minutes of work
STOPS: tuple[type[InterruptError] | None, ...] = (None, InterruptError, TerminatedError)
LOOP = "loop"  # where a checkpoint keeps the progress, beside what is the method's own


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what, in steps; `preview_every` 0 means never.

    `keep` checkpoints are kept. A burst of skipped steps is answered by at most `rollbacks` roll-backs in all. With any
    allowed, the start is the first checkpoint, all hold finite weights, and the last three regular ones (of every
    `checkpoint_every`-th step) are kept too.
    """

    steps: int
    seed: int
    log_every: int = 20
    checkpoint_every: int = 200
    preview_every: int = 0
    keep: int = 2
    rollbacks: int = 0


@dataclass(frozen=True)
class Hooks:
    """What a caller adds to the loop: `on_log(record)`, `preview(step) -> metrics` and `batch(generator) -> data`.

    `on_step(step)` hears of every step, before the log line of that step.
    `tell(sentence)` hears what a user should know of: a roll-back, or a damaged checkpoint that was passed over.
    """

    on_log: Callable[[dict[str, Any]], None]
    preview: Callable[[int], dict[str, float]] = lambda step: {}
    batch: Callable[[torch.Generator], Tensor | None] = lambda generator: None
    on_step: Callable[[int], None] = lambda step: None
    tell: Callable[[str], None] = lambda sentence: None


def run_loop(
    method: Method, state: Any, config: LoopConfig, directory: Path, hooks: Hooks, progress: Progress | None = None
) -> type[InterruptError] | None:
    """Advance `state` to `config.steps`, writing `metrics.jsonl` and checkpoints into `directory`.

    Metrics are averaged over the steps since the last log line. A method that skips updates whose gradient is not
    finite says so in the metric `skipped`; a burst of them rolls the run back to its last regular checkpoint, at half
    the learning rate (`state.lr_scale`). `progress` is what `resume` returned.

    Returns what to raise if a signal came during the last step, and None otherwise. Raises InterruptError (for SIGTERM
    a TerminatedError) after an earlier signal, RunError when a run diverges: the last checkpoint is then a good one.
    """
    so_far = progress or Progress()
    started, saved, steps_made = time.monotonic(), time.monotonic(), 0

    def save() -> None:
        _save(method, state, so_far, directory, config)

    if config.rollbacks and processes.from_main(lambda: not checkpoints(directory)):
        save()  # what a burst before the first checkpoint goes back to
    with _stop_requests() as stop_requested:
        while state.step < config.steps:
            generator_now = generator(config.seed, Stream.TRAIN, state.step + 1)
            metrics = method.step(state, hooks.batch(generator_now), generator_now)
            steps_made += 1
            trouble = _note(so_far, metrics, state.step)
            hooks.on_step(state.step)
            at_end = state.step == config.steps
            if at_end and not so_far.rollbacks and so_far.skipped >= config.steps:
                raise RunError("every step was skipped, its loss or gradient is not finite: are the teacher's outputs?")
            # after a skipped step nothing is shown nor saved, and a request to stop waits: what a roll-back goes to,
            # or a run is resumed from, is of a step that was good
            good = at_end or not metrics.get("skipped")
            previewing = good and config.preview_every and (state.step % config.preview_every == 0 or at_end)
            late = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
            stopping, overdue = _agree(stop_requested() if good or trouble else None, late)
            saving = good and (at_end or previewing or overdue or state.step % config.checkpoint_every == 0 or stopping)
            if saving and config.rollbacks and not trouble:
                # before a preview: neither a checkpoint nor a published network may hold such weights
                name = first_not_finite(method.state_dict(state))
                trouble = f"{name} holds values that are not finite at step {state.step}" if name else ""
            if trouble:
                so_far = _roll_back(method, state, config, directory, so_far, trouble, hooks.tell)
                if stopping:
                    raise stopping(_goes_on(state.step))
                continue
            if previewing or at_end or state.step % config.log_every == 0:
                record = {"step": state.step} | so_far.means()
                if "skipped" in metrics:
                    record |= {"skipped": so_far.skipped, "rollbacks": so_far.rollbacks}
                record |= {"seconds_per_step": (time.monotonic() - started) / steps_made}
                if previewing:
                    record |= hooks.preview(state.step)
                processes.from_main(lambda: append_metrics(directory / METRICS, record))  # noqa: B023 (called at once)
                hooks.on_log(record)
            if saving:  # after a preview: what it published must never be all that is left of a run
                save()
                saved = time.monotonic()
            if stopping and not at_end:
                raise stopping(_goes_on(state.step))
        return _agree(stop_requested(), False)[0]


def resume(method: Method, state: Any, directory: Path, tell: Callable[[str], None] | None = None) -> Progress:
    """Restore the last checkpoint into `state`, drop the log lines after it and return the loop's own progress.

    A damaged checkpoint is passed over for the one before it where there is `tell` to hear of it. Raises InputError if
    no checkpoint is there, or none that loads.
    """
    progress = _restore(method, state, load_newest(checkpoints(directory), tell))
    processes.from_main(lambda: rewind_metrics(directory / METRICS, state.step))
    return progress


def _agree(stop: type[InterruptError] | None, late: bool) -> tuple[type[InterruptError] | None, bool]:
    """How all processes stop after this step, if one alone has had a signal, and whether all save since one is late."""
    agreed = processes.agree_on_largest(2 * STOPS.index(stop) + late)
    return STOPS[agreed // 2], agreed % 2 == 1


def _note(progress: Progress, metrics: dict[str, float], step: int) -> str:
    """Take a step's metrics into the progress; returns what is wrong, if too much is."""
    if "skipped" not in metrics:
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise RunError(f"diverged: {name} is {value} at step {step}: use a lower --lr")
    progress.add({name: value for name, value in metrics.items() if name != "skipped"})
    if not metrics.get("skipped") or not progress.skip(step):
        return ""
    wrong = next((f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)), "the gradient")
    count = len(progress.recent)
    how_often = f"{IN_A_ROW} steps in a row" if count < 2 * IN_A_ROW else f"{count} of the last 100 steps"
    return f"{wrong} at step {step}, and {how_often} had to be skipped"


def _roll_back(
    method: Method,
    state: Any,
    config: LoopConfig,
    directory: Path,
    progress: Progress,
    trouble: str,
    tell: Callable[[str], None],
) -> Progress:
    """Restore the last regular checkpoint, to go on from it at a lower rate; RunError if that was tried enough.

    A second roll-back from before the next regular checkpoint goes to the one before: the last may be bad already.
    """
    if progress.rollbacks >= config.rollbacks:
        tried = f", after {progress.rollbacks} roll-backs to lower rates" if progress.rollbacks else ""
        raise RunError(f"diverged: {trouble}{tried}: use a lower --lr")
    # as the first process lists them: over a network, another may not see yet what was written last
    paths = processes.from_main(lambda: _places_to_go_back_to(directory, config))
    kept = _restore(method, state, load_newest(paths, tell))
    if state.step == progress.rolled_back_to and len(paths) > 1:
        kept = _restore(method, state, load_newest(paths[1:], tell))
    after = progress.rolled_back(kept, state.step)
    state.lr_scale = after.lr_scale
    processes.from_main(lambda: rewind_metrics(directory / METRICS, state.step))
    # the checkpoint anew, with the lower rate in it: a resumed run must not go on at the old one
    _save(method, state, after, directory, config)
    tell(f"{trouble}: back to step {state.step}, with {after.lr_scale:g} of the learning rate")
    return after


def _places_to_go_back_to(directory: Path, config: LoopConfig) -> list[Path]:
    """No more than are kept whatever --keep says, for it must not change the course."""
    return regular(checkpoints(directory), config.checkpoint_every)[:REGULAR] or checkpoints(directory)


def _save(method: Method, state: Any, progress: Progress, directory: Path, config: LoopConfig) -> None:
    tree = method.state_dict(state) | {LOOP: progress.to_json()}
    every = config.checkpoint_every if config.rollbacks else 0
    processes.from_main(lambda: keep_checkpoint(directory, tree, state.step, config.keep, every))


def _restore(method: Method, state: Any, tree: dict[str, Any]) -> Progress:
    progress = Progress(**tree.pop(LOOP, {}))
    method.load_state_dict(state, tree)
    if hasattr(state, "lr_scale"):
        state.lr_scale = progress.lr_scale
    # beside the check: nobody writes there again before all have read
    if processes.agree_on_largest(state.step) != state.step:
        raise InputError("this process finds an older checkpoint: keep the run where all machines see the same files")
    return progress


def _goes_on(step: int) -> str:
    return f"interrupted at step {step}; checkpoint written, go on with --resume"


@contextmanager
def _stop_requests() -> Iterator[Callable[[], type[InterruptError] | None]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after this step; a second Ctrl-C stops at once.

    A second SIGTERM does not: a queue may send several, and the checkpoint that the first one asked for is on its way.
    """
    requested: type[InterruptError] | None = None

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = requested or (TerminatedError if number == signal.SIGTERM else InterruptError)

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = [signal.signal(number, request) for number in signals]
    except ValueError:  # not the main thread: nothing to catch
        yield lambda: None
        return
    try:
        yield lambda: requested
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)

"""The one loop that runs any method: steps, logs, previews, checkpoints; stops cleanly and resumes exactly.

Everything random in step i comes from a generator named by (seed, i), so a checkpoint needs no generator state and a
resumed run repeats the uninterrupted one bit for bit on the CPU.
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
from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.contract import Method
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InterruptError, RunError
from hsivi_cli.io.metrics_log import append_metrics, rewind_metrics
from hsivi_cli.io.run_directory import CHECKPOINT, METRICS

SECONDS_BETWEEN_CHECKPOINTS = 300.0  # a slow step count must not cost more than five minutes of work


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what, in steps; `preview_every` 0 means never."""

    steps: int
    seed: int
    log_every: int = 20
    checkpoint_every: int = 200
    preview_every: int = 0


@dataclass(frozen=True)
class Hooks:
    """What a caller adds to the loop: `on_log(record)`, `preview(step) -> metrics` and `batch(generator) -> data`.

    `on_step(step)` hears of every step, before the log line of that step.
    """

    on_log: Callable[[dict[str, Any]], None]
    preview: Callable[[int], dict[str, float]] = lambda step: {}
    batch: Callable[[torch.Generator], Tensor | None] = lambda generator: None
    on_step: Callable[[int], None] = lambda step: None


def run_loop(method: Method, state: Any, config: LoopConfig, directory: Path, hooks: Hooks) -> bool:
    """Advance `state` to `config.steps`, writing `metrics.jsonl` and `checkpoint.safetensors` into `directory`.

    Metrics are averaged over the steps since the last log line. Returns whether a signal came during the last step; a
    caller with more to do should stop then. Raises InterruptError after an earlier signal, RunError when a metric is
    not finite (the last checkpoint is then the last good one).
    """
    started, saved, sums, count = time.monotonic(), time.monotonic(), {}, 0  # type: ignore[var-annotated]
    first = state.step
    with _stop_requests() as stop_requested:
        while state.step < config.steps:
            generator_now = generator(config.seed, Stream.TRAIN, state.step + 1)
            metrics = method.step(state, hooks.batch(generator_now), generator_now)
            for name, value in metrics.items():
                if not math.isfinite(value):
                    raise RunError(f"diverged: {name} is {value} at step {state.step}: use a lower --lr")
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            hooks.on_step(state.step)
            at_end = state.step == config.steps
            previewing = config.preview_every and (state.step % config.preview_every == 0 or at_end)
            if previewing or at_end or state.step % config.log_every == 0:
                record = {"step": state.step} | {name: total / count for name, total in sums.items()}
                record |= {"seconds_per_step": (time.monotonic() - started) / (state.step - first)}
                if previewing:
                    record |= hooks.preview(state.step)
                if processes.is_main():
                    append_metrics(directory / METRICS, record)
                hooks.on_log(record)
                sums, count = {}, 0
            overdue = time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS
            # one process alone may have had the signal, or be late: all stop, and save, after the same step
            agreed = processes.agree_on_largest(2 * stop_requested() + overdue)
            stopping, overdue = agreed > 1, agreed == 1
            # after a preview too: what it published must never be all that is left of a run
            if at_end or previewing or overdue or state.step % config.checkpoint_every == 0 or stopping:
                processes.from_main(lambda: save_checkpoint(directory / CHECKPOINT, method.state_dict(state)))
                saved = time.monotonic()
            if stopping and not at_end:
                raise InterruptError(f"interrupted at step {state.step}; checkpoint written, go on with --resume")
        return bool(processes.agree_on_largest(stop_requested()))


def resume(method: Method, state: Any, directory: Path) -> None:
    """Restore the last checkpoint into `state` and drop the log lines after it; raises InputError if there is none."""
    method.load_state_dict(state, load_checkpoint(directory / CHECKPOINT))
    processes.from_main(lambda: rewind_metrics(directory / METRICS, state.step))


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after this step; a second Ctrl-C stops at once."""
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = [signal.signal(number, request) for number in signals]
    except ValueError:  # not the main thread: nothing to catch
        yield lambda: False
        return
    try:
        yield lambda: requested
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)

"""Timing that is fair to all sides: interleaved rounds in one run, rotating inputs, medians with their spread."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of `repeats` rounds and the quartiles about it; `cpu`: median of CPU seconds."""

    median: float
    low: float
    high: float
    cpu: float
    repeats: int


def synchronise(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_sides(
    sides: dict[str, Callable[[int], Any]],
    repeats: int,
    device: torch.device,
    inner: int = 1,
    warmup: int = 2,
    failed: Callable[[str, Exception], Any] | None = None,
) -> dict[str, Timing]:
    """Time every side in turn, `repeats` rounds; a side is called with a running number, to choose its input by.

    Each round starts with another side. `inner` calls are timed together, for calls too short for the clock. A side
    whose work is done by another process has `cpu_seconds()` to say what that has spent; one that does many calls in
    one has them as `calls`. A side that raises in its first calls is told to `failed(side, error)` and left out;
    without `failed` it ends all.
    """
    names = []
    for name, side in sides.items():
        try:
            for i in range(warmup):
                side(i)
            synchronise(device)
            names.append(name)
        except Exception as err:  # a compiler, memory that is too small: the others are worth measuring all the same
            if failed is None:
                raise
            failed(name, err)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats if names else 0):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            side = sides[name]
            cpu_clock: Callable[[], float] = getattr(side, "cpu_seconds", time.process_time)
            captured: int = getattr(side, "calls", 0)
            synchronise(device)
            cpu_started, started = cpu_clock(), time.perf_counter()
            for i in range(1 if captured else inner):
                side(turn * inner + i)
            synchronise(device)
            seconds[name].append((time.perf_counter() - started) / (captured or inner))
            cpu[name].append((cpu_clock() - cpu_started) / (captured or inner))
    return {name: summarise(seconds[name], cpu[name]) for name in names}


def summarise(seconds: Sequence[float], cpu: Sequence[float]) -> Timing:
    """Median and quartiles of several rounds."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
    return Timing(median, low, high, statistics.median(cpu), len(seconds))


def copy_bandwidth(device: torch.device, size: int = 0) -> float:
    """Bytes a second that a copy of `size` bytes (0: 1 GiB on a GPU, 64 MiB elsewhere) reads and writes."""
    size = size or (2**30 if device.type == "cuda" else 2**26)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    timing = time_sides({"copy": lambda _: target.copy_(source)}, 10, device)["copy"]
    return 2 * size / timing.median


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """Floating-point operations a second of a square product (0: 8192 on a GPU, 512 elsewhere)."""
    side = side or (8192 if device.type == "cuda" else 512)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = time_sides({"matmul": lambda _: a @ b}, 10, device)["matmul"]
    return 2 * side**3 / timing.median

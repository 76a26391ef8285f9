"""Learning-rate schedules, moving averages, clipped updates from a cut batch, and mixed precision, for every method."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from hsivi_cli.engine import processes

Precision = Literal["fp32", "bf16", "fp16"]
ScheduleName = Literal["cosine", "exponential", "constant"]

DECAY_FACTOR, DECAY_EVERY = 0.9, 3000  # the exponential schedule of the published recipe (arXiv 2310.17153)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LearningRate:
    """A base rate, its linear warm-up in steps, and what follows."""

    base: float
    warmup: int
    schedule: ScheduleName

    def at(self, step: int, total: int) -> float:
        """The rate of step 1 .. total."""
        rate = self.base * min(1.0, step / max(self.warmup, 1))
        if self.schedule == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * step / total))
        if self.schedule == "exponential":
            return rate * DECAY_FACTOR ** (step // DECAY_EVERY)
        return rate


@dataclass(frozen=True)
class Share:
    """The rows of a global batch that this process computes, cut into parts that are computed one after the other.

    `parts` are slices into `rows`, each with its weight in a mean over the whole batch.
    """

    rows: range
    parts: tuple[tuple[slice, float], ...]


def share_of(batch: int, accumulate: int = 1) -> Share:
    """This process's share of `batch` rows, in at most `accumulate` parts; never empty, at worst a row of no weight."""
    rows = processes.share(batch)
    if not rows:  # more processes than rows
        return Share(range(1), ((slice(0, 1), 0.0),))
    pieces = min(accumulate, len(rows))
    ends = [len(rows) * i // pieces for i in range(pieces + 1)]
    return Share(rows, tuple((slice(a, b), (b - a) / batch) for a, b in pairwise(ends)))


@dataclass(frozen=True)
class Update:
    """What became of one update: the gradient's norm before clipping, and whether the optimiser stepped.

    `means` holds the loss, as "loss", and whatever else was to be averaged over the global batch.
    """

    norm: float
    stepped: bool
    means: dict[str, float]


LossOf = Callable[[slice], tuple[Tensor, dict[str, Tensor]]]


def apply_update(
    loss_of: LossOf,
    parts: Sequence[tuple[slice, float]],
    optimiser: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    rate: float,
    clip: float,
    scaler: torch.amp.GradScaler | None = None,
) -> Update:
    """One update from the mean loss of a global batch, of which `parts` are what this process computes.

    `loss_of(part)` returns the mean loss of a part's rows and further means; the gradients of the parts, and of all
    processes, are added up before they are clipped. With a `scaler` (fp16) a gradient that overflows is computed again
    at half the scale.

    An update whose loss or norm is not finite leaves parameters and optimiser as they were. The norm alone decides, and
    a loss that is not finite is made to show in it: so all processes decide alike.
    """
    parameters, scaler = list(parameters), scaler or torch.amp.GradScaler(enabled=False)
    for group in optimiser.param_groups:
        group["lr"] = rate
    before = scaler.state_dict()
    while True:
        optimiser.zero_grad(set_to_none=True)
        means = _backward(loss_of, parts, parameters, scaler)
        scaler.unscale_(optimiser)
        finite = math.isfinite(means["loss"])
        norm = float(nn.utils.clip_grad_norm_(parameters, clip)) if finite else math.nan
        if math.isfinite(norm):
            scaler.step(optimiser)
            scaler.update()
            return Update(norm, True, means)
        scale = scaler.get_scale()
        scaler.update()
        # the scale is not to blame: there is none, it is small already, or no gradient overflowed, only their norm
        if not finite or not scaler.is_enabled() or scaler.get_scale() < 1 or scaler.get_scale() >= scale:
            optimiser.zero_grad(set_to_none=True)  # clipping has spread the NaN over all of them
            scaler.load_state_dict(before)
            return Update(norm, False, means)


def gradient_scaler(precision: Precision, device: torch.device | str) -> torch.amp.GradScaler:
    """Scales losses so that gradients fit float16; does nothing in any other precision."""
    return torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")


def _backward(
    loss_of: LossOf, parts: Sequence[tuple[slice, float]], parameters: list[Tensor], scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """Gradients of the global batch in every parameter, scaled; returns the means over the batch."""
    sums: Tensor | None = None
    for part, weight in parts:
        loss, others = loss_of(part)
        scaler.scale(loss * weight).backward()
        values = weight * torch.stack([loss.detach(), *(value.detach() for value in others.values())])
        sums = values if sums is None else sums + values
    assert sums is not None
    means = processes.sum_gradients(parameters, sums).tolist()
    return dict(zip(("loss", *others), means, strict=True))


@torch.no_grad()
def update_ema(averages: Iterable[Tensor], values: Iterable[Tensor], step: int, decay: float) -> None:
    """Move the averages towards the values, faster during the first steps; `step` counts from 1."""
    decay_now = min(decay, (1 + step) / (10 + step))
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - decay_now)


def autocast(precision: Precision, device: torch.device | str) -> AbstractContextManager[None]:
    """Context in which networks compute in `precision`; losses and sums outside it stay in float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, TYPES.get(precision, torch.bfloat16), enabled=precision in TYPES)

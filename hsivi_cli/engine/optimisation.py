"""Learning-rate schedules, moving averages, clipping and mixed precision, shared by every method."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16"]
ScheduleName = Literal["cosine", "exponential", "constant"]

DECAY_FACTOR, DECAY_EVERY = 0.9, 3000  # the exponential schedule of the published recipe (arXiv 2310.17153)


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
class Update:
    """What became of one update: the gradient's norm before clipping, and whether the optimiser stepped."""

    norm: float
    stepped: bool


def apply_step(
    loss: Tensor, optimiser: torch.optim.Optimizer, parameters: Iterable[Tensor], rate: float, clip: float
) -> Update:
    """Backward, clip the gradient's norm, step at `rate`; without a step where the loss or the norm is not finite.

    A skipped update leaves parameters and optimiser as they were. The norm alone decides, and a loss that is not finite
    is made to show in it: so where gradients are summed over processes, all of them decide alike.
    """
    parameters = list(parameters)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if not math.isfinite(loss.item()):
        next(p.grad for p in parameters if p.grad is not None).fill_(math.nan)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if math.isfinite(norm):
        optimiser.step()
    else:
        optimiser.zero_grad(set_to_none=True)  # clipping has spread the NaN over all of them
    return Update(norm, math.isfinite(norm))


@torch.no_grad()
def update_ema(averages: Iterable[Tensor], values: Iterable[Tensor], step: int, decay: float) -> None:
    """Move the averages towards the values, faster during the first steps; `step` counts from 1."""
    decay_now = min(decay, (1 + step) / (10 + step))
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, 1 - decay_now)


def autocast(precision: Precision, device: torch.device | str) -> AbstractContextManager[None]:
    """Context in which networks compute in `precision`; losses and sums outside it stay in float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")

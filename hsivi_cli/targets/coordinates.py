"""Smooth maps from unconstrained coordinates to parameters on an interval, elementwise, with the derivatives needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import logsigmoid

Batch = Float[Tensor, "n k"]


@dataclass(frozen=True)
class Mapped:
    """Parameters x at z, the slope dx/dz > 0, its logarithm, and the derivative of that logarithm; each (n, k)."""

    x: Batch
    slope: Batch
    log_slope: Batch
    bend: Batch


class Coordinates:
    """k parameters, each on (lower, upper): the real line, a half line from `lower`, or an interval.

    `x = z` on the line, `lower + unit exp(rate z)` on a half line (so z = 0 is `unit` above the bound, and a `rate`
    like the posterior's relative sd makes z of order one), `lower + (upper - lower) logistic(z)` on an interval.
    """

    def __init__(
        self,
        lower: Sequence[float],
        upper: Sequence[float],
        unit: Sequence[float] | None = None,
        rate: Sequence[float] | None = None,
    ) -> None:
        low, high = (torch.tensor(list(bound), dtype=torch.float64) for bound in (lower, upper))
        self.half: Float64[Tensor, " k"] = torch.isfinite(low) & torch.isinf(high)
        self.interval = torch.isfinite(low) & torch.isfinite(high)
        if bool((torch.isinf(low) & torch.isfinite(high)).any()):
            raise ValueError("a parameter bounded above must be bounded below")
        self.free = not bool((self.half | self.interval).any())
        self.lower = torch.where(torch.isfinite(low), low, 0.0)
        self.width = torch.where(self.interval, high - low, 1.0)
        ones = [1.0] * len(low)
        self.unit, self.rate = (torch.tensor(list(v or ones), dtype=torch.float64) for v in (unit, rate))

    def __len__(self) -> int:
        """k."""
        return len(self.lower)

    def map(self, z: Batch) -> Mapped:
        """Parameters and derivatives at each row of z."""
        if self.free:
            zeros = torch.zeros_like(z)
            return Mapped(z, torch.ones_like(z), zeros, zeros)
        # where() would pass on the infinities of the branch that it drops, unless that branch sees 0
        on_half = torch.where(self.half, self.rate * z, 0.0)
        grown = self.unit * on_half.exp()
        on_interval = torch.where(self.interval, z, 0.0)
        share = on_interval.sigmoid()
        slope_half, slope_interval = self.rate * grown, self.width * share * (1 - share)
        log_half = on_half + (self.rate * self.unit).log()
        log_interval = self.width.log() + logsigmoid(on_interval) + logsigmoid(-on_interval)

        def pick(line: Tensor, half: Tensor, interval: Tensor) -> Tensor:
            return torch.where(self.half, half, torch.where(self.interval, interval, line))

        zero, one = torch.zeros_like(z), torch.ones_like(z)
        return Mapped(
            pick(z, self.lower + grown, self.lower + self.width * share),
            pick(one, slope_half, slope_interval),
            pick(zero, log_half, log_interval),
            pick(zero, self.rate.expand_as(z), 1 - 2 * share),
        )

    def invert(self, x: Batch) -> Batch:
        """z at each row of x, which must lie inside the bounds."""
        above = x - self.lower
        half = (torch.where(self.half, above, 1.0) / self.unit).log() / self.rate
        share = torch.where(self.interval, above / self.width, 0.5)
        return torch.where(self.half, half, torch.where(self.interval, torch.logit(share), x))


def positive_rate(count: int) -> float:
    """About the posterior sd of the logarithm of a scale that `count` values inform: `1 / sqrt(2 count)`."""
    return min(0.7, 1 / math.sqrt(2 * max(count, 1)))

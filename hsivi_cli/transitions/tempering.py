"""Pieces of tempered sequential Monte Carlo: the geometric path, its next temperature, resampling and evidence.

Del Moral, Doucet, Jasra 2006 (SMC samplers); Jasra et al. 2011 (temperatures by effective sample size). Nothing here
knows where the densities come from: prior and likelihood, or an approximation and its target. All in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Points = Float[Tensor, "n d"]

SLACK = 1e-3  # relative surplus of the effective sample size at which a temperature is good enough


@dataclass(frozen=True)
class GeometricPath:
    """`log pi_t = (1 - t) log base + t log target`, t from 0 to 1; densities and gradients batched over rows."""

    log_base: Callable[[Points], Float[Tensor, " n"]]
    log_target: Callable[[Points], Float[Tensor, " n"]]
    base_gradient: Callable[[Points], Points]
    target_gradient: Callable[[Points], Points]

    def log_prob(self, t: float) -> Callable[[Points], Float[Tensor, " n"]]:
        """Log density of the bridge at temperature t; at 1 the target alone."""
        if t >= 1.0:
            return self.log_target
        return lambda z: (1 - t) * self.log_base(z) + t * self.log_target(z)

    def gradient(self, t: float) -> Callable[[Points], Points]:
        """Gradient of `log_prob(t)`."""
        if t >= 1.0:
            return self.target_gradient
        return lambda z: (1 - t) * self.base_gradient(z) + t * self.target_gradient(z)

    def log_ratio(self, z: Points) -> Float[Tensor, " n"]:
        """`log target - log base`, what a weight gains per unit of temperature; -inf where the target is no number."""
        return (self.log_target(z) - self.log_base(z)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def effective_sample_size(log_weight: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """`(sum w)^2 / sum w^2` over the last axis, between 1 and n; 0 where every weight is zero."""
    ess = (2 * log_weight.logsumexp(-1) - (2 * log_weight).logsumexp(-1)).exp()
    return ess.nan_to_num(nan=0.0)


def log_mean_exp(log_weight: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """Log of the mean weight over the last axis."""
    return log_weight.logsumexp(-1) - math.log(log_weight.shape[-1])


def next_temperature(
    log_ratio: Float[Tensor, " n"], t: float, share: float, log_weight: Float[Tensor, " n"] | None = None
) -> float:
    """`next_temperatures` of a single sampler."""
    carried = None if log_weight is None else log_weight[None]
    return float(next_temperatures(log_ratio[None], torch.tensor([t], dtype=torch.float64), share, carried))


def next_temperatures(
    log_ratio: Float[Tensor, "b n"],
    t: Float[Tensor, " b"],
    share: float,
    log_weight: Float[Tensor, "b n"] | None = None,
) -> Float[Tensor, " b"]:
    """The temperature in (t, 1] at which each row's effective sample size has fallen to `share` of what it is at t.

    `log_weight` are the weights carried at t (equal, if left out). Points whose ratio is -inf die at any step, so they
    count neither before nor after. What remains is `share` up to a thousandth above; 1 where even the target keeps
    `share`, or nothing is left alive. Newton's method in the square of the step, in which the logarithm of the
    effective sample size is linear for normal log ratios, and inside a bracket; rows do not see each other.
    """
    carried = torch.zeros_like(log_ratio) if log_weight is None else log_weight
    live = (log_ratio > -math.inf) & (carried > -math.inf)
    carried = torch.where(live, carried, -math.inf)
    weight = (carried - carried.amax(1, keepdim=True)).exp().nan_to_num(nan=0.0)
    ratio = torch.where(live, log_ratio, -math.inf)
    ratio = torch.where(live, ratio - ratio.amax(1, keepdim=True), 0.0)
    least = 2 * weight.sum(1).log() - weight.square().sum(1).log() + math.log(share)

    def surplus(step: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the effective sample size after a step, over the least one, and its slope."""
        left = weight * (step[:, None] * ratio).exp()
        squares = left.square()
        total, total_square = left.sum(1), squares.sum(1)
        slope = 2 * ((left * ratio).sum(1) / total - (squares * ratio).sum(1) / total_square)
        return 2 * total.log() - total_square.log() - least, slope

    low, high = torch.zeros_like(t), 1 - t
    finished = (surplus(high)[0] >= 0) | ~live.any(1) | (t >= 1)
    share_of = weight / weight.sum(1, keepdim=True)
    centred = ratio - (share_of * ratio).sum(1, keepdim=True)
    step = (-math.log(share) / (share_of * centred.square()).sum(1)).sqrt().nan_to_num(nan=0.5)
    step = torch.minimum(step, 0.5 * high)
    done = finished
    for _ in range(100):
        above, slope = surplus(step)
        enough = above >= 0  # no number: the step was far too long
        low, high = torch.where(enough & ~done, step, low), torch.where(enough | done, high, step)
        done = done | (enough & (above < SLACK)) | (high - low <= 1e-15 * high)
        if bool(done.all()):
            break
        newton = (step.square() - (above - SLACK / 2) * 2 * step / slope).clamp_min(0.0).sqrt()
        inside = (newton > low) & (newton < high)
        halved = torch.where(low > 0, (low * high).sqrt(), 0.1 * high)
        step = torch.where(done, step, torch.where(inside, newton, halved))
    reached = t + torch.where(low > 0, low, high)
    return torch.where(finished, 1.0, torch.maximum(reached, torch.nextafter(t, torch.ones_like(t))))


def systematic_resample(
    log_weight: Float[Tensor, "... n"], uniform: Float[Tensor, "..."], count: int | None = None
) -> Int[Tensor, "... m"]:
    """Indices of `count` (default n) survivors along the last axis, in order, from one uniform a row.

    Index i appears floor or ceil of `count w_i` times, that many on average (Carpenter et al. 1999).
    """
    count = log_weight.shape[-1] if count is None else count
    return _survivors(log_weight, (torch.arange(count, dtype=torch.float64) + uniform.double()[..., None]) / count)


def stratified_resample(log_weight: Float[Tensor, "... n"], uniform: Float[Tensor, "... m"]) -> Int[Tensor, "... m"]:
    """Indices of m survivors along the last axis, in order, one from each m-th of the total weight (Kitagawa 1996).

    Index i appears at least `floor(m w_i) - 1` and at most `ceil(m w_i) + 1` times.
    """
    count = uniform.shape[-1]
    return _survivors(log_weight, (torch.arange(count, dtype=torch.float64) + uniform.double()) / count)


def multinomial_resample(log_weight: Float[Tensor, "... n"], uniform: Float[Tensor, "... m"]) -> Int[Tensor, "... m"]:
    """Indices of m independent draws along the last axis, each in proportion to its weight."""
    return _survivors(log_weight, uniform.double())


def _survivors(log_weight: Float[Tensor, "... n"], positions: Float[Tensor, "... m"]) -> Int[Tensor, "... m"]:
    """Whose stretch of the total weight each position in [0, 1) falls into."""
    share = (log_weight.double() - log_weight.double().logsumexp(-1, keepdim=True)).exp()
    edges = share.cumsum(-1)
    edges = edges / edges[..., -1:]  # rounding must not leave the last position beyond the last edge
    return torch.searchsorted(edges, positions.clamp_max(math.nextafter(1.0, 0.0)), right=True)


@dataclass(frozen=True)
class Evidence:
    """Log evidence and its standard error."""

    log_z: float
    log_z_se: float


def bridge_sampling(
    at_target: Float[Tensor, " n"], at_base: Float[Tensor, " m"], target_ess: float | None = None
) -> Evidence:
    """The evidence from exact draws of both ends, by the optimal bridge (Meng and Wong 1996, eq. 4.1).

    `at_target` and `at_base` hold `log p - log q` (p unnormalised, q a density) at draws from p and from q;
    `target_ess` is the effective number of the former where they are not independent. The error follows
    Fruehwirth-Schnatter 2004. The draws of the target must not have shaped q.
    """
    n, m = target_ess or float(len(at_target)), float(len(at_base))
    log_s1, log_s2 = math.log(n / (n + m)), math.log(m / (n + m))
    shift = float(at_target.median())
    up, down = at_target - shift, at_base - shift
    log_r = 0.0
    for _ in range(1000):
        above = down - torch.logaddexp(log_s1 + down, torch.tensor(log_s2 + log_r))
        below = -torch.logaddexp(log_s1 + up, torch.tensor(log_s2 + log_r))
        change = float(log_mean_exp(above) - log_mean_exp(below)) - log_r
        log_r += change
        if abs(change) < 1e-10:
            break

    def relative_variance(log_values: Tensor) -> float:
        values = (log_values - log_values.max()).exp()
        return float(values.var() / values.mean() ** 2)

    return Evidence(log_r + shift, math.sqrt(relative_variance(above) / m + relative_variance(below) / n))

"""Pareto-smoothed importance weights: how far the draws can be corrected, and the corrected draws.

After Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (JMLR 25(72), 2024, arXiv
1507.02646), with the tail's fit of Zhang and Stephens (Technometrics 51(3), 2009). ArviZ has the same algorithm, and
the tests compare with it; importing ArviZ takes 2.4 s of CPU, though, as long as many a fit.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from hsivi_cli.errors import RunError

MANY_DRAWS = 500  # enough to say that no weight stands out
FEW_DRAWS = 25  # fewer give a tail of at most 4 weights: no shape can be fitted to that
_SMALLEST = math.log(torch.finfo(torch.float64).tiny)  # weights below that, relative to the largest, are no tail
_EVEN = math.log(2.0)  # no weight above twice the average: whatever the shape of such a tail, it carries nothing
_EQUAL = 1e-9  # log weights that differ by less are equal up to rounding


@dataclass(frozen=True)
class Smoothed:
    """Normalised log weights (their exponentials sum to 1), the upper tail smoothed, and what the raw ones say.

    `khat` is the shape of the tail: below 0.5 the weights have a finite variance; it is 0 where the largest are equal,
    or none of 500 or more is above twice the average (no tail to speak of), and infinite where no tail can be fitted
    (fewer than 25 draws, or nearly all weights negligible). `ess` is `1 / sum w^2` of the smoothed weights. `log_z`
    (log of the mean raw weight, which is unbiased before the log) and `elbo` (mean raw log weight) come with their
    standard errors. `non_finite` counts weights that are NaN or +inf: those count as zero, and are a reason for
    distrust.
    """

    log_weight: Float64[Tensor, " n"]
    khat: float
    ess: float
    log_z: float
    log_z_se: float
    elbo: float
    elbo_se: float
    non_finite: int

    @property
    def n(self) -> int:
        """How many draws."""
        return len(self.log_weight)


def smooth_weights(log_weight: Float64[Tensor, " n"]) -> Smoothed:
    """Smooth the largest `min(n/5, 3 sqrt(n))` weights (Vehtari et al.); log weights may hold -inf.

    Raises RunError if every weight is zero: then no draw lies where the target has mass.
    """
    raw = log_weight.detach().double()
    valid = ~(raw.isnan() | (raw == math.inf))
    raw = torch.where(valid, raw, -math.inf)
    n = len(raw)
    if not n or not bool((raw > -math.inf).any()):
        raise RunError("every importance weight is zero or not a number: no draw lies where the target has mass")
    smoothed, khat = _smooth_tail(raw - raw.max())
    normalised = smoothed - smoothed.logsumexp(0)
    log_z = float(raw.logsumexp(0)) - math.log(n)
    relative = (raw - log_z).exp()  # mean 1: the delta method gives log Z the standard error of their mean
    return Smoothed(
        log_weight=normalised,
        khat=khat,
        ess=float((-(2 * normalised).logsumexp(0)).exp()),
        log_z=log_z,
        log_z_se=_standard_error(relative),
        elbo=float(raw.mean()),
        elbo_se=_standard_error(raw),
        non_finite=int((~valid).sum()),
    )


def tail_shape(log_value: Float64[Tensor, " n"]) -> float:
    """k-hat of the upper tail of positive numbers given by their logs, such as weights times |h| for a function h."""
    finite = torch.where(log_value.isnan() | (log_value == math.inf), -math.inf, log_value)
    return _smooth_tail(finite - finite.max())[1] if bool((finite > -math.inf).any()) else math.inf


def resample(
    log_weight: Float64[Tensor, " n"], count: int, generator: torch.Generator, systematic: bool = False
) -> Int64[Tensor, " count"]:
    """Indices of `count` draws, each taken in proportion to its weight, in random order; weights need no normalising.

    Stratified by default (one uniform a stratum), which keeps independent draws nearly independent; `systematic` uses
    one uniform for all. A draw of weight w comes up `floor(count w)` to `ceil(count w)` times if systematic, one more
    or fewer if stratified. Raises RunError if every weight is zero.
    """
    weight = (log_weight.double() - log_weight.max()).exp()
    if not bool(weight.isfinite().all()):
        raise RunError("every importance weight is zero or not a number: nothing can be resampled")
    uniform = torch.rand(1 if systematic else count, generator=generator, dtype=torch.float64)
    edges = weight.cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + uniform) / count * edges[-1]
    # rounding may put the last point on the last edge; weights of zero at the end must not catch it
    last = int(weight.nonzero()[-1])
    index = torch.searchsorted(edges, points, right=True).clamp_max(last)
    return index[torch.randperm(count, generator=generator)]


def _standard_error(value: Float64[Tensor, " n"]) -> float:
    return float(value.std()) / math.sqrt(len(value)) if len(value) > 1 else math.nan


def _smooth_tail(log_ratio: Float64[Tensor, " n"]) -> tuple[Float64[Tensor, " n"], float]:
    """Replace the tail by quantiles of its generalised Pareto fit; `log_ratio` has maximum 0. Returns k-hat too."""
    n = len(log_ratio)
    if n < FEW_DRAWS:
        return log_ratio, math.inf
    length = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    value, order = log_ratio.sort()
    cutoff = max(float(value[-length - 1]), _SMALLEST)
    even = n >= MANY_DRAWS and math.log(n) - float(log_ratio.logsumexp(0)) < _EVEN
    if cutoff > -_EQUAL or even:
        return log_ratio, 0.0  # the largest weights are all the same, or none stands out: nothing to smooth
    in_tail = value > cutoff
    tail = value[in_tail]
    if len(tail) <= 4:
        return log_ratio, math.inf
    excess = tail.exp() - math.exp(cutoff)
    shape, scale = fit_generalised_pareto(excess)
    if not math.isfinite(shape):
        return log_ratio, math.inf
    probability = (torch.arange(len(tail), dtype=torch.float64) + 0.5) / len(tail)
    expected = _pareto_quantile(probability, shape, scale) + math.exp(cutoff)
    smoothed = log_ratio.clone()
    smoothed[order[in_tail]] = expected.log().clamp_max(0)  # never beyond the largest raw weight
    return smoothed, shape


def fit_generalised_pareto(excess: Float64[Tensor, " m"]) -> tuple[float, float]:
    """Shape k and scale sigma of ascending positive numbers; k shrunk towards 1/2 by ten pseudo-observations.

    Profile likelihood in b = -k / sigma averaged over a quasi-uniform grid (Zhang and Stephens 2009);
    the shrinkage is Vehtari et al.'s.
    """
    m = len(excess)
    grid = 30 + int(math.sqrt(m))
    points = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    quartile = float(excess[int(m / 4 + 0.5) - 1])
    b = 1 / excess[-1] + (1 - (grid / points).sqrt()) / (3 * quartile)
    k = (-b[:, None] * excess).log1p().mean(1)
    log_likelihood = m * ((-b / k).log() - k - 1)
    weight = log_likelihood.softmax(0)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0.0)
    b_mean = float((b * weight).sum() / weight.sum())
    k_mean = float((-b_mean * excess).log1p().mean())
    return (m * k_mean + 10 * 0.5) / (m + 10), -k_mean / b_mean


def _pareto_quantile(probability: Float64[Tensor, " m"], shape: float, scale: float) -> Float64[Tensor, " m"]:
    exponent = -torch.log1p(-probability)
    return scale * (exponent if abs(shape) < 1e-15 else torch.expm1(shape * exponent) / shape)

"""Does the fitted model draw responses like the one observed? Posterior predictive checks, and PSIS leave-one-out.

Predictive p-values after Gelman, Meng and Stern (Statistica Sinica 6, 1996); leave-one-out after Vehtari, Gelman and
Gabry (Statistics and Computing 27, 2017). Both judge the model together with the fit: a bad figure may be either's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.errors import RunError
from hsivi_cli.evaluation.pareto import smooth_weights

Batch = Float64[Tensor, "n d"]
CELLS = 4_000_000  # numbers in one block of replicated responses, about 32 MB
EXTREME = 0.005  # a p-value this close to 0 or 1 is worth a word: 1 % a statistic, both sides together
FAR = 6  # sds from the mean of the replications, where they are too few for such a p-value
BINS = 30


@dataclass(frozen=True)
class StatisticCheck:
    """One statistic of the response: observed, replicated (mean and sd over draws), and `p = P(replicated >= observed)`
    with ties counted half, so that a statistic without spread (the largest of many zeros and ones) is 0.5, not 1.
    """

    name: str
    observed: float
    mean: float
    sd: float
    p: float
    replications: int

    @property
    def extreme(self) -> bool:
        """Whether p is within 0.005 of 0 or 1 beyond what few replications can tell, or the observed one far off."""
        cautious = (self.p * self.replications + 1) / (self.replications + 2)
        far = abs(self.observed - self.mean) > FAR * self.sd + 1e-9 * (1 + abs(self.observed))
        return far or not EXTREME <= cautious <= 1 - EXTREME


@dataclass(frozen=True)
class PredictiveCheck:
    """The statistics, and histograms to draw: share of the response in each bin, observed, and the 5 %, 50 % and 95 %
    quantiles of the replicated share (all `(b,)`, `edges (b+1,)`; the outer bins catch what lies beyond them).
    """

    statistics: tuple[StatisticCheck, ...]
    replications: int
    non_finite: int
    edges: Float64[Tensor, " b1"]
    observed: Float64[Tensor, " b"]
    low: Float64[Tensor, " b"]
    middle: Float64[Tensor, " b"]
    high: Float64[Tensor, " b"]

    @property
    def extremes(self) -> tuple[StatisticCheck, ...]:
        """The statistics that the fitted model does not reproduce."""
        return tuple(check for check in self.statistics if check.extreme)


def check_predictive(
    z: Batch,
    observed: Float[Tensor, " N"],
    simulate: Callable[[Batch, torch.Generator], Float[Tensor, "n N"]],
    generator: torch.Generator,
    limit: int = 1000,
) -> PredictiveCheck:
    """Compare the observed response with one replicated at each of the first `limit` draws (corrected draws, please).

    Statistics: mean, sd, min, max, and for counts (whole numbers from 0, observed and replicated, not just 0 and 1) the
    share of zeros.
    Replications with NaN or infinity are left out and counted. Memory stays near 32 MB whatever N. Raises RunError if
    no replication is finite.
    """
    y = observed.double()
    counts = bool(((y >= 0) & (y == y.round())).all()) and bool((y > 1).any())
    edges = _edges(y, counts)
    z = z[:limit]
    block = max(1, CELLS // max(1, len(y)))
    statistics: list[Tensor] = []
    shares: list[Tensor] = []
    for rows in z.split(block):
        replicated = simulate(rows, generator).double()
        replicated = replicated[replicated.isfinite().all(1)]
        if len(replicated):
            counts = counts and bool((replicated == replicated.round()).all())
            statistics.append(_statistics(replicated))
            shares.append(_shares(replicated, edges))
    if not statistics:
        raise RunError("no response that the fitted model draws is finite: the fit is off, or the model overflows")
    found = torch.cat(statistics)
    truth = _statistics(y[None])[0]
    names = ("mean", "sd", "min", "max", *(["zeros"] if counts else []))
    checks = tuple(_check(name, truth[j], found[:, j]) for j, name in enumerate(names))
    low, middle, high = torch.cat(shares).quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), 0)
    missing = len(z) - len(found)
    return PredictiveCheck(checks, len(found), missing, edges, _shares(y[None], edges)[0], low, middle, high)


@dataclass(frozen=True)
class LeaveOneOut:
    """Expected log predictive density of new data: `elpd`, its standard error over observations, the effective number
    of parameters, and k-hat of each observation `(N,)`: above 0.7 an observation moves the posterior too much for
    `elpd` to be relied on.
    """

    elpd: float
    se: float
    parameters: float
    khat: Float64[Tensor, " N"]

    @property
    def unreliable(self) -> int:
        """How many observations have k-hat above 0.7."""
        return int((self.khat > 0.7).sum())


def leave_one_out(
    log_likelihood: Float64[Tensor, "n N"], log_weight: Float64[Tensor, " n"] | None = None
) -> LeaveOneOut:
    """PSIS-LOO from pointwise log likelihoods at n posterior draws, weighted by `log_weight` if given.

    About 0.5 ms an observation. Raises RunError where an observation's ratios are all zero or not a number.
    """
    log_likelihood = log_likelihood.detach().double()
    base = torch.zeros(len(log_likelihood), dtype=torch.float64) if log_weight is None else log_weight.double()
    base = base - base.logsumexp(0)
    pointwise, khat = [], []
    for column in log_likelihood.T:
        smoothed = smooth_weights(base - column)
        pointwise.append(float((smoothed.log_weight + column).logsumexp(0)))
        khat.append(smoothed.khat)
    elpd = torch.tensor(pointwise, dtype=torch.float64)
    with_all = (base[:, None] + log_likelihood).logsumexp(0)
    total = float(elpd.sum())
    se = math.sqrt(len(elpd)) * float(elpd.std()) if len(elpd) > 1 else math.nan
    return LeaveOneOut(total, se, float(with_all.sum()) - total, torch.tensor(khat, dtype=torch.float64))


def _statistics(y: Float64[Tensor, "n N"]) -> Float64[Tensor, "n s"]:
    return torch.stack([y.mean(1), y.std(1, correction=0), y.amin(1), y.amax(1), (y == 0).double().mean(1)], 1)


def _check(name: str, truth: Float64[Tensor, ""], found: Float64[Tensor, " n"]) -> StatisticCheck:
    # sums in another order may differ in the last bits: ties, not signs of anything
    tie = (found - truth).abs() <= 1e-12 * (1 + truth.abs())
    p = float(((found > truth) & ~tie).double().mean() + 0.5 * tie.double().mean())
    return StatisticCheck(name, float(truth), float(found.mean()), float(found.std(correction=0)), p, len(found))


def _edges(y: Float64[Tensor, " N"], counts: bool) -> Float64[Tensor, " b1"]:
    """Edges of up to 30 bins over the observed range and a tenth more; whole bins around whole numbers."""
    low, high = float(y.min()), float(y.max())
    whole = counts or bool((y == y.round()).all() and high - low < BINS)
    if whole:
        width = max(1, math.ceil((high - low + 1) / BINS))
        return torch.arange(low - 0.5, high + width + 0.5, width, dtype=torch.float64)
    margin = 0.1 * (high - low) or max(1.0, abs(low))
    return torch.linspace(low - margin, high + margin, BINS + 1, dtype=torch.float64)


def _shares(y: Float64[Tensor, "n N"], edges: Float64[Tensor, " b1"]) -> Float64[Tensor, "n b"]:
    bins = len(edges) - 1
    place = torch.bucketize(y, edges[1:-1], right=True) + bins * torch.arange(len(y))[:, None]
    return torch.bincount(place.flatten(), minlength=bins * len(y)).reshape(len(y), bins).double() / y.shape[1]

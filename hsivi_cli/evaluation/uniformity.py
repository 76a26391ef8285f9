"""Are ranks uniform? An exact test on their distribution function, and the band to draw around it.

After Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity" (Statistics and Computing 32, 2022,
arXiv 2103.10522): at each point the count of ranks below it is binomial; the band is wide enough that all counts stay
inside together with the given probability. They walk along the points to find it; here the walk is made of Poisson
steps, conditioned on their sum, which is the same law with one kernel for every step.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64, Int64
from scipy.special import bdtr, bdtrc, chdtrc, gammaln

TESTS = 2  # the two tests below, Bonferroni


@dataclass(frozen=True)
class Uniformity:
    """Tests of R ranks among 0 .. L: `p` is Bonferroni's of the distribution function's (exact) and chi-square's.

    `deviation` is the largest distance of the ranks' distribution function from the diagonal.
    """

    p: float
    p_ecdf: float
    p_histogram: float
    deviation: float


def uniformity(ranks: Int64[np.ndarray, " R"], draws: int) -> Uniformity:
    """Test R ranks among 0 .. `draws`; under uniformity `p` is at most a with probability at most a."""
    replications = len(ranks)
    below = np.bincount(ranks, minlength=draws + 1).cumsum()[:-1]
    points = np.arange(1, draws + 1) / (draws + 1)
    p_ecdf = _ecdf_p(below, replications)
    p_histogram = _histogram_p(ranks, draws)
    deviation = float(np.abs(below / replications - points).max())
    return Uniformity(min(1.0, TESTS * min(p_ecdf, p_histogram)), p_ecdf, p_histogram, deviation)


def simultaneous_band(
    replications: int, draws: int, level: float = 0.95
) -> tuple[Float64[np.ndarray, " L"], Float64[np.ndarray, " L"], Float64[np.ndarray, " L"]]:
    """Points (1 .. L)/(L+1) and the lowest and highest values there of the distribution function of uniform ranks,
    all of which hold together with probability `level` or a little more.
    """
    points = np.arange(1, draws + 1) / (draws + 1)
    low, high = 0.0, 1 - level  # the pointwise tail lies between: no smaller than a share of, no larger than, 1 - level
    for _ in range(25):
        middle = (low + high) / 2
        inside = _inside_probability(*_bounds(draws, replications, middle), replications)
        low, high = (middle, high) if inside >= level else (low, middle)
    lower, upper = _bounds(draws, replications, low)
    return points, lower / replications, upper / replications


def holm(p: Float64[np.ndarray, " p"]) -> Float64[np.ndarray, " p"]:
    """p-values adjusted for their number (Holm 1979), valid whatever their dependence."""
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    found = np.empty(len(p))
    found[order] = adjusted
    return found


@lru_cache(maxsize=4)
def _two_sided(draws: int, n: int) -> Float64[np.ndarray, "L n1"]:
    """Twice the smaller binomial tail of every count 0 .. n at every point."""
    points, counts = np.arange(1, draws + 1)[:, None] / (draws + 1), np.arange(n + 1.0)[None]
    below, above = bdtr(counts, n, points), np.ones((draws, n + 1))
    above[:, 1:] = bdtrc(counts[:, :-1], n, points)
    return 2 * np.minimum(below, above)


def _ecdf_p(below: Int64[np.ndarray, " L"], n: int) -> float:
    """P(the smallest pointwise p-value of uniform ranks is as small as this one), exactly."""
    smallest = float(_two_sided(len(below), n)[np.arange(len(below)), below].min())
    return float(np.clip(1 - _inside_probability(*_bounds(len(below), n, smallest), n), 0, 1))


def _bounds(draws: int, n: int, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """At each point the smallest and largest count whose two-sided p-value exceeds `tail` (empty: 1, 0)."""
    inside = _two_sided(draws, n) > tail * (1 + 1e-9)  # equal but for rounding, as mirror images are, is not more
    some = inside.any(1)
    return np.where(some, inside.argmax(1), 1), np.where(some, n - inside[:, ::-1].argmax(1), 0)


def _inside_probability(lower: np.ndarray, upper: np.ndarray, n: int) -> float:
    """P(lower <= counts <= upper at every point) for n uniform ranks among len(lower) + 1 values."""
    if (lower > upper).any():
        return 0.0
    counts = np.arange(n + 1)
    rate = n / (len(lower) + 1)
    log_step = counts * math.log(rate) - rate - gammaln(counts + 1)
    step = np.exp(log_step)
    walk = np.zeros(n + 1)
    walk[0] = 1.0
    for low, high in zip([*lower, n], [*upper, n], strict=True):
        walk = np.convolve(walk, step)[: n + 1]
        walk[:low] = 0
        walk[high + 1 :] = 0
    return float(walk[n] / math.exp(n * math.log(n) - n - gammaln(n + 1)))


def _histogram_p(ranks: Int64[np.ndarray, " R"], draws: int) -> float:
    """Chi-square of the ranks in up to 20 bins, 5 or more expected in each; bins hold whole ranks, so may differ."""
    bins = min(20, draws + 1, len(ranks) // 5)
    if bins < 2:
        return 1.0
    edges = np.round(np.linspace(0, draws + 1, bins + 1)).astype(int)
    expected = np.diff(edges) / (draws + 1) * len(ranks)
    observed = np.bincount(np.searchsorted(edges[1:], ranks, side="right"), minlength=bins)
    return float(chdtrc(bins - 1, float(((observed - expected) ** 2 / expected).sum())))

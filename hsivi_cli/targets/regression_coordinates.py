"""Coordinates in which a regression's coefficients are near independent and of order one, whatever the data's units.

Any affine coordinates give the same posterior, so a rough fit will do: penalised iteratively reweighted least squares
(McCullagh and Nelder, section 2.5) on a sample of the rows; its precision `R'R` gives `coefficients = centre + R^-1 z`.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.linalg import solve_triangular

from hsivi_cli.targets.coordinates import Coordinates, positive_rate
from hsivi_cli.targets.families import Family
from hsivi_cli.targets.formula import Design
from hsivi_cli.targets.prior_choice import ChosenPriors, ResponseScale
from hsivi_cli.targets.triangle import triangle

_SAMPLE = 20_000
_ITERATIONS = 12
_MOST_ETA = 30.0


@dataclass(frozen=True)
class CoefficientMap:
    """With h = coordinates.map(z).x: eta = base + matrix h (offset included), theta = start + slope h, and the prior is
    on `prior_start + prior_slope h`; theta = (Intercept), coefficients. `log_det` is the log determinant of `slope`.

    `residual` estimates the sd of the response about its linear predictor, on that scale.
    """

    matrix: Float64[np.ndarray, "N k"]
    base: Float64[np.ndarray, " N"]
    start: Float64[np.ndarray, " k"]
    slope: Float64[np.ndarray, "k k"]
    prior_start: Float64[np.ndarray, " k"]
    prior_slope: Float64[np.ndarray, "k k"]
    log_det: float
    coordinates: Coordinates
    residual: float


def coefficient_map(
    X: Float64[np.ndarray, "N k"], design: Design, family: Family, priors: ChosenPriors, scale: ResponseScale
) -> CoefficientMap:
    """Whitening coordinates of the coefficients whose prior allows all real numbers; others keep their own axes.

    `X` has the column of ones, if any.
    """
    k = X.shape[1]
    linear = np.array([prior.real for prior in priors.coefficients], bool).reshape(k)
    # eta = intercept at the means + (X - means) b, unless the raw intercept is bounded or there is none
    centring = np.eye(k)
    if design.intercept and linear[0]:
        centring[0, 1:] = -design.X.mean(0)
    largest = np.maximum(np.abs(X.max(0, initial=0.0)), np.abs(X.min(0, initial=0.0)))
    if k:
        X = X + X[:, :1] * (centring[:1] - np.eye(1, k))  # = X @ centring, without a product over all rows
    spread = np.sqrt(np.einsum("ij,ij->j", X, X) / len(X))
    spread[spread <= 1e-12 * largest] = 1.0
    to_prior = np.eye(k) if priors.centred else centring  # priors.centred: on the intercept at the means

    fitted, R, residual = _rough_fit(
        X[:, linear] / spread[linear], design, family, priors, scale, to_prior[:, linear] / spread[linear]
    )
    inner = np.zeros((k, k))
    inverse = solve_triangular(R, np.eye(len(R))) if len(R) else R
    inner[np.ix_(linear, linear)] = inverse / spread[linear][:, None]
    inner[~linear, ~linear] = 1.0
    start = np.zeros(k)
    start[linear] = fitted / spread[linear]
    log_det = -float(np.log(np.abs(np.diag(R))).sum() + np.log(spread[linear]).sum())
    bounds = [(p.lower, p.upper) for p in priors.coefficients]
    coordinates = Coordinates(
        [low for low, _ in bounds],
        [high for _, high in bounds],
        [1.0 if free else float(scale.spread / s) for free, s in zip(linear, spread, strict=True)],
        [1.0 if free else 0.5 for free in linear],
    )
    return CoefficientMap(
        X @ inner, design.offset + X @ start, centring @ start, centring @ inner,
        to_prior @ start, to_prior @ inner, log_det, coordinates, residual,
    )  # fmt: skip


def aux_coordinates(
    family: Family, design: Design, priors: ChosenPriors, scale: ResponseScale, residual: float
) -> Coordinates:
    """Coordinates of `sigma`, `nu`, `shape`: logarithms about a rough estimate, in units of its uncertainty."""
    rows = len(design.y)
    mean, variance = float(design.y.mean()), float(design.y.var())
    excess = variance - mean
    units = {
        "sigma": residual,
        "nu": 10.0,
        "shape": min(max(mean**2 / excess, 0.1), 100.0) if excess > 0 else 100.0,
    }
    rates = {"sigma": positive_rate(rows), "nu": 0.5, "shape": max(positive_rate(rows), 0.1)}
    return Coordinates(
        [prior.lower for prior in priors.aux], [prior.upper for prior in priors.aux],
        [units[name] for name in family.aux], [rates[name] for name in family.aux],
    )  # fmt: skip


def _rough_fit(
    X: np.ndarray, design: Design, family: Family, priors: ChosenPriors, scale: ResponseScale, to_prior: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients on the columns of X, the triangular root R of their precision, and the residual sd."""
    rows, k = X.shape
    step = max(1, -(-rows // _SAMPLE))
    X, y, offset = X[::step], design.y[::step], design.offset[::step]
    trials = np.ones_like(y) if design.trials is None else design.trials[::step]
    weight_of_sample = rows / len(y)
    widths = [
        prior.arguments[-1] if prior.name in ("normal", "student_t", "cauchy") else math.inf
        for prior in priors.coefficients
    ]
    centres = [
        prior.arguments[-2] if math.isfinite(w) else 0.0 for prior, w in zip(priors.coefficients, widths, strict=True)
    ]
    roots = 1 / np.array(widths).reshape(-1)
    # a trace of ridge keeps R regular where neither data nor priors say anything in the sample
    penalty = np.concatenate([roots[:, None] * to_prior, 1e-4 / scale.spread * np.eye(k)])
    target = np.concatenate([roots * np.array(centres), np.zeros(k)])
    sigma = scale.spread
    mean = (y + 0.5) / (trials + 1) if family.link == "logit" else y + 0.5 * (y < 0.5)
    eta = np.log(mean / (1 - mean)) if family.link == "logit" else np.log(mean) if family.link == "log" else y
    beta, R = np.zeros(k), np.eye(k)
    for _ in range(_ITERATIONS):
        if family.link == "logit":
            p = 1 / (1 + np.exp(-eta))
            weight = np.maximum(trials * p * (1 - p), 1e-8)
            work = eta - offset + (y - trials * p) / weight
        elif family.link == "log":
            rate = np.exp(eta)
            weight = rate / (1 + rate) if family.name == "negative-binomial" else rate
            weight = np.maximum(weight, 1e-8)
            work = eta - offset + (y - rate) / np.maximum(rate, 1e-8)
        else:
            weight, work = np.full(len(y), 1 / sigma**2), y - offset
        root = np.sqrt(weight * weight_of_sample)
        stacked = np.concatenate([root[:, None] * X, penalty])
        factor = triangle(np.concatenate([stacked, np.concatenate([root * work, target])[:, None]], 1))
        R = factor[:k, :k]
        update = solve_triangular(R, factor[:k, k]) if k else beta
        change = float(np.abs(R @ (update - beta)).max(initial=0.0))
        beta = update
        eta = np.clip(offset + X @ beta, -_MOST_ETA, _MOST_ETA) if family.link != "identity" else offset + X @ beta
        if family.link == "identity":
            fresh = float(np.sqrt(((y - eta) ** 2).sum() / max(len(y) - k, 1)))
            fresh = max(fresh, 1e-6 * scale.spread) if len(y) > k else scale.spread
            change, sigma = max(change, abs(math.log(fresh / sigma))), fresh
        if change < 1e-3:
            break
    if not (np.isfinite(beta).all() and np.isfinite(R).all()):
        beta, R = np.zeros(k), np.eye(k) * math.sqrt(rows) / scale.spread
    return beta, R, sigma

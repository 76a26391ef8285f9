"""The Frechet distance between Gaussians, by symmetric eigendecompositions in float64."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Moments:
    """Mean `(d,)` and covariance `(d, d)` of features, float64."""

    mu: Float[np.ndarray, " d"]
    sigma: Float[np.ndarray, "d d"]


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Mean and unbiased covariance of feature rows, summed in float64; n must be at least 2."""
    rows = np.asarray(features, np.float64)
    return Moments(rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet_distance(
    mu1: Float[np.ndarray, " d"],
    sigma1: Float[np.ndarray, "d d"],
    mu2: Float[np.ndarray, " d"],
    sigma2: Float[np.ndarray, "d d"],
) -> float:
    """Squared distance `|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))` (Dowson and Landau, 1982).

    `tr (sigma1 sigma2)^(1/2)` is the sum of the square roots of the eigenvalues of the symmetric `L' sigma2 L`, where
    `sigma1 = L L'` has as many columns as sigma1 has rank. This is several times faster than the eigenvalues of the
    non-symmetric product, and covariances of fewer samples than features need no regularisation.
    Negative eigenvalues of the size of rounding errors count as zero.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh((sigma1 + sigma1.T) / 2)
    # directions that hold rounding errors only: their square roots (1e-8) would add up over thousands of features
    kept = values > len(values) * EPS * max(values[-1], 0.0)
    factor = vectors[:, kept] * np.sqrt(values[kept])
    product = factor.T @ sigma2 @ factor
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum() if kept.any() else 0.0
    difference = mu1 - mu2
    return max(float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * roots), 0.0)

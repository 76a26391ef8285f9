"""The Frechet distance: closed forms, invariances, and agreement with torch-fidelity."""

import numpy as np
import pytest
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from hsivi_cli.evaluation.frechet import frechet_distance, moments


def random_moments(rng: np.random.Generator, n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    found = moments(rng.normal(size=(n, d)) * rng.uniform(0.1, 3, d) + rng.normal(size=d))
    return found.mu, found.sigma


def theirs(mu1, sigma1, mu2, sigma2) -> float:
    return fid_statistics_to_metric({"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}, False)[KEY_METRIC_FID]


def test_closed_form_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    mu1, mu2, std1, std2 = rng.normal(size=(4, 20))
    expected = ((mu1 - mu2) ** 2).sum() + ((abs(std1) - abs(std2)) ** 2).sum()
    assert frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("n1", "n2", "d"), [(500, 300, 1), (500, 300, 16), (500, 400, 64), (200, 30, 64), (20, 200, 64)]
)
def test_agrees_with_torch_fidelity(n1, n2, d):
    rng = np.random.default_rng(d + n1)
    ours = (*random_moments(rng, n1, d), *random_moments(rng, n2, d))
    assert frechet_distance(*ours) == pytest.approx(theirs(*ours), rel=1e-6)


def test_two_rank_deficient_covariances():
    """Both factors are known here, so the exact value is their nuclear norm, whatever the rank."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(100, 12)), rng.normal(size=(100, 30))
    exact = (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    zero = np.zeros(100)
    assert frechet_distance(zero, a @ a.T, zero, b @ b.T) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(zero, b @ b.T, zero, a @ a.T) == pytest.approx(exact, rel=1e-7)
    assert theirs(zero, a @ a.T, zero, b @ b.T) == pytest.approx(exact, rel=1e-5)


def test_properties():
    rng = np.random.default_rng(2)
    first, second = random_moments(rng, 200, 24), random_moments(rng, 200, 24)
    value = frechet_distance(*first, *second)
    assert value > 0.1
    assert frechet_distance(*second, *first) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(*first, *first) < 1e-9 * np.trace(first[1])
    rotation = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    turned = [(rotation @ mu, rotation @ sigma @ rotation.T) for mu, sigma in (first, second)]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(value, rel=1e-10)
    scaled = [(3 * mu, 9 * sigma) for mu, sigma in (first, second)]
    assert frechet_distance(*scaled[0], *scaled[1]) == pytest.approx(9 * value, rel=1e-10)


def test_a_point_and_float32():
    mu = np.arange(3.0)
    assert frechet_distance(mu, np.zeros((3, 3)), mu, np.eye(3)) == pytest.approx(3)
    assert frechet_distance(mu, np.eye(3), mu + 1, np.zeros((3, 3))) == pytest.approx(6)
    assert isinstance(frechet_distance(*(np.float32(a) for a in (mu, np.eye(3), mu, np.eye(3)))), float)


def test_rounding_errors_below_zero_are_clamped():
    sigma = np.diag([1.0, 0.5, -1e-17])
    assert frechet_distance(np.zeros(3), sigma, np.zeros(3), sigma) == pytest.approx(0, abs=1e-12)

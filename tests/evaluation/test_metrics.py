"""Metrics: they tell noise from digits, know the identical, and say when they cannot be had."""

import numpy as np
import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation import metrics
from hsivi_cli.evaluation.extractors import Extractor, load_extractor
from hsivi_cli.evaluation.metrics import Features, compute_metrics, extract_features, has_statistics, read_statistics
from hsivi_cli.evaluation.reference import fid_against
from hsivi_cli.evaluation.report import evaluation_report
from hsivi_cli.io.files import asset
from hsivi_cli.io.images import image_set, read_images


@pytest.fixture(scope="module")
def digits() -> Extractor:
    return load_extractor("digits")


@pytest.fixture(scope="module")
def halves(digits) -> tuple[Features, Features, Features]:
    """Features of every other scikit-learn digit, of the next ones, and of uniform noise."""
    images = read_images("digits", 1200).images
    noise = np.random.default_rng(0).integers(0, 256, images[::2].shape, dtype=np.uint8)
    first, second, third = (extract_features(image_set(a, "a"), digits) for a in (images[::2], images[1::2], noise))
    return first, second, third


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSETS", 5)


def values(samples, reference) -> dict[str, float]:
    return {estimate.name: estimate.value for estimate in compute_metrics(samples, reference)}


def gaussian(n: int, seed: int, shift: float = 0.0) -> Features:
    rows = np.random.default_rng(seed).normal(shift, 1, (n, 8)).astype(np.float32)
    return Features(torch.from_numpy(rows), None, f"gaussian {seed}", str(seed))


def test_halves_are_close_and_noise_is_far(halves):
    first, second, noise = halves
    close, far = values(first, second), values(noise, second)
    assert 0 < close["fid"] < far["fid"] / 50
    assert abs(close["kid"]) < far["kid"] / 50
    assert min(close["precision"], close["recall"]) > 0.8
    assert far["precision"] < 0.1


def test_inception_score_counts_confident_classes():
    sure = 20 * torch.eye(10).repeat(50, 1)
    # below 10, since a split of 50 does not hold five of every class
    assert 8.5 < metrics.isc(sure, 500)[0].value < 10
    assert metrics.isc(torch.zeros(500, 10), 500)[0].value == pytest.approx(1)
    assert metrics.isc(sure * torch.inf, 500)[0].value is None


def test_identical_sets(halves):
    first = halves[0]
    found = values(first, first)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1.0, 1.0)


def test_precision_and_recall_are_not_swapped():
    """Samples that cover half of two clusters are all plausible (precision 1) but miss the other half (recall 1/2)."""
    rng = np.random.default_rng(0)
    cluster = rng.normal(size=(400, 8)).astype(np.float32)
    reference = np.concatenate([cluster[:200], cluster[200:] + 100])
    found = values(
        Features(torch.from_numpy(rng.normal(size=(200, 8)).astype(np.float32)), None, "a", "a"),
        Features(torch.from_numpy(reference), None, "b", "b"),
    )
    assert found["precision"] > 0.85
    assert found["recall"] == pytest.approx(0.47, abs=0.06)


def test_names_carry_n_and_subsamples_say_so(monkeypatch):
    monkeypatch.setattr(metrics, "PRC_LIMIT", 50)
    monkeypatch.setattr(metrics, "KID_LIMIT", 80)
    found = {estimate.key: estimate for estimate in compute_metrics(gaussian(120, 0), gaussian(100, 1))}
    assert {"fid@120", "kid@80", "kid_std@80", "isc@120", "precision@50", "recall@50"} <= found.keys()
    assert "50 samples against 50" in found["precision@50"].note
    assert "subsets of 80, from 80 samples" in found["kid@80"].note
    assert found["isc@120"].value is None
    again = {estimate.key: estimate for estimate in compute_metrics(gaussian(120, 0), gaussian(100, 1))}
    assert found == again


def test_subsample_is_spread_over_the_whole():
    rows = metrics.subsample(torch.arange(1000.0)[:, None], 100)[:, 0]
    assert len(rows) == len(rows.unique()) == 100
    assert 400 < rows.mean() < 600


def test_few_images():
    found = {estimate.name: estimate for estimate in compute_metrics(gaussian(3, 0), gaussian(100, 1))}
    assert found["fid"].value is not None
    assert (found["precision"].value, found["precision"].note) == (None, "too few images")
    with pytest.raises(InputError, match="at least two"):
        compute_metrics(gaussian(1, 0), gaussian(100, 1))


def test_statistics_give_the_same_fid(tmp_path):
    samples, reference = gaussian(200, 0), gaussian(300, 1, shift=0.5)
    known = reference.moments
    np.savez(tmp_path / "a.npz", mu=known.mu.astype(np.float32), sigma=known.sigma)
    assert has_statistics(str(tmp_path / "a.npz"))
    found = {e.name: e for e in compute_metrics(samples, read_statistics(tmp_path / "a.npz"))}
    assert found["fid"].value == pytest.approx(values(samples, reference)["fid"], rel=1e-5)
    assert found["kid"].value is None
    assert "mean and covariance only" in found["recall"].note


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.zeros((2, 2)), "sigma": np.eye(2)}, "not \\(d,\\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "not \\(d,\\)"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "NaN"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "symmetric"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "no statistics"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "never unpickled"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((4, 3))}, "features"),
        ({"arr_0": np.zeros(2)}, "no statistics"),
    ],
)
def test_bad_statistics(tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=says):
        read_statistics(tmp_path / "bad.npz")


def test_truncated_statistics(tmp_path):
    whole = asset("digit_features/reference_28x28.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut"):
        read_statistics(tmp_path / "cut.npz")


def test_statistics_of_unknown_origin_are_warned_about(tmp_path, digits, halves):
    known = halves[1].moments
    for fields, warned in (({}, True), ({"extractor_sha256": digits.sha256}, False)):
        np.savez(tmp_path / "a.npz", mu=known.mu, sigma=known.sigma, **fields)
        report = evaluation_report(halves[0], read_statistics(tmp_path / "a.npz"), digits)
        assert any("which extractor" in warning for warning in report.warnings) == warned


def test_running_out_of_memory_is_not_the_images_fault(digits):
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 9 bytes")):

        def full(batch, error=error):
            raise error

        with pytest.raises(type(error), match="memory"):
            extract_features(read_images("digits", 4), Extractor("full", full, "", None, ""))


def test_a_meter_says_what_it_measures(digits):
    meter = fid_against("digits", (8, 8, 1))
    assert (meter.extractor_sha256, meter.reference_sha256) == (digits.sha256, read_images("digits").sha256)
    assert meter(read_images("digits", 900).images) < meter(255 - read_images("digits", 900).images)
    shipped = fid_against("digits", (28, 28, 1))
    assert shipped.reference_sha256 == read_statistics(asset("digit_features/reference_28x28.npz")).sha256


def test_dimensions_must_agree(digits):
    with pytest.raises(InputError, match="8 features"):
        compute_metrics(extract_features(read_images("digits", 20), digits), gaussian(100, 1))


def test_shipped_reference_belongs_to_the_shipped_extractor(digits):
    reference = read_statistics(asset("digit_features/reference_28x28.npz"))
    assert reference.extractor_sha256 == digits.sha256
    assert (reference.n, reference.image_shape) == (60_000, (28, 28, 1))
    assert reference.features is not None
    subset = Features(reference.features, None, "first 5,000", "")
    # the distance that 5,000 real digits have is the floor of every FID of 5,000 samples
    assert metrics.fid(subset, reference.moments).value < 0.01 * np.trace(reference.moments.sigma)


def test_report_states_the_protocol(digits, halves):
    report = evaluation_report(halves[0], halves[1], digits, {"seed": 3, "nfe": 10})
    plain = report.to_json()
    assert plain["metrics"]["fid@600"] == report.fid.value
    assert plain["protocol"]["n"] == 600
    assert plain["protocol"]["samples"]["nfe"] == 10
    assert plain["protocol"]["reference"]["n"] == 600
    assert plain["protocol"]["features"]["weights_sha256"] == digits.sha256
    assert {"hsivi", "torch", "torch-fidelity"} <= plain["protocol"]["versions"].keys()
    assert any("50000" in warning for warning in plain["warnings"])
    assert any("same images" in w for w in evaluation_report(halves[0], halves[0], digits).warnings)

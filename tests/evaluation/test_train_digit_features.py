"""How the extractor was trained, on a handful of digits."""

import gzip
import struct

import numpy as np

from hsivi_cli.evaluation import train_digit_features as script
from hsivi_cli.evaluation.extractors import load_digit_classifier
from hsivi_cli.evaluation.metrics import read_statistics


def fake_mnist(directory, count: int) -> None:
    """Digits that are told apart by the row of a bright bar, in MNIST's files."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    images = rng.integers(0, 40, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 3 : 2 * label + 6, 4:24] = 255
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            (directory / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data))


def test_writes_weights_and_statistics(tmp_path):
    fake_mnist(tmp_path, 130)
    for name in ("first", "second"):
        assert 0 <= script.train_and_write(tmp_path, tmp_path / name, script.Recipe(epochs=1)) <= 1
    weights = [(tmp_path / name / script.WEIGHTS).read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1], "one seed, one extractor"
    model = load_digit_classifier(tmp_path / "first" / script.WEIGHTS)
    data = script.load_mnist(tmp_path, "train")
    features = script.all_features(model, data.images)
    np.testing.assert_allclose(np.square(features).mean(), 1, rtol=1e-3)
    statistics = read_statistics(tmp_path / "first" / script.REFERENCE)
    np.testing.assert_allclose(statistics.moments.mu, features.mean(0), rtol=1e-4, atol=1e-5)
    assert (statistics.n, statistics.image_shape) == (130, (28, 28, 1))


def test_it_learns(tmp_path):
    fake_mnist(tmp_path, 200)
    data = script.load_mnist(tmp_path, "train")
    model = script.train_classifier(data, script.Recipe(epochs=6, batch_size=25, shift=0.5, rotation=2, zoom=0.02))
    assert script.accuracy(model, data) > 0.4

"""Extractors: torch-fidelity accepts ours, and nothing but the known weights is opened."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation import extractors
from hsivi_cli.evaluation.extractors import load_extractor
from hsivi_cli.evaluation.metrics import extract_features
from hsivi_cli.io.images import image_set


class Flatten(torch.nn.Module):
    def forward(self, x):
        return x.float().flatten(1)


class WithLogits(torch.nn.Module):
    def forward(self, x):
        flat = x.float().flatten(1)
        return flat[:, :5], flat[:, :3]


class Broken(torch.nn.Module):
    def forward(self, x):
        return x.float() / 0


def script(module: torch.nn.Module, path: Path) -> str:
    torch.jit.save(torch.jit.script(module), str(path))
    return str(path)


@pytest.fixture
def grey():
    return image_set(np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8), "noise")


def test_digits_is_a_torch_fidelity_extractor(grey):
    assert extractors.DIGITS in FEATURE_EXTRACTORS_REGISTRY
    module = create_feature_extractor(extractors.DIGITS, ["logits", "64"], cuda=False, verbose=False)
    logits, features = module(torch.from_numpy(grey.images).permute(0, 3, 1, 2))
    assert (logits.shape, features.shape) == ((7, 10), (7, 64))
    found = extract_features(grey, load_extractor("digits"))
    torch.testing.assert_close(found.features, features)
    assert found.logits is not None
    torch.testing.assert_close(found.logits, logits)
    assert sum(p.numel() for p in module.parameters()) < 150_000


def test_digit_features_ignore_batches_and_colour(grey):
    extractor = load_extractor("digits")
    whole = extract_features(grey, extractor).features
    torch.testing.assert_close(extract_features(grey, extractor, batch_size=2).features, whole, rtol=1e-4, atol=1e-5)
    rgb = image_set(np.repeat(grey.images, 3, axis=3), "rgb")
    torch.testing.assert_close(extract_features(rgb, extractor).features, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8, 32, 56])
def test_digit_features_resize(size):
    images = np.random.default_rng(0).integers(0, 256, (3, size, size), dtype=np.uint8)
    assert extract_features(image_set(images, "a"), load_extractor("digits")).features.shape == (3, 64)


def test_torchscript(tmp_path, grey):
    found = extract_features(grey, load_extractor(script(Flatten(), tmp_path / "a.pt")))
    assert found.features.shape == (7, 784)
    assert found.logits is None
    found = extract_features(grey, load_extractor(script(WithLogits(), tmp_path / "b.ts")))
    assert found.features.shape == (7, 5)
    assert found.logits is not None


def test_bad_torchscript(tmp_path, grey):
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "tensors.pt")
    for name in ("pickle.pt", "tensors.pt"):
        with pytest.raises(InputError, match="no TorchScript"):
            load_extractor(str(tmp_path / name))
    with pytest.raises(InputError, match="does not exist"):
        load_extractor(str(tmp_path / "missing.pt"))
    with pytest.raises(InputError, match="unknown"):
        load_extractor("incepton")
    with pytest.raises(InputError, match="not features"):
        extract_features(grey, load_extractor(script(Broken(), tmp_path / "broken.pt")))
    with pytest.raises(InputError, match="cannot take images"):
        extract_features(grey, load_extractor(script(torch.nn.Conv2d(3, 1, 1), tmp_path / "conv.pt")))


def test_inception_is_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.delenv(extractors.INCEPTION_VARIABLE, raising=False)
    with pytest.raises(InputError, match="nothing is downloaded"):
        load_extractor("inception")
    with pytest.raises(InputError, match="does not exist"):
        load_extractor("inception", tmp_path / "missing.pth")
    (tmp_path / "other.pth").write_bytes(b"hello")
    monkeypatch.setenv(extractors.INCEPTION_VARIABLE, str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="sha256 begins with 2cf24dba"):
        load_extractor("inception")
    with pytest.raises(InputError, match="--weights goes with"):
        load_extractor("digits", tmp_path / "other.pth")


def test_inception_file_is_not_unpickled(tmp_path, monkeypatch):
    """Even under the right hash, anything but tensors is refused."""
    path = tmp_path / "hostile.pth"
    torch.save({"a": Path("somewhere")}, path)
    monkeypatch.setattr(extractors, "sha256", lambda _: extractors.INCEPTION_SHA256)
    with pytest.raises(InputError, match="more than tensors"):
        load_extractor("inception", path)


def test_damaged_digit_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(InputError, match="no weights"):
        extractors.load_digit_classifier(tmp_path / "a.safetensors")


@pytest.mark.inception
def test_inception(grey):
    import os

    if not os.environ.get(extractors.INCEPTION_VARIABLE):
        pytest.skip("no Inception weights")
    assert extract_features(grey, load_extractor("inception")).features.shape == (7, 2048)

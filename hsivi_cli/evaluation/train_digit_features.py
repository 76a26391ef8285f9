"""How the shipped digit feature extractor and the reference statistics of the MNIST training images were made.

`train_and_write` does all of it; assets/digit_features/README.md shows the call.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.evaluation.frechet import moments
from hsivi_cli.io.files import atomic_file, sha256
from hsivi_cli.io.images import read_idx
from hsivi_cli.networks.digit_features import DigitClassifier, scale_pixels

WEIGHTS = "digit_features.safetensors"
REFERENCE = "reference_28x28.npz"
KEPT_FEATURES = 5_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained; the defaults are what ships."""

    epochs: int = 4
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    shift: float = 2.0  # pixels
    rotation: float = 10.0  # degrees
    zoom: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Digits:
    """MNIST images `(n, 1, 28, 28)` uint8 and labels `(n,)`."""

    images: UInt8[Tensor, "n 1 28 28"]
    labels: Int[Tensor, " n"]


def load_mnist(directory: Path, part: str) -> Digits:
    """Read the `train` or `t10k` part of MNIST from its idx files; raises InputError for missing or damaged files."""
    images = torch.from_numpy(read_idx(directory / f"{part}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(directory / f"{part}-labels-idx1-ubyte.gz").astype(np.int64))
    return Digits(images[:, None], labels)


def train_classifier(data: Digits, recipe: Recipe) -> DigitClassifier:
    """Train with AdamW and a one-cycle rate on mildly shifted, rotated and zoomed digits; logs the loss."""
    torch.manual_seed(recipe.seed)  # the layers' initial values
    model = DigitClassifier()
    steps = recipe.epochs * -(-len(data.labels) // recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps)
    random = generator(recipe.seed, Stream.TRAIN)
    started = time.perf_counter()
    for step, rows in enumerate(_batches(len(data.labels), recipe, random), 1):
        pixels = _augment(scale_pixels(data.images[rows]), recipe, random)
        logits = model(pixels).logits
        loss = nn.functional.cross_entropy(logits, data.labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            log.info("step %d/%d loss %.4f %.0f s", step, steps, loss.item(), time.perf_counter() - started)
    model.eval()
    model.scale.fill_(float(np.square(all_features(model, data.images), dtype=np.float64).mean()) ** -0.5)
    return model


@torch.no_grad()
def accuracy(model: DigitClassifier, data: Digits) -> float:
    """Share of digits classified rightly."""
    hits = 0
    for images, labels in zip(data.images.split(1000), data.labels.split(1000), strict=True):
        hits += int((model(scale_pixels(images)).logits.argmax(1) == labels).sum())
    return hits / len(data.labels)


@torch.no_grad()
def all_features(model: DigitClassifier, images: UInt8[Tensor, "n 1 28 28"]) -> Float[np.ndarray, "n 64"]:
    """Features of all images, float32."""
    return torch.cat([model(scale_pixels(part)).features for part in images.split(1000)]).numpy()


def write_weights(model: DigitClassifier, path: Path) -> None:
    """Write the classifier's weights as safetensors."""
    from safetensors.torch import save

    with atomic_file(path) as temporary:
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))


def write_reference(model: DigitClassifier, data: Digits, source: Path, weights: Path, path: Path) -> None:
    """Write mean and covariance over all images (float64), the first 5,000 rows of features, and their origin."""
    features = all_features(model, data.images)
    statistics = moments(features)
    fields: dict[str, Any] = {
        "mu": statistics.mu,
        "sigma": statistics.sigma,
        "features": features[:KEPT_FEATURES],
        "n": np.array(len(features)),
        "image_shape": np.array([28, 28, 1]),
        "source": np.array(f"MNIST training images ({source.name})"),
        "source_md5": np.array(hashlib.md5(source.read_bytes(), usedforsecurity=False).hexdigest()),
        "source_sha256": np.array(sha256(source)),
        "extractor": np.array("digits"),
        "extractor_sha256": np.array(sha256(weights)),
    }
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **fields)


def train_and_write(mnist: Path, out: Path, recipe: Recipe | None = None) -> float:
    """Train on the idx files in `mnist`, write weights and reference statistics to `out`; returns the test accuracy.

    `out` is made if it does not exist. Raises InputError for files that are missing, damaged or cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    train = load_mnist(mnist, "train")
    model = train_classifier(train, recipe or Recipe())
    found = accuracy(model, load_mnist(mnist, "t10k"))
    log.info("test accuracy %.4f", found)
    write_weights(model, out / WEIGHTS)
    write_reference(model, train, mnist / "train-images-idx3-ubyte.gz", out / WEIGHTS, out / REFERENCE)
    return found


def _batches(count: int, recipe: Recipe, random: torch.Generator) -> Iterator[Int[Tensor, " b"]]:
    for _ in range(recipe.epochs):
        yield from torch.randperm(count, generator=random).split(recipe.batch_size)


def _augment(pixels: Float[Tensor, "n 1 28 28"], recipe: Recipe, random: torch.Generator) -> Float[Tensor, "n 1 28 28"]:
    """Shift, rotate and zoom each digit at random, within the recipe's bounds."""
    shift_x, shift_y, turn, grow = torch.rand(4, len(pixels), generator=random) * 2 - 1
    angle, scale = turn * np.deg2rad(recipe.rotation), 1 + grow * recipe.zoom
    step = recipe.shift / (pixels.shape[-1] / 2)
    rows = (
        torch.stack((scale * angle.cos(), -scale * angle.sin(), shift_x * step), 1),
        torch.stack((scale * angle.sin(), scale * angle.cos(), shift_y * step), 1),
    )
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    # shifted by one so that what comes in from outside the picture is black (-1), not grey
    return nn.functional.grid_sample(pixels + 1, grid, align_corners=False) - 1

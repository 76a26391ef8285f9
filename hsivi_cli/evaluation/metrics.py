"""FID, KID, inception score, precision and recall of a set of images against a reference, through torch-fidelity."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_featuresdict_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_featuresdict_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_featuresdict_to_metric

from hsivi_cli.engine import processes
from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.extractors import Extractor
from hsivi_cli.evaluation.frechet import Moments, frechet_distance, moments
from hsivi_cli.io.files import sha256
from hsivi_cli.io.images import SUBSET_SEED, ImageSet, subset

METRIC_SEED = SUBSET_SEED
KID_LIMIT = 10_000
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1_000
PRC_LIMIT = 5_000
PRC_NEIGHBOURS = 3
ISC_SPLITS = 10
_LAYER = "features"


@dataclass(frozen=True)
class Features:
    """What an extractor sees in n images: features `(n, d)`, float32, and logits `(n, k)` where it has any."""

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"] | None
    source: str
    sha256: str

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.features)

    @property
    def moments(self) -> Moments:
        """Mean and covariance, float64; raises InputError for fewer than two images."""
        if self.n < 2:
            raise InputError(f"{self.source} holds one image only: a covariance needs at least two")
        return moments(self.features.numpy())


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a reference whose images are not at hand (the EDM/ADM `mu`/`sigma` convention).

    `features` are rows for KID, precision and recall, where the file brings them; `n` and `image_shape` (H, W, C) are
    None where it does not say.
    """

    moments: Moments
    features: Float[Tensor, "m d"] | None
    n: int | None
    image_shape: tuple[int, ...] | None
    extractor_sha256: str | None
    source: str
    sha256: str


@dataclass(frozen=True)
class Estimate:
    """One metric of `n` samples: `value` is None where it cannot be had; `note` says why, or how it was computed."""

    name: str
    value: float | None
    n: int
    note: str

    @property
    def key(self) -> str:
        """The name with the number of samples, as `fid@5000`: figures of different N are not comparable."""
        return f"{self.name}@{self.n}"


@torch.no_grad()
def extract_features(
    images: ImageSet,
    extractor: Extractor,
    batch_size: int = 256,
    device: str = "cpu",
    on_batch: Callable[[int], object] | None = None,
) -> Features:
    """Features of all images, in batches; `on_batch(count)` is told after each. Several processes take turns.

    Raises InputError if the extractor refuses the images or returns something that is not finite rows of features.
    """
    widths: list[int] = []

    def layers(rows: range) -> Tensor:
        batch = torch.from_numpy(images.images[rows.start : rows.stop]).permute(0, 3, 1, 2).to(device)
        found = _run(extractor, batch, images.source)
        widths[:] = [layer.shape[1] for layer in found]
        return torch.cat(found, 1)

    parts = []
    for part in processes.in_turns(layers, len(images), batch_size):
        parts.append(part)
        if on_batch is not None:
            on_batch(len(part))
    columns = processes.from_main(lambda: widths)
    features, *logits = (torch.cat(layer) for layer in zip(*(part.split(columns, 1) for part in parts), strict=True))
    return Features(features, logits[0] if logits else None, images.source, images.sha256)


def has_statistics(source: str) -> bool:
    """Whether a file is an `.npz` that holds `mu` and `sigma`."""
    try:
        with zipfile.ZipFile(source) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_statistics(path: Path) -> Statistics:
    """Read an `.npz` of `mu` and `sigma`, cast to float64; raises InputError if they are no moments, or not finite."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _STATISTICS_KEYS if name in archive}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as err:
        raise InputError(f"{path} is damaged, or holds Python objects, which are never unpickled ({err})") from err
    try:
        mu, sigma = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
        rows = torch.from_numpy(np.asarray(arrays["features"], np.float32)) if "features" in arrays else None
        n = int(arrays["n"]) if "n" in arrays else None
        shape = tuple(int(s) for s in arrays["image_shape"]) if "image_shape" in arrays else None
    except (KeyError, TypeError, ValueError) as err:
        raise InputError(f"{path} holds no statistics: it needs numbers mu (d,) and sigma (d, d) ({err})") from err
    if mu.ndim != 1 or not mu.size or sigma.shape != (mu.size, mu.size):
        raise InputError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not (d,) and (d, d)")
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != mu.size):
        raise InputError(f"{path}: features {tuple(rows.shape)} are not (m, {mu.size})")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and (rows is None or bool(rows.isfinite().all()))):
        raise InputError(f"{path}: the statistics hold NaN or infinity")
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * float(np.abs(sigma).max())):
        raise InputError(f"{path}: sigma is not symmetric, so it is no covariance")
    extractor = str(arrays["extractor_sha256"]) if "extractor_sha256" in arrays else None
    return Statistics(Moments(mu, sigma), rows, n, shape, extractor, str(path), sha256(path))


def compute_metrics(samples: Features, reference: Features | Statistics) -> tuple[Estimate, ...]:
    """FID, KID, inception score, precision and recall of `samples`; a metric that cannot be had has value None.

    Subsets and subsamples are drawn with METRIC_SEED. Raises InputError if the feature dimensions differ.
    """
    size = len(reference.moments.mu)
    if samples.features.shape[1] != size:
        raise InputError(f"{reference.source} has {size} features, the extractor {samples.features.shape[1]}")
    rows = reference.features
    return (
        fid(samples, reference.moments),
        *kid(samples.features, rows),
        *isc(samples.logits, samples.n),
        *precision_recall(samples.features, rows),
    )


def fid(samples: Features, reference: Moments) -> Estimate:
    """Frechet distance of the features' Gaussians, float64 (Heusel et al. 2017)."""
    found = samples.moments
    value = frechet_distance(found.mu, found.sigma, reference.mu, reference.sigma)
    return Estimate("fid", value, samples.n, "float64, symmetric eigenvalues")


def kid(features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"] | None) -> tuple[Estimate, Estimate]:
    """Kernel distance, cubic: mean and spread over subsets of at most 10,000 a side (Binkowski et al. 2018)."""
    ours, n = subsample(features, KID_LIMIT), min(len(features), KID_LIMIT)
    if reference is None or min(n, len(reference)) < 2:
        why = _NO_ROWS if reference is None else "too few images"
        return Estimate("kid", None, n, why), Estimate("kid_std", None, n, why)
    theirs = subsample(reference, KID_LIMIT)
    size = min(KID_SUBSET_SIZE, n, len(theirs))
    options: dict[str, Any] = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size}
    found = kid_featuresdict_to_metric(
        {_LAYER: ours.double()}, {_LAYER: theirs.double()}, _LAYER, rng_seed=METRIC_SEED, verbose=False, **options
    )
    note = f"{KID_SUBSETS} subsets of {size}, from {n} samples and {len(theirs)} of the reference"
    return Estimate("kid", found[KEY_METRIC_KID_MEAN], n, note), Estimate("kid_std", found[KEY_METRIC_KID_STD], n, note)


def isc(logits: Float[Tensor, "n k"] | None, n: int) -> tuple[Estimate, Estimate]:
    """Inception score: mean and spread over ten splits (Salimans et al. 2016); needs no reference."""
    if logits is None:
        why = "the extractor has no logits"
        return Estimate("isc", None, n, why), Estimate("isc_std", None, n, why)
    splits = min(ISC_SPLITS, n)
    found = isc_featuresdict_to_metric(
        {"logits": logits}, "logits", isc_splits=splits, samples_shuffle=True, rng_seed=METRIC_SEED, verbose=False
    )
    note = f"{splits} splits"
    return tuple(
        Estimate(name, value, n, note) if np.isfinite(value) else Estimate(name, None, n, "the logits overflow")
        for name, value in (("isc", found[KEY_METRIC_ISC_MEAN]), ("isc_std", found[KEY_METRIC_ISC_STD]))
    )  # type: ignore[return-value]


def precision_recall(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"] | None
) -> tuple[Estimate, Estimate]:
    """Share of samples in the reference's third-neighbour balls, and the other way round (Kynkäänniemi et al. 2019).

    At most 5,000 a side, drawn with a fixed seed; both figures depend on how many there are.
    """
    ours, n = subsample(features, PRC_LIMIT), min(len(features), PRC_LIMIT)
    if reference is None or min(n, len(reference)) <= PRC_NEIGHBOURS:
        why = _NO_ROWS if reference is None else "too few images"
        return Estimate("precision", None, n, why), Estimate("recall", None, n, why)
    theirs = subsample(reference, PRC_LIMIT)
    found = prc_featuresdict_to_metric(
        {_LAYER: ours}, {_LAYER: theirs}, _LAYER, prc_neighborhood=PRC_NEIGHBOURS, save_cpu_ram=True, verbose=False
    )
    note = f"{PRC_NEIGHBOURS} neighbours, {n} samples against {len(theirs)} of the reference"
    return Estimate("precision", found[KEY_METRIC_PRECISION], n, note), Estimate(
        "recall", found[KEY_METRIC_RECALL], n, note
    )


def subsample(rows: Float[Tensor, "n d"], limit: int) -> Float[Tensor, "m d"]:
    """At most `limit` rows, drawn with METRIC_SEED and kept in order: folders are often sorted by class."""
    chosen = subset(len(rows), limit)
    return rows if chosen is None else rows[torch.from_numpy(chosen)]


_STATISTICS_KEYS = ("mu", "sigma", "features", "n", "image_shape", "extractor_sha256")
_NO_ROWS = "the reference brings mean and covariance only, no rows of features"


def _run(extractor: Extractor, batch: UInt8[Tensor, "n c h w"], source: str) -> tuple[Tensor, ...]:
    if extractor.channels == 3 and batch.shape[1] == 1:
        batch = batch.expand(-1, 3, -1, -1)
    try:
        layers = tuple(layer.detach().float().cpu() for layer in extractor.module(batch))
    except (RuntimeError, torch.jit.Error, AttributeError, TypeError) as err:
        if "out of memory" in str(err) or "allocate memory" in str(err):
            raise  # not the images' fault, and cli.app has the words for it
        last = str(err).strip().splitlines()[-1] if str(err).strip() else type(err).__name__
        raise InputError(f"{extractor.name} cannot take images of shape {tuple(batch.shape[1:])} ({last})") from err
    if not layers or any(layer.ndim != 2 or len(layer) != len(batch) for layer in layers):
        shapes = ", ".join(str(tuple(layer.shape)) for layer in layers)
        raise InputError(f"{extractor.name} returned {shapes or 'nothing'}, not features (n, d) or (features, logits)")
    if not all(bool(layer.isfinite().all()) for layer in layers):
        raise InputError(f"{extractor.name} returned NaN or infinity for images of {source}")
    return layers

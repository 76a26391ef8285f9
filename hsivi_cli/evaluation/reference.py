"""What samples are compared with: images or statistics, checked to fit; and an FID ready to be measured again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from hsivi_cli.engine import processes
from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.extractors import Extractor, load_extractor
from hsivi_cli.evaluation.frechet import Moments
from hsivi_cli.evaluation.metrics import Statistics, extract_features, fid, has_statistics, read_statistics
from hsivi_cli.io.files import asset
from hsivi_cli.io.images import ImageSet, describe_size, image_set, read_images

SHIPPED_REFERENCE = "digit_features/reference_28x28.npz"


def default_features(shape: tuple[int, int, int]) -> str:
    """The extractor for images of shape (H, W, C): `digits` for small grey ones, otherwise `inception`."""
    return "digits" if shape[2] == 1 and max(shape[:2]) <= 28 else "inception"


def open_reference(reference: str, extractor: Extractor, shape: tuple[int, int, int]) -> ImageSet | Statistics:
    """The reference's images or statistics; InputError where they cannot be compared with images of shape (H, W, C).

    `digits` is the shipped MNIST statistics for 28x28 images and scikit-learn's digits for 8x8 ones.
    """
    size = f"{shape[0]}x{shape[1]}"
    if reference == "digits" and shape[:2] not in ((28, 28), (8, 8)):
        raise InputError(f"--reference digits has 28x28 and 8x8 images, the samples are {size}: name another")
    shipped = reference == "digits" and shape[:2] == (28, 28)
    path = asset(SHIPPED_REFERENCE) if shipped else Path(reference)
    if not has_statistics(str(path)):
        images = read_images(reference)
        _check_shape(images.shape, reference, shape)
        return images
    statistics = read_statistics(path)
    if statistics.extractor_sha256 not in (None, extractor.sha256):
        hint = "use --features digits, or name MNIST's idx file" if shipped else "compute them again"
        raise InputError(f"{reference} was computed with other weights than {extractor.name}'s: {hint}")
    _check_shape(statistics.image_shape, reference, shape)
    return statistics


@dataclass(frozen=True)
class FidMeter:
    """An FID ready to be measured again: call it with uint8 images `(n, h, w, c)`.

    The hashes say what it compares with what, as in an evaluation's protocol: figures belong together only where both
    agree.
    """

    extractor: Extractor
    target: Moments
    reference_sha256: str
    device: str

    @property
    def extractor_sha256(self) -> str:
        """Hash of the extractor's weights."""
        return self.extractor.sha256

    def __call__(self, images: UInt8[np.ndarray, "n h w c"]) -> float:
        """The FID of the images, which every process has and helps with.

        Raises InputError if the extractor refuses them or there are fewer than two.
        """
        features = extract_features(image_set(images, "preview"), self.extractor, device=self.device)
        found = processes.from_main(lambda: fid(features, self.target))
        assert found.value is not None
        return found.value


def fid_against(reference: str, shape: tuple[int, int, int], device: str = "cpu") -> FidMeter:
    """The FID of images of shape (H, W, C) against `reference`, with the default features.

    The reference is read and its features are computed once. Raises InputError as `open_reference` does.
    """
    extractor = load_extractor(default_features(shape), None, device)
    known = open_reference(reference, extractor, shape)
    target = known if isinstance(known, Statistics) else extract_features(known, extractor, device=device)
    return FidMeter(extractor, target.moments, target.sha256, device)


def _check_shape(theirs: tuple[int, ...] | None, reference: str, shape: tuple[int, int, int]) -> None:
    if theirs is not None and theirs != shape:
        found, wanted = describe_size(theirs), describe_size(shape)
        raise InputError(f"the reference {reference} has images of {found}, the samples of {wanted}")

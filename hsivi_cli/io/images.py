"""Sets of images from folders, arrays, streams and idx files, checked before anything is computed from them.

Every reader returns uint8 images `(N, H, W, C)` with one or three channels. Nothing is ever unpickled: array headers
are parsed first, and only plain uint8 bytes are read after them.
"""

import gzip
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from hsivi_cli.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
NAMED_SETS = ("digits",)
SUBSET_SEED = 2020  # torch-fidelity's default for whatever a metric draws
_NPY_MAGIC = b"\x93NUMPY"
_IDX_UINT8 = b"\x00\x00\x08"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class ImageSet:
    """Images `(N, H, W, C)`, uint8 in 0..255, C in {1, 3}; `sha256` hashes the shape and the bytes.

    `subset_of` is how many images the source holds, where only some of them were drawn.
    """

    images: UInt8[np.ndarray, "n h w c"]
    source: str
    sha256: str
    subset_of: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images)


def image_set(array: Shaped[np.ndarray, "..."], source: str, limit: int | None = None) -> ImageSet:
    """Check an array and make it an ImageSet, of at most `limit` images as `subset` draws them.

    Accepts uint8 NHW, NHWC and NCHW; where both channel axes fit, NHWC wins (the ADM convention).
    Raises InputError for any other dtype or shape, and for an empty array.
    """
    if array.dtype != np.uint8:
        raise InputError(f"{source}: dtype {array.dtype} is not supported: convert to uint8, 0..255")
    if 0 in array.shape:
        raise InputError(f"{source}: the array of shape {array.shape} is empty: nothing to read")
    if array.ndim == 3 and array.shape[-1] in (1, 3):
        raise InputError(f"{source}: shape {array.shape} looks like a single image: add a leading axis, (1, H, W, C)")
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise InputError(f"{source}: shape {array.shape} is not (N, H, W), (N, H, W, C) or (N, C, H, W) with C in 1, 3")
    chosen = subset(len(array), limit)
    images = np.ascontiguousarray(array if chosen is None else array[chosen])
    digest = hashlib.sha256(json.dumps(images.shape).encode())
    digest.update(images.data)
    return ImageSet(images, source, digest.hexdigest(), None if chosen is None else len(array))


def subset(count: int, limit: int | None) -> Int[np.ndarray, " limit"] | None:
    """Which `limit` of `count` to take: at random with SUBSET_SEED, in order; None for all, where `limit` allows it.

    The first ones would not do: folders and arrays are often sorted by class.
    """
    if limit is None or count <= limit:
        return None
    return np.sort(np.random.default_rng(SUBSET_SEED).choice(count, limit, replace=False))


def describe_size(shape: tuple[int, ...]) -> str:
    """An image's shape (H, W, C) in words, as `28x28 grey`."""
    return f"{shape[0]}x{shape[1]} {'grey' if shape[-1] == 1 else 'RGB'}"


def read_images(source: str, limit: int | None = None) -> ImageSet:
    """Read a named set (`digits`), an image folder, `.npy`, `.npz` or idx file (or `.gz`); `limit` as in `subset`.

    Raises InputError naming the file at fault.
    """
    if source in NAMED_SETS:
        return image_set(_scikit_digits(), source, limit)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, limit)
    if not path.is_file():
        raise InputError(
            f"{source} does not exist: name an image folder, a .npy, .npz or idx file, or {', '.join(NAMED_SETS)}"
        )
    with path.open("rb") as file:
        head = file.read(len(_NPY_MAGIC))
    if head.startswith(_NPY_MAGIC) or path.suffix == ".npy":
        return image_set(read_npy(path), source, limit)
    if head.startswith(b"PK") or path.suffix == ".npz":
        return image_set(_read_npz(path), source, limit)
    if head.startswith((b"\x1f\x8b", _IDX_UINT8)) or path.suffix == ".gz":
        array = read_idx(path)
        if array.ndim != 3:
            raise InputError(
                f"{source} holds labels or other data of shape {array.shape}: name the idx3 file of the images"
            )
        return image_set(array, source, limit)
    raise InputError(f"{source} is no image set: name an image folder, a .npy, .npz or idx file")


def read_image_stream(file: BinaryIO, limit: int | None = None, source: str = "stdin") -> ImageSet:
    """Read one or more concatenated `.npy` payloads of uint8 images, as `hsivi sample --out -` writes them.

    `limit` as in `subset`, once all are read. Raises InputError if the stream is empty, is cut off, is anything but
    `.npy`, or mixes image shapes.
    """
    sets: list[ImageSet] = []
    while head := _read_up_to(file, 8):
        sets.append(image_set(_npy_payload(file, head, source), source))
        if sets[-1].shape != sets[0].shape:
            raise InputError(
                f"{source}: array {len(sets)} holds images of {sets[-1].shape}, the first of {sets[0].shape}"
            )
    if not sets:
        raise InputError(f"{source} is empty: pipe images into it, as from hsivi sample --out -")
    return image_set(np.concatenate([part.images for part in sets]), source, limit)


def read_npy(path: Path) -> UInt8[np.ndarray, "..."]:
    """Read a uint8 `.npy` file; raises InputError for another dtype, and for a file that is damaged or cut off."""
    with path.open("rb") as file:
        return _npy_payload(file, _read_up_to(file, 8), str(path))


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """Read an idx file of unsigned bytes (the MNIST format), gzipped or raw.

    The header is two zero bytes, the type (8), the number of axes and their big-endian 32-bit lengths
    (LeCun, Cortes and Burges, "The MNIST database"). Raises InputError if header and length disagree.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with cast(BinaryIO, gzip.open(path)) if zipped else path.open("rb") as file:
            head = _read_up_to(file, 4)
            if head[:3] != _IDX_UINT8 or len(head) < 4 or not 1 <= head[3] <= 4:
                raise InputError(f"{path} is no idx file of unsigned bytes: name one like train-images-idx3-ubyte.gz")
            lengths = _read_up_to(file, 4 * head[3])
            shape = tuple(int(n) for n in np.frombuffer(lengths[: len(lengths) // 4 * 4], ">u4"))
            size = math.prod(shape)
            data = _read_up_to(file, size)
            if len(shape) != head[3] or len(data) != size or file.read(1):
                raise InputError(f"{path}: its header says {size} bytes of data, the file differs: fetch it again")
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise InputError(f"{path} is damaged or cut off ({err}): fetch it again") from err
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_pixels(path: Path) -> UInt8[np.ndarray, "h w c"]:
    """Read one grey or RGB image file; raises InputError if it is broken or of another mode."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as err:
        raise InputError(f"{path} is broken or no image ({err}): remove or replace it") from err
    if mode not in ("L", "RGB"):
        raise InputError(f"{path} has mode {mode}: convert it to 8-bit grey (L) or RGB")
    return pixels[..., None] if mode == "L" else pixels


def _read_folder(path: Path, limit: int | None) -> ImageSet:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        idx = sorted(file.name for file in path.glob("*-images-idx3-ubyte*"))
        hint = f"name the file {path / idx[-1]}" if idx else "name a folder of png, jpg, bmp or webp files"
        raise InputError(f"{path} holds no images: {hint}")
    count, chosen = len(files), subset(len(files), limit)
    if chosen is not None:
        files = [files[i] for i in chosen]
    first = read_pixels(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)
    for row, file in zip(images, files, strict=True):
        pixels = read_pixels(file)
        if pixels.shape != first.shape:
            raise InputError(
                f"{file} is {describe_size(pixels.shape)}, but {files[0].name} is {describe_size(first.shape)}: "
                "resize or convert them to one size and mode"
            )
        row[:] = pixels
    return replace(image_set(images, str(path)), subset_of=None if chosen is None else count)


def _read_npz(path: Path) -> UInt8[np.ndarray, "..."]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            chosen = next(
                (name for name in ("arr_0", "images") if name in names), names[0] if len(names) == 1 else None
            )
            if chosen is None and {"mu", "sigma"} <= set(names):
                raise InputError(f"{path} holds statistics (mu, sigma), not images: it can only be a --reference")
            if chosen is None:
                raise InputError(f"{path} holds {', '.join(names) or 'no array'}: name the images arr_0 or images")
            with archive.open(f"{chosen}.npy") as file:
                return _npy_payload(cast(BinaryIO, file), _read_up_to(cast(BinaryIO, file), 8), f"{path}[{chosen}]")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as err:
        raise InputError(f"{path} is damaged or no .npz file ({err}): write it again") from err


def _npy_payload(file: BinaryIO, head: bytearray, source: str) -> UInt8[np.ndarray, "..."]:
    """Read the array that follows the first 8 bytes of a `.npy` payload; only uint8 data is ever looked at."""
    if len(head) < 8 or not head.startswith(_NPY_MAGIC):
        raise InputError(f"{source} is no .npy array: write it with numpy.save")
    readers: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if (head[6], head[7]) not in readers:
        raise InputError(f"{source}: .npy version {head[6]}.{head[7]} is not supported: write it with numpy.save")
    try:
        shape, fortran_order, dtype = readers[head[6], head[7]](file)
    except (ValueError, EOFError) as err:
        raise InputError(f"{source} has a damaged .npy header ({str(err).splitlines()[0]}): write it again") from err
    if dtype.hasobject:
        raise InputError(f"{source} holds Python objects, which are never unpickled: convert to uint8, 0..255")
    if dtype != np.uint8:
        raise InputError(f"{source}: dtype {dtype} is not supported: convert to uint8, 0..255")
    size = math.prod(shape)
    data = _read_up_to(file, size)
    if len(data) != size:
        raise InputError(f"{source} is cut off: {len(data)} of {size} bytes of shape {shape} are there: write it again")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _read_up_to(file: BinaryIO, size: int) -> bytearray:
    """Read `size` bytes or what there is, in pieces: a lying header costs no memory, a pipe's short reads no data."""
    data = bytearray()
    while len(data) < size and (piece := file.read(min(size - len(data), _CHUNK))):
        data += piece
    return data


def _scikit_digits() -> UInt8[np.ndarray, "n 8 8"]:
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)

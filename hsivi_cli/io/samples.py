"""Samples on disk: a PNG grid, a folder of PNGs, `.npy`, `.npz` or a stream; checked before, written in one step."""

import io
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8

from hsivi_cli.errors import InputError
from hsivi_cli.io.capacity import block_size, check_disk, check_memory
from hsivi_cli.io.files import atomic_directory, atomic_file, check_writable, clear_errors

STREAM = "-"
FORMATS = {".png": "grid", ".npy": "npy", ".npz": "npz"}
GRID_WIDTH = 500  # a grid of small images is enlarged to at least this many pixels
GRID_PADDING = 2
GRID_BACKGROUND = 48
_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_NUMBERED = re.compile(r"\d{6,}\.png")


@dataclass(frozen=True)
class Destination:
    """Where samples go and how: `format` is "grid", "folder", "npy", "npz" or "stream"; `path` is None for a stream."""

    format: str
    path: Path | None
    force: bool = False


def open_destination(out: str, channels: int, force: bool = False) -> Destination:
    """Decide the format from `out` and check that it can be written, before anything is drawn.

    `-` is a stream of `.npy` bytes, `.png` a grid, a path without extension or ending in `/` a folder of PNGs. Raises
    InputError for an unknown extension, for an output that exists (unless `force`; a folder is only ever replaced if it
    holds nothing but numbered PNGs), and for a place that cannot be written.
    """
    if out == STREAM:
        return Destination("stream", None)
    path = Path(os.path.abspath(out))
    folder = out.endswith("/") or not path.suffix or path.is_dir()
    if not folder and path.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        raise InputError(f"--out {out}: unknown extension {path.suffix}: use {known}, - or a folder (ending in /)")
    kind = "folder" if folder else FORMATS[path.suffix.lower()]
    if kind in ("grid", "folder") and channels not in _IMAGE_MODES:
        raise InputError(f"--out {out}: images of {channels} channels do not fit a PNG: use .npy or .npz")
    _check_free(out, path, folder, force)
    check_writable(out, path.parent)
    return Destination(kind, path, force)


def check_capacity(destination: Destination, n: int, shape: tuple[int, int, int]) -> None:
    """Raise InputError if `n` images of `shape` (C, H, W) cannot fit memory, or the disk they are to be written to."""
    channels, height, width = shape
    pixels = n * channels * height * width
    copies, stored = 1, pixels  # a file of the whole array, written from where it lies
    if destination.format == "stream":
        copies = 2
    elif destination.format == "grid":
        stored = _grid_pixels(n, height, width) * channels
        copies = 1 + math.ceil(4 * stored / pixels)  # the enlarged images, the picture, Pillow's and its PNG
    check_memory(f"-n {n}", copies * pixels)
    if destination.path is None:
        return
    if destination.format == "folder":
        stored = n * block_size(destination.path.parent)
    check_disk(f"-n {n}", stored, destination.path.parent)


def write_samples(
    destination: Destination, batches: Iterable[UInt8[np.ndarray, "b h w c"]]
) -> bytes | memoryview | None:
    """Write all batches in one atomic step; a stream's bytes are returned instead, for the caller to send.

    Raises RunError if the disk is full and InputError if the place cannot be written; nothing half-written stays.
    """
    if destination.path is None:
        return npy_bytes(_whole(batches))
    with clear_errors(destination.path):
        if destination.format == "folder":
            with atomic_directory(destination.path, overwrite=destination.force) as directory:
                _write_folder(directory, batches)
            return None
        images = _whole(batches)
        with atomic_file(destination.path) as temporary, temporary.open("wb") as file:
            if destination.format == "grid":
                file.write(png_bytes(image_grid(images)))
            elif destination.format == "npy":
                _write_npy(file, images)
            else:
                np.savez(file, arr_0=images)
    return None


def write_grid(images: UInt8[np.ndarray, "n h w c"], path: Path) -> None:
    """A run's own preview: a PNG grid, atomically, replacing an older one."""
    write_samples(Destination("grid", path, force=True), [images])


def image_grid(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "rows columns c"]:
    """A near-square picture of all images, enlarged by a whole factor to at least 500 pixels wide, gaps of 2 pixels."""
    n, height, width, channels = images.shape
    columns, rows, scale = _grid_layout(n, width)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    cell_height, cell_width = height * scale + GRID_PADDING, width * scale + GRID_PADDING
    size = (rows * cell_height + GRID_PADDING, columns * cell_width + GRID_PADDING, channels)
    picture = np.full(size, GRID_BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        top = GRID_PADDING + i // columns * cell_height
        left = GRID_PADDING + i % columns * cell_width
        picture[top : top + height * scale, left : left + width * scale] = image
    return picture


def png_bytes(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """One image as PNG: grey, RGB or RGBA by its channels (1, 3, 4)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()


def npy_bytes(images: UInt8[np.ndarray, "n h w c"]) -> memoryview:
    """An array in `.npy` format."""
    buffer = io.BytesIO()
    _write_npy(buffer, images)
    return buffer.getbuffer()


def _whole(batches: Iterable[UInt8[np.ndarray, "b h w c"]]) -> UInt8[np.ndarray, "n h w c"]:
    """All batches in one array; a single one is not copied."""
    parts = list(batches)
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


def _write_npy(file: BinaryIO | io.BufferedWriter, images: UInt8[np.ndarray, "n h w c"]) -> None:
    """As `np.save`, without a copy in memory, and with the system's own error where the disk is full."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(images))
    file.write(images.data)


def _grid_layout(n: int, width: int) -> tuple[int, int, int]:
    """Columns, rows and enlargement of a grid of `n` images."""
    columns = math.isqrt(n - 1) + 1
    return columns, math.ceil(n / columns), max(1, math.ceil(GRID_WIDTH / (columns * width)))


def _grid_pixels(n: int, height: int, width: int) -> int:
    columns, rows, scale = _grid_layout(n, width)
    return columns * (width * scale + GRID_PADDING) * rows * (height * scale + GRID_PADDING)


def _write_folder(directory: Path, batches: Iterable[UInt8[np.ndarray, "b h w c"]]) -> None:
    index = 0
    for batch in batches:
        for image in batch:
            (directory / f"{index:06d}.png").write_bytes(png_bytes(image))
            index += 1


def _check_free(out: str, path: Path, folder: bool, force: bool) -> None:
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"--out {out} exists and is no folder: choose another path")
    if folder and Path.cwd().is_relative_to(path):
        raise InputError(f"--out {out} holds the working directory: name a new folder")
    if not folder and path.exists() and not force:
        raise InputError(f"--out {out} exists already: choose another path, or replace it with --force")
    if folder and path.is_dir() and any(path.iterdir()):
        if not force:
            raise InputError(f"--out {out} exists and is not empty: choose another path, or replace it with --force")
        if not all(_NUMBERED.fullmatch(file.name) for file in path.iterdir()):
            raise InputError(f"--out {out} holds other files than samples, so --force spares it: choose another path")

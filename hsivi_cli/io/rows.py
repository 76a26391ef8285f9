"""Rows of numbers for models of rows: tables, arrays, images and genotypes, each as float32 with NaN for missing.

A large CSV or parquet file is read in batches straight into float32, so that a million rows of 100 columns cost their
400 MB and no copy. What is not a number (labels such as a population) is kept beside, for colours and scores.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.genotypes import count_letters, is_genotype_file, letters_of, odd_letters, read_genotypes
from hsivi_cli.io.images import IMAGE_SUFFIXES, NAMED_SETS, image_set, read_idx, read_images
from hsivi_cli.io.row_streams import is_large, stream_table
from hsivi_cli.io.tables import read_table

if TYPE_CHECKING:
    import pandas

ROWS_AT_ONCE = 65536
_TABLE_OF_ONE = "one row only, which says nothing of how rows differ: two or more are needed"


@dataclass(frozen=True)
class Rows:
    """N rows of D numbers, their names, and the other columns of the source as a frame of N rows (or None).

    `shape` is (height, width, channels) of images, whose values are 0..1, channels last. `alleles` are those of columns
    that came as letters, for counting new rows alike. `facts` are lines to tell the user.
    """

    values: Float32[np.ndarray, "N D"]
    columns: tuple[str, ...]
    other: "pandas.DataFrame | None" = None
    shape: tuple[int, int, int] | None = None
    kind: Literal["numbers", "images", "genotypes"] = "numbers"
    source: str = ""
    alleles: Mapping[str, str] = field(default_factory=dict)
    facts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def tensor(self) -> Tensor:
        """The values as a tensor (N, D) on the same memory."""
        return torch.from_numpy(self.values)

    def labels(self, name: str) -> tuple[Tensor, tuple[str, ...]]:
        """A column of `other` as classes (N,) int64, -1 where missing, and the names of the classes in order.

        Raises InputError where there is no such column, and where it is empty.
        """
        frame = self.other
        if frame is None or name not in frame.columns:
            have = ", ".join(map(str, frame.columns)) if frame is not None and len(frame.columns) else "none"
            raise InputError(f'{self.source}: there is no column "{name}" of labels: there is {have}')
        column = frame[name]
        whole = column.dtype.kind == "f" and bool((column.dropna() % 1 == 0).all())  # whole numbers beside gaps
        text = column.astype("Int64") if whole else column
        known = sorted(text.dropna().unique())
        if not known:
            raise InputError(f'{self.source}: every label in column "{name}" is missing')
        index = {value: position for position, value in enumerate(known)}
        codes = [-1 if missing else index[value] for value, missing in zip(text, text.isna(), strict=True)]
        return torch.tensor(codes), tuple(str(value) for value in known)


def read_rows(
    source: str,
    columns: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    alleles: Mapping[str, str] | None = None,
    every: int = 1,
    stream: BinaryIO | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Rows:
    """Read rows from CSV, TSV or parquet (or `-`), `.npy`, an image folder, idx file or named set, PLINK or VCF.

    Of tables, all numeric and genotype columns are data but those in `labels`, or exactly `columns`, in that order.
    `alleles` are those of an earlier reading; `every` thins the variants of genotype files. `on_rows` is told
    the rows read of a large table, and of how many. Raises InputError in one
    line that names file and column; see `clean` for what is checked of the values.
    """
    path = Path(source)
    if source in NAMED_SETS:
        rows = _digits(source)
    elif source != "-" and is_genotype_file(path):
        values, people, names, facts = read_genotypes(path, every)
        rows = Rows(values, tuple(names), _frame({"sample": people}), None, "genotypes", source, {}, tuple(facts))
    elif source != "-" and path.suffix == ".npy":
        rows = _npy(path)
    elif source != "-" and (path.is_dir() or path.suffix == ".npz" or _is_idx(path)):
        rows = _images(source)
    elif source != "-" and path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{source} is a single image: name the folder of all images")
    else:
        chosen = None if columns is None else tuple(columns)
        return _table(source, chosen, tuple(labels), alleles or {}, stream, on_rows)
    return rows if columns is None else select(rows, columns)


def name_columns(text: str) -> tuple[str, ...]:
    """The names in "a,b" and "PC1..PC10", which is PC1, PC2 .. PC10. Raises InputError for what is neither."""
    names: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        ends = re.fullmatch(r"(.*?)(\d+)\s*\.\.\s*(.*?)(\d+)", part)
        if ends is not None and ends[1] == ends[3] and int(ends[2]) <= int(ends[4]):
            names += [f"{ends[1]}{number}" for number in range(int(ends[2]), int(ends[4]) + 1)]
        elif ".." in part:
            raise InputError(f"--columns {part}: a range is written as PC1..PC10, one name with a rising number")
        else:
            names.append(part)
    if not names or len(set(names)) < len(names):
        raise InputError(f"--columns {text}: name columns, each once, as a,b or PC1..PC10")
    return tuple(names)


def select(rows: Rows, columns: Sequence[str]) -> Rows:
    """Rows of these columns, in this order; raises InputError for one there is not. No copy where all stay."""
    if tuple(columns) == rows.columns:
        return rows
    place = {name: index for index, name in enumerate(rows.columns)}
    unknown = [name for name in columns if name not in place]
    if unknown:
        raise InputError(f'{rows.source} has no column of numbers named "{unknown[0]}"')
    values = np.ascontiguousarray(rows.values[:, [place[name] for name in columns]])
    shape = rows.shape if len(columns) == len(rows.columns) and rows.shape is None else None
    return replace(rows, values=values, columns=tuple(columns), shape=shape)


def clean(rows: Rows) -> Rows:
    """Rows that a model can be fitted to: columns that never move are dropped (images keep them), with a fact line.

    Raises InputError for no or one row, infinite values (the first, by column and row), genotypes outside 0/1/2, and
    where no column moves. Missing values stay NaN: see `require_complete`.
    """
    values, source = rows.values, rows.source
    if len(values) == 0 or values.shape[1] == 0:
        raise InputError(f"{source} holds {len(values)} rows of {values.shape[1]} numbers: nothing to fit")
    if len(values) == 1:
        raise InputError(f"{source} holds {_TABLE_OF_ONE}")
    lowest = np.full(values.shape[1], np.inf, np.float32)
    highest, empty = -lowest, 0
    for begin in range(0, len(values), ROWS_AT_ONCE):
        block = values[begin : begin + ROWS_AT_ONCE]
        _check_block(rows, block, begin)
        missing = np.isnan(block)
        empty += int(missing.all(1).sum())
        lowest = np.fmin(lowest, np.where(missing, np.inf, block).min(0))
        highest = np.fmax(highest, np.where(missing, -np.inf, block).max(0))
    moving = highest > lowest
    if not moving.any():
        raise InputError(f"{source}: none of the {len(moving)} columns of numbers moves: nothing to fit")
    facts = list(rows.facts)
    if empty:
        facts.append(f"{empty} of {len(values)} rows have no value at all: the model knows nothing of them")
    still = [name for name, moves in zip(rows.columns, moving, strict=True) if not moves]
    if not still or rows.shape is not None:
        return replace(rows, facts=tuple(facts))
    shown = ", ".join(still[:4]) + (f" and {len(still) - 4} more" if len(still) > 4 else "")
    facts.append(f"{len(still)} of {len(moving)} columns are constant and left out: {shown}")
    kept = [name for name, moves in zip(rows.columns, moving, strict=True) if moves]
    return replace(select(rows, kept), facts=tuple(facts))


def require_complete(rows: Rows, method: str) -> None:
    """Raise InputError if any value is missing, for methods that cannot leave it out."""
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        missing = np.isnan(rows.values[begin : begin + ROWS_AT_ONCE])
        if missing.any():
            row, column = (int(i) for i in np.argwhere(missing)[0])
            raise InputError(
                f'{rows.source}: column "{rows.columns[column]}", row {begin + row + 1} is missing, and {method} needs '
                "every value: fill it in, or choose a method that allows for gaps"
            )


def binarise(rows: Rows, threshold: float = 0.5) -> Rows:
    """1 where a value is above the threshold, else 0; missing stays missing."""
    binary = (rows.values > threshold).astype(np.float32)
    binary[np.isnan(rows.values)] = np.nan
    return replace(rows, values=binary)


def batches(
    rows: Tensor, size: int, generator: torch.Generator, labels: Tensor | None = None
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """Batches (size, D) of rows (N, D) without end, in a new random order each time round; the last may be smaller.

    Only a batch is ever copied. With labels (N,), pairs of rows and labels.
    """
    if size < 1:
        raise InputError(f"--batch-size {size}: one row or more is needed")
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for index in order.split(size):
            yield rows[index] if labels is None else (rows[index], labels[index])


def _check_block(rows: Rows, block: np.ndarray, begin: int) -> None:
    wrong, why = np.isinf(block), "infinite: remove it, or leave the cell empty where it is missing"
    if not wrong.any() and rows.kind == "genotypes":
        wrong = (block != 0) & (block != 1) & (block != 2) & ~np.isnan(block)
        why = "not 0, 1 or 2 copies of an allele: leave the cell empty where it is missing"
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        place = f'{rows.source}: column "{rows.columns[column]}", row {begin + row + 1}'
        raise InputError(f"{place} is {block[row, column]:g}, {why}" if "0, 1" in why else f"{place} is {why}")


def _table(
    source: str,
    columns: tuple[str, ...] | None,
    labels: tuple[str, ...],
    alleles: Mapping[str, str],
    stream: BinaryIO | None,
    on_rows: Callable[[int, int], None],
) -> Rows:
    if source != "-" and is_large(Path(source)):
        values, names, other = stream_table(Path(source), columns, labels, on_rows)
        return Rows(values, names, other, source=source)
    frame = read_table(source, stream)
    unknown = [name for name in (*(columns or ()), *labels) if name not in frame.columns]
    name = "stdin" if source == "-" else source
    if unknown:
        raise InputError(f'{name} has no column "{unknown[0]}": it has {", ".join(map(str, frame.columns[:8]))} ...')
    data: list[str] = []
    letters: dict[str, str] = {}
    counted: dict[str, np.ndarray] = {}
    for column in map(str, columns if columns is not None else frame.columns):
        series = frame[column]
        if column in labels:
            continue
        if series.dtype.kind in "iufb" or series.isna().all():
            data.append(column)
        elif column in alleles or letters_of(series) is not None:
            try:
                counted[column], letters[column] = count_letters(series, column, alleles.get(column))
            except InputError as err:
                raise InputError(f"{name}: {err}") from err
            data.append(column)
        elif columns is not None or _mostly_numbers(series):
            raise InputError(_text_complaint(series, column, name))
        elif (row := odd_letters(series)) is not None:
            raise InputError(
                f'{name}: column "{column}", row {row + 1} is "{str(series.iloc[row])[:40]}", not a pair of letters of '
                "A, C, G, T: mend it, leave the cell empty where it is missing, or name the column with --color-by"
            )
    if not data:
        raise InputError(f"{name} has no column of numbers or genotypes")
    values = np.empty((len(frame), len(data)), np.float32)
    for place, column in enumerate(data):
        with np.errstate(over="ignore"):
            values[:, place] = (
                counted[column] if column in counted else frame[column].to_numpy(np.float64, na_value=np.nan)
            )
    other = frame[[column for column in frame.columns if column not in data]].copy()
    kind: Literal["numbers", "genotypes"] = "genotypes" if len(letters) == len(data) else "numbers"
    return Rows(values, tuple(data), other, None, kind, name, letters)


def _mostly_numbers(series: "pandas.Series[Any]") -> bool:
    """Whether most texts of a column are numbers: the others are then mistakes, not labels."""
    numbers = _as_numbers(series)
    return int(numbers.notna().sum()) * 2 > int(series.notna().sum())


def _as_numbers(series: "pandas.Series[Any]") -> "pandas.Series[Any]":
    import pandas

    return pandas.to_numeric(series, errors="coerce")


def _text_complaint(series: "pandas.Series[Any]", column: str, name: str) -> str:
    wrong = (_as_numbers(series).isna() & series.notna()).to_numpy()
    row = int(wrong.argmax())
    return (
        f'{name}: column "{column}", row {row + 1} is "{str(series.iloc[row])[:40]}", not a number: mend it, or name '
        "the column with --labels"
    )


def _npy(path: Path) -> Rows:
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a file of rows")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as err:
        if "allow_pickle" in str(err) or "object" in str(err).lower():
            raise InputError(f"{path} holds Python objects, which are never unpickled: write plain numbers") from err
        raise InputError(f"{path} is damaged or no .npy file ({str(err).splitlines()[0][:120]})") from err
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        return _pixels(image_set(np.asarray(array), str(path)).images, str(path))
    if array.ndim != 2:
        raise InputError(f"{path}: an array of shape {array.shape} is not rows of numbers: (N, D) is needed")
    if array.dtype.kind not in "iufb":
        raise InputError(f"{path}: an array of {array.dtype} is not numbers: float32 is best")
    values = np.empty(array.shape, np.float32)
    for begin in range(0, len(array), ROWS_AT_ONCE):
        with np.errstate(over="ignore"):
            values[begin : begin + ROWS_AT_ONCE] = array[begin : begin + ROWS_AT_ONCE]
    return Rows(values, tuple(f"x[{j}]" for j in range(array.shape[1])), source=str(path))


def _is_idx(path: Path) -> bool:
    """Whether the first bytes, unzipped where need be, are those of an idx file of bytes."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as content:
            return bytes(content.read(3)) == b"\x00\x00\x08"
    except (OSError, EOFError, zlib.error):
        return False


def _images(source: str) -> Rows:
    rows = _pixels(read_images(source).images, source)
    path = Path(source)
    beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    if beside != path and beside.is_file():
        classes = read_idx(beside)
        if classes.shape != (len(rows),):
            raise InputError(f"{beside} holds {classes.shape} labels for the {len(rows)} images of {path.name}")
        return replace(rows, other=_frame({"label": classes.astype(np.int64)}))
    return rows


def _pixels(images: np.ndarray, source: str) -> Rows:
    """Rows of images (N, H, W, C) of bytes: 0..1, named pixel[row,column], with the channel where there are several."""
    count, height, width, channels = images.shape
    values = np.empty((count, height * width * channels), np.float32)
    for begin in range(0, count, ROWS_AT_ONCE):
        block = images[begin : begin + ROWS_AT_ONCE].reshape(-1, values.shape[1])
        np.divide(block, np.float32(255), out=values[begin : begin + ROWS_AT_ONCE])
    places = [(i, j, c) for i in range(height) for j in range(width) for c in range(channels)]
    names = tuple(f"pixel[{i},{j}]" if channels == 1 else f"pixel[{i},{j},{c}]" for i, j, c in places)
    return Rows(values, names, None, (height, width, channels), "images", source)


def _digits(source: str) -> Rows:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = _pixels(np.zeros((len(digits.data), 8, 8, 1), np.uint8), source)
    return replace(
        rows, values=(digits.data / 16).astype(np.float32), other=_frame({"label": digits.target.astype(np.int64)})
    )


def _frame(columns: Mapping[str, Any]) -> "pandas.DataFrame":
    import pandas

    return pandas.DataFrame(dict(columns))

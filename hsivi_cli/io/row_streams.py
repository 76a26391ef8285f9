"""Large CSV and parquet files read in batches into one float32 array: the text and wider numbers never exist whole."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hsivi_cli.errors import InputError
from hsivi_cli.io.tables import MISSING, read_table

if TYPE_CHECKING:
    import pandas

LARGE = 1 << 26
"""Bytes from which a file is read in batches."""
BLOCK = 1 << 23
_HEAD = 1 << 20


def is_large(path: Path) -> bool:
    """Whether a table is worth reading in batches; a gzipped one is not, for its rows cannot be counted first."""
    try:
        if path.stat().st_size < LARGE:
            return False
        with path.open("rb") as file:
            return file.read(2) != b"\x1f\x8b"
    except OSError:
        return False


def stream_table(
    path: Path,
    columns: tuple[str, ...] | None,
    labels: tuple[str, ...],
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, tuple[str, ...], "pandas.DataFrame"]:
    """Values (N, D) float32, the names of their columns, and the other columns as a frame.

    Which columns are numbers is decided by the first megabyte (parquet: the schema). Raises InputError for unknown
    columns, for text in a column of numbers, and for damaged files. `on_rows` is told the rows read, and of how many.
    """
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
    import pyarrow

    try:
        rows, names, numeric, parts = _parquet(path) if parquet else _text(path, columns, labels)
        unknown = [name for name in (*(columns or ()), *labels) if name not in names]
        if unknown:
            raise InputError(f'{path} has no column "{unknown[0]}": it has {", ".join(names[:8])} ...')
        data = [name for name in (columns or names) if name in numeric and name not in labels]
        text = [name for name in columns or () if name not in numeric]
        if text:
            raise InputError(f'{path}: column "{text[0]}" is text, not numbers: name it with --labels')
        if not data:
            raise InputError(f"{path} has no column of numbers")
        values = np.empty((rows, len(data)), np.float32)
        beside = [name for name in names if name not in data]
        kept, at = [], 0
        for part in parts:
            for place, name in enumerate(data):
                column = part.column(name).cast(pyarrow.float32(), safe=False)
                values[at : at + part.num_rows, place] = column.to_numpy(zero_copy_only=False)
            if beside:
                kept.append(part.select(beside))
            at += part.num_rows
            on_rows(at, rows)
    except (pyarrow.ArrowException, OSError) as err:
        raise InputError(_complaint(path, str(err).splitlines()[0])) from err
    other = pyarrow.Table.from_batches(kept).to_pandas() if kept else None
    if other is None:
        import pandas

        other = pandas.DataFrame(index=range(at))
    return values[:at], tuple(data), other


def _parquet(path: Path) -> tuple[int, list[str], set[str], Iterator[Any]]:
    import pyarrow.types as kinds
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, pre_buffer=False)  # or Arrow fetches all row groups ahead
    schema = file.schema_arrow
    numeric = {
        field.name
        for field in schema
        if kinds.is_integer(field.type) or kinds.is_floating(field.type) or kinds.is_boolean(field.type)
    }
    return file.metadata.num_rows, list(schema.names), numeric, file.iter_batches(batch_size=65536)


def _text(
    path: Path, columns: tuple[str, ...] | None, labels: tuple[str, ...]
) -> tuple[int, list[str], set[str], Iterator[Any]]:
    import pyarrow
    from pyarrow import csv

    rows = 0
    with path.open("rb") as file:
        head = file.read(_HEAD)
        file.seek(0)
        while block := file.read(BLOCK):
            rows += block.count(b"\n")
    head = head[: head.rfind(b"\n") + 1]
    try:
        first = read_table("-", io.BytesIO(head))
    except InputError as err:
        raise InputError(str(err).replace("stdin", str(path), 1)) from err
    header = head.removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n").split(b"\n", 1)[0]
    delimiter = max((b",", b"\t", b";"), key=header.count) if header.count(b",") == 0 else b","
    if delimiter == b";" and b"," in head.split(b"\n", 2)[1]:
        raise InputError(
            f"{path}: commas inside numbers are read from files below {LARGE >> 20} MB only: write parquet"
        )
    names = [str(name) for name in first.columns]
    numeric = {
        name
        for name in names
        if name not in labels and (first[name].dtype.kind in "iufb" or bool(first[name].isna().all()))
    }
    booleans = {name for name in numeric if first[name].dtype.kind == "b"}
    types = {
        name: pyarrow.bool_() if name in booleans else pyarrow.float32() if name in numeric else pyarrow.string()
        for name in names
    }
    reader = csv.open_csv(
        path,
        read_options=csv.ReadOptions(block_size=BLOCK),
        parse_options=csv.ParseOptions(delimiter=delimiter.decode(), newlines_in_values=b'"' in head),
        convert_options=csv.ConvertOptions(
            column_types=types, null_values=list(MISSING), strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )
    return rows + 1, names, numeric, iter(reader)


def _complaint(path: Path, message: str) -> str:
    if "conversion error" in message:
        return f"{path}: a column of numbers holds text ({message[:160]}): mend it, or name the column with --labels"
    return f"{path} cannot be read ({message[:160]})"

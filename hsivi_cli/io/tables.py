"""Tables of data from CSV, TSV and parquet files or a pipe, checked before a model sees them.

Text is parsed by Arrow, which refuses rows that are too short or too long where pandas would fill them with gaps, and
takes a million rows in about a second. Nothing is ever unpickled.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    import pandas

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "-NaN", "NULL", "null", "None", "<NA>", ".")
_PARQUET_MAGIC = b"PAR1"
_PICKLE_OR_ZIP = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_GZIP = b"\x1f\x8b"


def read_table(source: str, stream: BinaryIO | None = None) -> "pandas.DataFrame":
    """Read a table from a CSV, TSV (both perhaps gzipped) or parquet file, or from `stream` (by default stdin)
    where `source` is `-`.

    Columns are numbers, truth values or text; gaps (empty, NA, NaN, null) are kept as missing: see `select_complete`.
    Raises InputError, naming the file, if it is missing, empty, damaged, has no header, rows of unequal length, columns
    of one name, or text that is not UTF-8.
    """
    if source == "-":
        name, data = "stdin", (stream or sys.stdin.buffer).read()
    else:
        name = source
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError as err:
            raise InputError(f"{source} does not exist: name a CSV, TSV or parquet file, or - for stdin") from err
        except OSError as err:
            raise InputError(f"{source} cannot be read ({err.strerror})") from err
    if not data.strip():
        raise InputError(f"{name} is empty: it needs a header and one row or more")
    if data.startswith(_GZIP):
        data = _unzip(data, name)
    if data.startswith(_PICKLE_OR_ZIP):
        raise InputError(
            f"{name} is a pickle, a workbook or an archive, which are not read: write it as CSV or parquet"
        )
    if name.lower().endswith((".parquet", ".pq")) and not data.startswith(_PARQUET_MAGIC):
        raise InputError(f"{name} is damaged or no parquet file: a text table is read under the name .csv")
    table = _parquet(data, name) if data.startswith(_PARQUET_MAGIC) else _text(data, name)
    _check_names(list(table.column_names), name)
    if table.num_rows == 0:
        raise InputError(f"{name} has a header but no rows")
    # a damaged or foreign pandas header in a parquet file is of no use here: columns only
    frame: pandas.DataFrame = table.to_pandas(ignore_metadata=True, date_as_object=True)
    return frame


def select_complete(
    frame: "pandas.DataFrame", columns: Sequence[str], na: Literal["drop", "error"]
) -> tuple["pandas.DataFrame", int]:
    """The rows in which none of `columns` is missing, and how many others were dropped.

    Only the columns that a model uses are judged; all columns are kept, and rows are numbered anew from 0. Raises
    InputError for unknown columns, with `na="error"` for any gap, and where nothing would be left.
    """
    unknown = [name for name in columns if name not in frame.columns]
    if unknown:
        raise InputError(f'there is no column "{unknown[0]}": the table has {_listed(list(frame.columns))}')
    gaps = frame[list(columns)].isna()
    incomplete = gaps.any(axis=1).to_numpy()
    count = int(incomplete.sum())
    if count == 0:
        return frame.reset_index(drop=True), 0
    worst = str(gaps.sum().idxmax())
    if na == "error":
        first = int(incomplete.argmax()) + 1
        raise InputError(
            f'{count} of {len(frame)} rows have missing values, the first is row {first}, most are in "{worst}": '
            "fill them in, or leave these rows out with --na drop"
        )
    if count == len(frame):
        raise InputError(f'every row has a missing value, most in "{worst}": leave that column out of the formula')
    return frame[~incomplete].reset_index(drop=True), count


def _text(data: bytes, name: str) -> Any:
    """An Arrow table from delimited text."""
    import pyarrow
    from pyarrow import csv

    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4096]:
        raise InputError(f"{name} is not UTF-8 text (UTF-16 or binary): save it as UTF-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = data.lstrip(b"\r\n")[:65536].splitlines()
    header, first = lines[0], lines[1] if len(lines) > 1 else b""
    delimiter = max((b",", b"\t", b";"), key=header.count) if header.count(b",") == 0 else b","
    # spreadsheets of continental Europe: semicolons between the columns, commas inside the numbers
    decimal = "," if delimiter == b";" and b"," in first and b"." not in first else "."
    _check_header(header.decode("utf-8", "replace").split(delimiter.decode()), name)

    def parse(threads: bool) -> Any:
        return csv.read_csv(
            io.BytesIO(data),
            read_options=csv.ReadOptions(use_threads=threads),
            parse_options=csv.ParseOptions(delimiter=delimiter.decode(), newlines_in_values=b'"' in data),
            convert_options=csv.ConvertOptions(
                null_values=list(MISSING), strings_can_be_null=True, quoted_strings_can_be_null=False,
                decimal_point=decimal, timestamp_parsers=[],
            ),
        )  # fmt: skip

    try:
        table = parse(threads=True)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as err:
        message = str(err)
        try:
            parse(threads=False)  # only a single thread counts the rows
        except (pyarrow.ArrowInvalid, pyarrow.ArrowKeyError) as again:
            message = str(again)
        raise InputError(_csv_complaint(data, message.splitlines()[0], name)) from err
    if any(pyarrow.types.is_binary(field.type) for field in table.schema):
        raise InputError(_csv_complaint(data, "not text", name))
    return table


def _csv_complaint(data: bytes, message: str, name: str) -> str:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as err:
        line = data[: err.start].count(b"\n") + 1
        return f"{name}, line {line}: not UTF-8 text: save the file as UTF-8"
    if "Expected" in message and "columns" in message:
        # Arrow: "CSV parse error: Row #3: Expected 2 columns, got 3: 1,2,3"
        detail = message.removeprefix("CSV parse error: ")
        return f"{name}: rows of unequal length ({detail[:120]}): mend that row, or quote text that holds the separator"
    return f"{name} cannot be read as CSV ({message[:160]})"


def _parquet(data: bytes, name: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as err:
        raise InputError(f"{name} is damaged or no parquet file ({str(err).splitlines()[0][:120]})") from err
    nested = [field.name for field in table.schema if pyarrow.types.is_nested(field.type)]
    if nested:
        raise InputError(f'{name}: column "{nested[0]}" holds lists or records, not numbers or text: flatten it first')
    return table


def _unzip(data: bytes, name: str) -> bytes:
    import gzip
    import zlib

    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as err:
        raise InputError(f"{name} is damaged or cut off ({err})") from err


def _check_header(cells: list[str], name: str) -> None:
    """Refuse a first line of numbers: the first row of data would become the names."""

    def is_number(cell: str) -> bool:
        try:
            float(cell.strip().strip('"'))
        except ValueError:
            return False
        return True

    if all(is_number(cell) for cell in cells):
        raise InputError(f"{name} has no header: its first line is numbers ({_listed(cells)}): put the names there")


def _check_names(names: list[str], name: str) -> None:
    twice = [column for column in names if names.count(column) > 1]
    if twice:
        raise InputError(f'{name} has more than one column named "{twice[0]}": rename them')
    if any(not column.strip() for column in names):
        # R's write.csv leaves the name of its row numbers empty
        position = next(i for i, column in enumerate(names) if not column.strip()) + 1
        raise InputError(f"{name}: column {position} has no name: give it one, or leave it out")


def _listed(names: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(str(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")

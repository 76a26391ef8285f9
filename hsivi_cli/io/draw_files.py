"""Posterior draws on disk: CSV in the dialect of Stan's Pathfinder, NetCDF for ArviZ, parquet, or CSV on a stream."""

import csv
import io
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

import hsivi_cli
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import atomic_file, check_writable, clear_errors

STREAM = "-"
FORMATS = ("csv", "netcdf", "parquet")
EXTENSIONS = {".csv": "csv", ".nc": "netcdf", ".netcdf": "netcdf", ".parquet": "parquet"}
STAN_COLUMNS = ("lp_approx__", "lp__")  # log density of the approximation and of the posterior (unnormalised)
_INDEXED = re.compile(r"(?P<name>.+)\[(?P<index>\d+(?:,\d+)*)\]", re.DOTALL)
_SLASH = "∕"  # HDF5 takes a plain one in a name for a group


@dataclass(frozen=True)
class DrawDestination:
    """Where draws go and how: `format` is "csv", "netcdf" or "parquet"; `path` is None for CSV on a stream."""

    format: str
    path: Path | None


@dataclass(frozen=True)
class DrawTable:
    """n draws of p named scalars, in float64; `lp_approx` and `lp` are NaN where unknown."""

    columns: tuple[str, ...]
    values: Float64[np.ndarray, "n p"]
    lp_approx: Float64[np.ndarray, " n"]
    lp: Float64[np.ndarray, " n"]


def open_draws(out: str, format: str | None = None, force: bool = False) -> DrawDestination:
    """Decide the format from `out` (or take `format`), and check that it can be written, before anything is fitted.

    `-` is CSV on a stream. Raises InputError for an unknown extension or format, for a file that exists (unless
    `force`), and for a place that cannot be written.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"--format {format} is unknown: use {', '.join(FORMATS)}")
    if out == STREAM:
        if format not in (None, "csv"):
            raise InputError(f"--out - streams CSV only: name a file for {format}")
        return DrawDestination("csv", None)
    path = Path(os.path.abspath(out))
    if out.endswith("/") or path.is_dir():
        raise InputError(f"--out {out} is a folder: name a file ending in {_extensions()}, or - for CSV on stdout")
    kind = format or EXTENSIONS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"--out {out}: unknown extension {path.suffix or '(none)'}: use {_extensions()}, or -")
    if path.exists() and not force:
        raise InputError(f"--out {out} exists already: choose another path, or replace it with --force")
    check_writable(out, path.parent)
    return DrawDestination(kind, path)


def write_draws(
    destination: DrawDestination,
    columns: Sequence[str],
    values: Any,
    lp_approx: Any = None,
    lp: Any = None,
    chains: int = 1,
    note: str = "",
) -> bytes | None:
    """Write draws `(n, p)` in one atomic step; a stream's bytes are returned instead, for the caller to send.

    `values`, `lp_approx` and `lp` `(n,)` are arrays or tensors on the CPU; None is written as NaN. Every format keeps
    float64 to the last bit. NetCDF restores vectors and matrices from names like `beta[2,1]`, counts from 1, splits
    the rows into `chains`, and keeps `note`. Raises InputError for shapes and names that do not fit, RunError if the
    disk is full; nothing half-written stays.
    """
    table = _checked(columns, values, lp_approx, lp)
    if destination.path is None:
        return csv_bytes(table)
    with clear_errors(destination.path), atomic_file(destination.path) as temporary:
        if destination.format == "csv":
            temporary.write_bytes(csv_bytes(table))
        elif destination.format == "parquet":
            _write_parquet(temporary, table)
        else:
            _write_netcdf(temporary, table, chains, note)
    return None


def csv_bytes(table: DrawTable) -> bytes:
    """A header and one draw a row, `lp_approx__,lp__` first; numbers in the fewest digits that give them back.

    Names that hold a comma are quoted (`"Sigma[2,1]"`), as every CSV reader expects.
    """
    import pyarrow.csv  # three times as fast as Python's own

    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow([*STAN_COLUMNS, *table.columns])
    body = io.BytesIO()
    pyarrow.csv.write_csv(_arrow(table), body, pyarrow.csv.WriteOptions(include_header=False))
    return header.getvalue().encode() + body.getvalue()


def read_draws(path: Path) -> DrawTable:
    """Read draws back from `.parquet`, or from CSV, CmdStan's with `#` comments included; lp is NaN where absent.

    Raises InputError if the file is missing, or is no table of numbers.
    """
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            header = list(table.column_names)
            rows = np.column_stack([np.asarray(column, np.float64) for column in table.columns])
        else:
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
            header = next(csv.reader(lines[:1]), [])
            rows = np.array([line.split(",") for line in lines[1:]], np.float64).reshape(
                max(len(lines) - 1, 0), len(header)
            )
    except FileNotFoundError as err:
        raise InputError(f"{path} does not exist") from err
    except (OSError, ValueError, UnicodeDecodeError) as err:
        raise InputError(f"{path} holds no table of draws ({str(err).splitlines()[0]})") from err
    if not header:
        raise InputError(f"{path} is empty: it needs a header and one row a draw")
    unknown = np.full(len(rows), math.nan)
    lp_approx, lp = (rows[:, header.index(name)] if name in header else unknown for name in STAN_COLUMNS)
    kept = [j for j, name in enumerate(header) if name not in STAN_COLUMNS]
    return DrawTable(tuple(header[j] for j in kept), rows[:, kept], lp_approx, lp)


def restore_arrays(columns: Sequence[str], values: Float64[np.ndarray, "n p"]) -> dict[str, np.ndarray]:
    """Columns `beta[1]`, `beta[2]` become `beta (n, 2)`; `Sigma[2,1]` likewise; all others stay scalars `(n,)`.

    An index that is not a full grid from 1 leaves its columns as they are, each under its own name.
    """
    grouped: dict[str, dict[tuple[int, ...], int]] = {}
    for j, column in enumerate(columns):
        match = _INDEXED.fullmatch(column)
        name = match["name"] if match else column
        index = tuple(int(i) for i in match["index"].split(",")) if match else ()
        grouped.setdefault(name, {})[index] = j
    found: dict[str, np.ndarray] = {}
    for name, places in grouped.items():
        shape = tuple(np.max(list(places), axis=0)) if len({len(index) for index in places}) == 1 else None
        if shape is None or math.prod(int(size) for size in shape) != len(places) or any(0 in i for i in places):
            found.update({columns[j]: values[:, j] for j in places.values()})
            continue
        ordered = [places[index] for index in sorted(places)]  # row-major
        found[name] = values[:, ordered].reshape(len(values), *(int(size) for size in shape))
    return found


def _checked(columns: Sequence[str], values: Any, lp_approx: Any, lp: Any) -> DrawTable:
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise InputError(f"{len(columns)} names for draws of shape {rows.shape}: one name a column is needed")
    if len(set(columns)) < len(columns):
        twice = next(name for j, name in enumerate(columns) if name in columns[:j])
        raise InputError(f'two parameters are called "{twice}": rename one')
    taken = sorted(set(columns) & set(STAN_COLUMNS))
    if taken:
        raise InputError(f'a parameter is called "{taken[0]}", which the draws need for themselves: rename it')
    unknown = np.full(len(rows), math.nan)
    densities = [unknown if density is None else np.asarray(density, np.float64) for density in (lp_approx, lp)]
    if any(density.shape != (len(rows),) for density in densities):
        raise InputError(f"log densities of shapes {[d.shape for d in densities]} for {len(rows)} draws")
    return DrawTable(tuple(columns), rows, *densities)


def _arrow(table: DrawTable) -> Any:
    import pyarrow

    columns = (table.lp_approx, table.lp, *table.values.T)
    names = [*STAN_COLUMNS, *table.columns]
    return pyarrow.table([pyarrow.array(np.ascontiguousarray(column)) for column in columns], names)


def _write_parquet(path: Path, table: DrawTable) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(_arrow(table), path)


def _write_netcdf(path: Path, table: DrawTable, chains: int, note: str) -> None:
    if chains < 1 or len(table.values) % chains:
        raise InputError(f"{len(table.values)} draws are not {chains} chains of one length")

    def by_chain(array: np.ndarray) -> np.ndarray:
        return array.reshape(chains, -1, *array.shape[1:])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version once a day
        import arviz

        named = restore_arrays(table.columns, table.values)
        data = arviz.from_dict(
            posterior={name.replace("/", _SLASH): by_chain(array) for name, array in named.items()},
            sample_stats={"lp": by_chain(table.lp), "lp_approx": by_chain(table.lp_approx)},
            index_origin=1,
            attrs={"inference_library": "hsivi", "inference_library_version": hsivi_cli.__version__, "note": note},
        )
        data.to_netcdf(str(path), compress=False)


def _extensions() -> str:
    return ", ".join(EXTENSIONS)

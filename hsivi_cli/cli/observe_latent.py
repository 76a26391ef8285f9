"""`hsivi sample FIT` of a fit made with `--model latent`: latents of new rows, or fantasies of the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsivi_cli.cli import console, options
from hsivi_cli.cli.fit_latent import SHOWN, open_table, write_frame, write_latents
from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    from hsivi_cli.methods.latent_store import OpenedLatent

DEFAULT_FANTASIES = 64
FAR = 0.25
"""A number is far where it lies beyond those seen in its column by that share of their range."""


def is_latent_fit(path: Path) -> bool:
    """Whether a posterior fit is a run of `hsivi fit-posterior --model latent --save`."""
    from hsivi_cli.io.files import read_json
    from hsivi_cli.io.run_directory import CONFIG

    return bool(read_json(path / CONFIG).get("latent_model"))


def sample_latent(
    path: Path,
    observe: str | None,
    n: int | None,
    seed: int,
    out: str | None,
    threads: int,
    force: bool,
    as_json: bool,
) -> None:
    """Latents of the rows of `observe`, with `n` draws of each; without it `n` fantasies."""
    from hsivi_cli.methods.latent_store import open_latent

    options.resolve_device("cpu", threads)
    if observe is not None:
        _latents(path, observe, n or 0, seed, out, force, as_json)
        return
    with console.guarded_stdout():
        opened = open_latent(path)
    _fantasies(opened, path, n or DEFAULT_FANTASIES, seed, out, force, as_json)


def _latents(path: Path, observe: str, n: int, seed: int, out: str | None, force: bool, as_json: bool) -> None:
    from hsivi_cli.methods.latent_fit import latent_frame, latents_of, of_method
    from hsivi_cli.methods.latent_store import open_latent, read_new_rows

    destination = open_table(out, force) if out else None
    with console.guarded_stdout():
        opened = open_latent(path)
        with console.progress("reading", 1, lines=True) as bar:
            rows, x = read_new_rows(opened, observe, bar.to)
        _tell_gaps(opened, x)
        far = _far(opened, x)
        if far is not None and bool(far.any()):
            row, column = (int(place) for place in far.nonzero()[0])
            console.warn(
                f"{int(far.any(1).sum())} of {len(x)} rows have a number far beyond those the fit has seen in its "
                f'column (the first: row {row + 1}, "{opened.columns[column]}" is {float(x[row, column]):g}): the '
                "encoder extrapolates there"
            )
        with console.progress("latents", len(x), lines=True) as bar:
            found = of_method(latents_of(opened.posterior, opened.model, x, seed, n, bar.to), opened.name)
    stream = write_latents(destination, found, rows.other) if destination is not None else None
    verdict = opened.report["verdict"]
    line = f"the fit said: {verdict['level']}: {'; '.join(verdict['reasons'])}"
    if stream is not None:
        console.result_bytes(stream)
        console.story(line)
    elif as_json:
        means, sds = found.mean.tolist(), found.sd.tolist()
        facts: dict[str, Any] = {"fit": str(path), "observe": observe, "rows": len(x), "out": out, "verdict": verdict}
        if destination is None:
            facts |= {"mean": means, "sd": sds}
        console.result_json(facts)
    else:
        frame = latent_frame(found, rows.other)
        shown = frame.iloc[:SHOWN, : 2 + 2 * found.mean.shape[1] + 6]
        lines = [tuple(_cell(value) for value in row) for row in shown.itertuples(index=False)]
        console.result_table(f"{opened.name}: latents of {len(frame)} rows", lines, tuple(map(str, shown.columns)))
        if len(frame) > SHOWN:
            console.result_line(f"... and {len(frame) - SHOWN} more: --out latents.csv writes them all")
        console.result_line(line)


def _fantasies(
    opened: "OpenedLatent", path: Path, n: int, seed: int, out: str | None, force: bool, as_json: bool
) -> None:
    """Draws of the model itself: pictures for images (their expected pixels), rows of numbers otherwise."""
    import torch

    from hsivi_cli.io.samples import FORMATS, open_destination, write_samples

    images = opened.shape is not None
    wanted = out or ("grid.png" if images else "-")
    generator = torch.Generator().manual_seed(seed)
    with console.guarded_stdout():
        z, x = opened.model.fantasies(n, generator)
    stream: bytes | memoryview | None
    if images and Path(wanted).suffix.lower() not in (".csv", ".parquet"):
        assert opened.shape is not None
        place = open_destination(wanted, opened.shape[2], force)
        if wanted == "-" and console.stdout().isatty():
            raise InputError("--out - would print binary data on the terminal: pipe it, or name a file")
        with torch.no_grad():  # a picture of the noise of pixels shows nothing
            mean = opened.model.reconstruct(z).reshape(n, *opened.shape)
        pixels = (mean.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        stream = write_samples(place, [pixels])
    else:
        if Path(wanted).suffix.lower() in FORMATS and not images:
            raise InputError(f"--out {wanted}: the fit is of rows of numbers: use .csv, .parquet, or - for CSV")
        import pandas

        table = open_table(wanted, force)
        columns = [*(f"z{j + 1}" for j in range(z.shape[1])), *opened.columns]
        stream = write_frame(table, pandas.DataFrame(torch.cat([z, x], 1).float().numpy(), columns=columns))
    if stream is not None:
        console.result_bytes(stream)
    elif as_json:
        console.result_json({"fit": str(path), "n": n, "seed": seed, "out": wanted})
    else:
        console.result_line(wanted)


def _tell_gaps(opened: "OpenedLatent", x: Any) -> None:
    missing = x.isnan()
    rows, empty = int(missing.any(1).sum()), int(missing.all(1).sum())
    if rows and not opened.gaps:
        console.warn(
            f"{rows} of {len(x)} rows lack numbers, and the fit has seen none that do: its encoder was never taught to "
            "leave them out; fit to rows with gaps for such rows"
        )
    if empty:
        console.warn(f"{empty} of {len(x)} rows have no number at all: their latents are the prior's")


def _far(opened: "OpenedLatent", x: Any) -> Any:
    """Which numbers (n, D) lie far out; None where none can."""
    if opened.seen is None:
        return None
    low, high = opened.seen
    margin = FAR * (high - low)
    return (x < low - margin) | (x > high + margin)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

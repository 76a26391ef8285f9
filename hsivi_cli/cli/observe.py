"""`hsivi sample FIT --observe new.csv`: posteriors of new observations, in one pass of an amortised fit's encoder."""

from pathlib import Path

from hsivi_cli.cli import console, options
from hsivi_cli.cli.fit_amortised import DEFAULT_DRAWS, show_rows
from hsivi_cli.errors import InputError


def observe_rows(
    path: Path,
    observe: str | None,
    model: str | None,
    refine: str,
    n: int | None,
    seed: int,
    out: str | None,
    threads: int,
    force: bool,
    as_json: bool,
) -> None:
    """Draw for the rows of `observe`, by default those of the fit; raises InputError for what is wrong with either."""
    from hsivi_cli.io.draw_files import open_draws
    from hsivi_cli.io.tables import read_table
    from hsivi_cli.methods.amortised_draws import draw_rows, names_of
    from hsivi_cli.methods.amortised_report import report_on_rows
    from hsivi_cli.methods.amortised_store import observe as read
    from hsivi_cli.methods.amortised_store import open_amortised
    from hsivi_cli.targets.source import TABLE

    options.check_choice("--refine", refine, ("auto", "none"))
    count = n or DEFAULT_DRAWS
    options.resolve_device("cpu", threads)
    destination = open_draws(out, None, force) if out else None
    with console.guarded_stdout():
        opened = open_amortised(path, model)
        name = "stdin" if observe == "-" else observe or "the table of the fit"
        if observe is not None and observe.endswith(".json"):
            raise InputError(f"--observe {observe}: a CSV, TSV or parquet table is wanted, an observation in each row")
        x = read(opened, read_table(observe or str(path / TABLE)), name)
        if x.shape[1] != (width := opened.encoder_width):
            raise InputError(f"{name}: an observation has {x.shape[1]} numbers, the fit was made with {width}")
        if opened.target is None:
            console.story("draws of the encoder alone, unchecked: with --model they are checked and corrected")
        with console.progress("observations", len(x)) as bar:
            rows = draw_rows(opened.encoder, x, count, seed, opened.constrain, opened.target, refine, on_row=bar.to)
        columns = tuple(names_of(opened.constrain, opened.encoder.dim))
        beyond = opened.encoder.beyond(x)
        told = "encoder alone: not checked, its fit ended before"
        inherited = (str(opened.report.get("encoder", told)), opened.report.get("calibrated"))
        report = report_on_rows(opened.config.method, columns, rows, None, beyond, inherited=inherited)
    show_rows(report, count, destination, as_json, {"out": out, "fit": str(path), "observe": observe})

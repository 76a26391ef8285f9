"""`hsivi fit-posterior rows.csv --model latent`: a decoder explains each row from a few latents; a map of the rows."""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsivi_cli.cli import console, options
from hsivi_cli.cli.fit_output import SECONDS_BETWEEN_LINES, Wanted
from hsivi_cli.errors import GateError, InputError

if TYPE_CHECKING:
    from hsivi_cli.io.draw_files import DrawDestination
    from hsivi_cli.methods.latent_fit import Latents, Prepared, Trained
    from hsivi_cli.methods.latent_registry import LatentOptions
    from hsivi_cli.methods.latent_report import LatentReport
    from hsivi_cli.targets.latent import LatentModel

LATENT = "latent"
"""The word that `--model` takes in place of a file; a file of that name is ./latent."""
SHOWN = 8  # rows of a table of latents that are printed


def options_from(
    method: str,
    prior: tuple[str, ...],
    compare: str | None,
    paper: bool,
    **fields: Any,
) -> "LatentOptions":
    """The options as one object; raises InputError for what means nothing together."""
    from hsivi_cli.io.rows import name_columns
    from hsivi_cli.methods.latent_registry import PAPER, LatentOptions, check_latent

    if len(prior) > 1 or (prior and "=" in prior[0]):
        raise InputError(f"--prior {prior[-1]}: --model latent has one prior, named as --prior pinwheel")
    compared = tuple(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip())) if compare else ()
    if compare is not None and not compared:
        raise InputError("--compare is empty: name methods, as --compare vae,iaf,ddvi")
    chosen = "ddvi" if method == "auto" else method
    if method == "auto" and compared and "ddvi" not in compared:
        chosen = compared[0]
    if paper and chosen != "ddvi":
        raise InputError(f"--paper does nothing for --method {chosen}: it belongs to ddvi")
    if paper:
        chosen = PAPER
    given = {name: value for name, value in fields.items() if value is not None}
    if "columns" in given:
        given["columns"] = name_columns(given["columns"])
    found = LatentOptions(chosen, prior=prior[0] if prior else None, compare=compared, **given)
    check_latent(found)
    return found


def fit_latent(source: str | None, settings: "LatentOptions", wanted: Wanted) -> None:
    """Train, measure on rows held out, write the latents and the map, and say what they are worth."""
    from hsivi_cli.evaluation.posterior_plot import check_plot_path
    from hsivi_cli.methods.latent_fit import in_order, latents_of, of_method, prepare, read_latent, train
    from hsivi_cli.methods.latent_report import report_on_fit
    from hsivi_cli.methods.latent_store import digest_of, save_latent, settings_of
    from hsivi_cli.methods.posterior_store import check_save, fit_directory
    from hsivi_cli.targets.source import Source

    if source is None:
        raise InputError("no rows: name a CSV, parquet, .npy, idx, PLINK or VCF file, an image folder, or digits")
    options.resolve_device("cpu", wanted.threads)
    destination = open_table(wanted.out, wanted.force) if wanted.out else None
    if wanted.save is not None:
        check_save(wanted.save, wanted.resume)  # before a large table is read
    if wanted.plot is not None:
        check_plot_path(wanted.plot, wanted.force)
    with console.guarded_stdout():
        with console.progress("reading", 1, lines=True) as bar:
            rows = read_latent(source, settings, bar.to)
        digest = digest_of(rows)
        prepared = prepare(rows, settings)
        for fact in prepared.facts:
            console.story(fact)
        keep = settings_of(settings)
        with fit_directory(wanted.save, Source(source), digest, keep, wanted.draws or 0, wanted.resume) as directory:
            reports: list[LatentReport] = []
            fits: list[Trained] = []
            for name in settings.methods:
                own = directory if name == settings.method else directory / "compare" / name
                own.mkdir(parents=True, exist_ok=True)
                _announce(prepared, name, settings)
                trained = train(prepared, name, settings, own, training_lines(), wanted.resume)
                with console.progress("measuring", 3) as bar:
                    gap = len(settings.methods) > 1
                    reports.append(report_on_fit(trained, prepared, settings.iwae, settings.seed, gap, bar))
                fits.append(trained)
            tree = reports[0].to_json() | _compared(reports)
            if wanted.save is not None:
                save_latent(directory, fits[0], prepared, tree, settings.binarise)
        latents = None
        if destination is not None or wanted.plot is not None:
            with console.progress("latents", len(rows), lines=True) as bar:
                first = fits[0]
                shown = wanted.draws or 0
                found = latents_of(first.posterior, first.model, prepared.values, settings.seed, shown, bar.to)
            latents = in_order(found, prepared.order)
    if wanted.plot is not None and latents is not None:
        _plot(wanted.plot, latents, prepared, settings, fits[0].model)
    stream = None
    if destination is not None and latents is not None:
        asked = of_method(latents if wanted.draws else replace(latents, draws=None), settings.method)
        stream = write_latents(destination, asked, rows.other)
    also = {"out": wanted.out, "save": str(wanted.save) if wanted.save else None}
    _show(reports, stream, tree | also, wanted.as_json)


def training_lines() -> Any:
    """A line on stderr now and then, with the time that is left."""
    told = began = time.monotonic()

    def on_log(record: dict[str, Any]) -> None:
        nonlocal told
        if time.monotonic() - told < SECONDS_BETWEEN_LINES and record["step"] != record["steps"]:
            return
        told = time.monotonic()
        known = ("bound", "elbo", "sleep", "log_likelihood", "reconstruction")
        words = "  ".join(f"{name.replace('_', ' ')} {record[name]:.3f}" for name in known if name in record)
        left = record["seconds_per_step"] * (record["steps"] - record["step"])
        until = f"about {left:.0f} s left" if left > 1 else f"{time.monotonic() - began:.0f} s"
        console.story(f"{record['method']} step {record['step']:>6}/{record['steps']}  {words}  {until}")

    return on_log


def open_table(out: str, force: bool) -> "DrawDestination":
    """Where a table of latents goes: CSV or parquet. Raises InputError for another kind, or a place not to be had."""
    from hsivi_cli.io.draw_files import open_draws

    destination = open_draws(out, None, force)
    if destination.format == "netcdf":
        raise InputError(f"--out {out}: latents are a table: use .csv, .parquet, or - for CSV on stdout")
    return destination


def write_latents(destination: "DrawDestination", latents: "Latents", beside: Any) -> bytes | None:
    """Write the latents in one step; a stream's bytes are returned instead."""
    from hsivi_cli.methods.latent_fit import latent_frame

    frame = latent_frame(latents, beside)
    stream = write_frame(destination, frame)
    if destination.path is not None:
        console.story(f"latents of {len(frame)} rows written to {destination.path}")
    return stream


def write_frame(destination: "DrawDestination", frame: Any) -> bytes | None:
    """Write a table as CSV or parquet in one step; a stream's bytes are returned instead."""
    from hsivi_cli.io.files import atomic_file, clear_errors

    if destination.path is None:
        text: str = frame.to_csv(index=False)
        return text.encode()
    with clear_errors(destination.path), atomic_file(destination.path) as temporary:
        if destination.format == "parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False)
    return None


def _announce(prepared: "Prepared", name: str, settings: "LatentOptions") -> None:
    from hsivi_cli.methods.latent_registry import METHODS, only

    model = prepared.model
    own = only(settings, name).settings
    words = METHODS[name].words + (f" ({', '.join(own)})" if own else "")
    prior = f"{model.clusters} clusters" if model.clusters else model.prior
    prior = "normal" if name == "pca" else prior
    console.story(
        f"{name}: {words}; {prepared.train} rows of {prepared.values.shape[1]} numbers, "
        f"{model.latent} latent{'s' if model.latent > 1 else ''}, prior {prior}"
    )


def _compared(reports: "list[LatentReport]") -> dict[str, Any]:
    """Each method's figures, with its paired differences to the first one's."""
    if len(reports) == 1:
        return {}
    first = reports[0]
    against = [None if report is first else report.less(first) for report in reports]
    found = [None if less is None else {"method": first.method} | asdict(less) for less in against]
    trees = [report.to_json() | {"less": less} for report, less in zip(reports, found, strict=True)]
    return {"compared": trees}


def _plot(
    path: Path, latents: "Latents", prepared: "Prepared", settings: "LatentOptions", model: "LatentModel"
) -> None:
    from hsivi_cli.evaluation.latent_plot import plot_map
    from hsivi_cli.methods.latent_registry import MANY_MODES
    from hsivi_cli.methods.latent_scores import cluster_circles, map_points

    other, column = prepared.rows.other, settings.color_by or settings.labels or settings.group_by
    group = settings.group_by or (settings.labels if settings.color_by else None)
    colour = other[column].to_numpy() if other is not None and column else None
    groups = other[group].to_numpy() if other is not None and group and group != column else None
    config = prepared.model
    circles = cluster_circles(model.prior)
    drawn = " (circles: two sds)" if circles is not None else ""
    prior = f"{config.clusters} clusters{drawn}" if config.clusters else f"prior {config.prior}"
    each = ", a typical draw of each" if settings.method in MANY_MODES else ""
    title = f"{settings.method}: {len(latents.mean)} rows{each}, {prior}"
    points = map_points(settings.method, latents).double().numpy()
    plot_map(path, points, colour, column or "", groups=groups, circles=circles, title=title)
    console.story(f"map: {path}")


def _show(reports: "list[LatentReport]", stream: bytes | None, tree: dict[str, Any], as_json: bool) -> None:
    first = reports[0]
    if stream is not None:
        console.result_bytes(stream)
    elif as_json:
        console.result_json(tree)
    else:
        _print(reports)
    if first.verdict.level == "no":
        raise GateError("do not use these draws" if stream is None else first.verdict.line)
    if stream is not None:
        console.story(first.verdict.line)


def _print(reports: "list[LatentReport]") -> None:
    first = reports[0]
    scores = list(dict.fromkeys(name for report in reports for name in report.scores))
    header = (
        "method",
        "true ELBO",
        f"IWAE-{first.iwae_samples}",
        *((f"less {first.method}'s",) if len(reports) > 1 else ()),
        *scores,
        "explained",
        "in use",
        "k-hat > 0.7",
        "CPU s",
    )
    lines = []
    for report in reports:
        high = "-"
        if report.khats:
            high = f"{sum(khat > 0.7 for khat in report.khats) / len(report.khats):.0%}"
        cells: tuple[str, ...] = (
            report.method,
            _figure(report.elbo, report.elbo_se),
            _figure(report.iwae, report.iwae_se),
        )
        if len(reports) > 1:
            less = None if report is first else report.less(first)
            cells += ("-" if less is None else _figure(less.iwae, less.iwae_se, "+"),)
        own = tuple(f"{report.scores[name]:.3f}" if name in report.scores else "-" for name in scores)
        more = (f"{report.explained:.1%}", f"{report.used} of {report.latent}", high, f"{report.seconds:.1f}")
        lines.append((*cells, *own, *more))
    whose = "held out" if first.held_out else "that were trained on"
    console.result_table(f"nats a row (s.e.), {first.rows} rows {whose}", lines, header)
    console.result_line("")
    _print_clusters(reports)
    if "latent NLL" in scores:
        from hsivi_cli.evaluation.latent_metrics import RUN_BANDWIDTHS

        widths = ", ".join(f"{width:g}" for width in RUN_BANDWIDTHS)
        console.result_line(f"latent NLL: of draws of the prior under kernels on the latents, bandwidths {widths}")
    if any(report.less(first) is not None for report in reports[1:]):
        console.result_line(
            f"less {first.method}'s: IWAE row by row, s.e. over rows; another --seed may change it by more"
        )
    for report in reports:
        if report.pseudo_elbo is not None:
            console.result_line(f"{report.method}: what it calls an ELBO is {report.pseudo_elbo:.3f}, not a bound")
    for report in reports[1:]:
        console.result_line(f"{report.method}: {report.verdict.line}")
    console.result_line(first.verdict.line if len(reports) == 1 else f"{first.method}: {first.verdict.line}")


def _print_clusters(reports: "list[LatentReport]") -> None:
    lines = [
        (report.method, source, *(f"{value:.3f}" for value in (found.purity, found.completeness, found.nmi)))
        for report in reports
        for source, found in report.clusters.items()
    ]
    if lines:
        console.result_table("clusters against classes", lines, ("method", "of", "purity", "completeness", "NMI"))
        console.result_line("")


def _figure(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:{sign}.3f}" + (f" ({error:.2g})" if error is not None and not math.isnan(error) else "")

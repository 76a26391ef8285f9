"""`hsivi fit-posterior --amortize`: one encoder for all rows of a table, and for rows yet to come."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsivi_cli.cli import console, options
from hsivi_cli.cli.fit_output import SECONDS_BETWEEN_LINES, Wanted
from hsivi_cli.errors import GateError, InputError

if TYPE_CHECKING:
    from hsivi_cli.io.draw_files import DrawDestination
    from hsivi_cli.methods.amortised_draws import RowDraws
    from hsivi_cli.methods.amortised_options import AmortisedOptions
    from hsivi_cli.methods.amortised_report import AmortisedReport
    from hsivi_cli.targets.amortised import AmortisedTarget
    from hsivi_cli.targets.encoder_check import EncoderCheck
    from hsivi_cli.targets.source import Source

DEFAULT_DRAWS, REPLICATIONS, CHECK_DRAWS = 1000, 500, 99
SHOWN = 12  # observations in the table; of more, the worst


@dataclass(frozen=True)
class AmortisedWanted(Wanted):
    """And how draws are corrected, and by how many simulated observations the encoder is checked."""

    refine: str = "auto"
    sbc: int | None = None


def fit_amortised(source: "Source", settings: "AmortisedOptions", wanted: AmortisedWanted) -> None:
    """Train, draw for every row, check and show. Raises what these raise."""
    from hsivi_cli.evaluation.posterior_plot import check_plot_path
    from hsivi_cli.io.draw_files import open_draws
    from hsivi_cli.io.files import write_json
    from hsivi_cli.io.run_directory import REPORT
    from hsivi_cli.methods.amortised_draws import draw_rows, names_of
    from hsivi_cli.methods.amortised_options import check_amortised, configure
    from hsivi_cli.methods.amortised_report import report_on_rows
    from hsivi_cli.methods.amortised_store import save_amortised, settings_of, train
    from hsivi_cli.methods.posterior_store import fit_directory
    from hsivi_cli.targets.amortised import load_amortised
    from hsivi_cli.targets.source import read_source

    if source.model is None:
        raise InputError("--amortize needs --model: a file that says what is observed in a row, and its likelihood")
    if wanted.refine not in ("auto", "none"):
        raise InputError(f"--refine {wanted.refine} does nothing with --amortize: use auto or none")
    check_amortised(settings)
    options.resolve_device("cpu", wanted.threads)
    n, plot = wanted.draws or DEFAULT_DRAWS, wanted.plot
    destination = open_draws(wanted.out, None, wanted.force) if wanted.out else None
    if plot is not None:
        check_plot_path(plot, wanted.force)
    with console.guarded_stdout():
        table = read_source(source)
        target = load_amortised(Path(source.model), table)
        for fact in target.facts:
            console.story(fact)
        config = configure(settings, target)
        if wanted.sbc and (target.simulate is None or target.sample_prior is None):
            raise InputError(
                f"--sbc needs a model that simulates: give {target.name} simulate=... and sample_prior=..."
            )
        _announce(target, config)
        with fit_directory(
            wanted.save, source, table, settings_of(config) | {"draws_of_a_row": n}, n, wanted.resume
        ) as directory:
            state = train(target, config, directory, _training_lines(config.method), wanted.resume)
            if state.lost:
                console.warn(f"{state.lost} of {state.simulated} simulations were not finite and are left out")
            if wanted.save is not None:
                save_amortised(directory, state, source, table)
            console.story(f"drawing and checking {n} draws of each observation")
            with console.progress("observations", len(target.observed)) as bar:
                rows = draw_rows(
                    state.encoder,
                    target.observed,
                    n,
                    config.seed,
                    target.constrain,
                    target,
                    wanted.refine,
                    bar.to,
                )
            check = _check(target, state.encoder, wanted.sbc, config.seed)
            columns = tuple(names_of(target.constrain, target.dim))
            simulated = (state.simulated, state.lost)
            report = report_on_rows(config.method, columns, rows, check, simulated=simulated)
            if wanted.save is not None:
                write_json(directory / REPORT, report.to_json())
    if plot is not None:
        _plot(plot, report)
    also = {"out": wanted.out, "save": str(wanted.save) if wanted.save else None}
    show_rows(report, n, destination, wanted.as_json, also)


def show_rows(
    report: "AmortisedReport", n: int, destination: "DrawDestination | None", as_json: bool, also: dict[str, Any]
) -> None:
    """Write the draws, an observation after the other, and print what they are worth; exit code 3 if nothing."""
    from hsivi_cli.methods.amortised_report import outside

    if report.beyond is not None and bool((report.beyond > 0).any()):
        console.warn(outside(report.beyond))
    stream = None
    if destination is not None:
        stream = _write(report, destination)
        if destination.path is not None:
            console.story(f"{n} draws of each of {len(report.rows)} observations written to {destination.path}")
    if stream is not None:
        console.result_bytes(stream)
    elif as_json:
        console.result_json(report.to_json() | also)
    else:
        _print(report)
    if report.verdict.level == "no":
        raise GateError("do not use these draws" if stream is None else report.verdict.line)
    if stream is not None:
        console.story(report.verdict.line)


def _announce(target: "AmortisedTarget", config: Any) -> None:
    words = {"smc-wake": f"estimator ({config.estimator})", "npe": "simulated pairs"}.get(config.method, "")
    learned = f", {config.sleep:.0%} of the gradient from simulations" if config.sleep else ""
    console.story(
        f"{config.method}{', ' if words else ''}{words}{learned}: {len(target.observed)} observations of "
        f"{target.observed.shape[1]} numbers, {target.dim} unknowns, encoder {config.encoder.family}"
    )


def _training_lines(method: str) -> Any:
    told = began = time.monotonic()

    def on_log(record: dict[str, Any]) -> None:
        nonlocal told
        if time.monotonic() - told < SECONDS_BETWEEN_LINES and record["step"] != record["steps"]:
            return
        told = time.monotonic()
        losses = {name: value for name, value in record.items() if name.endswith(("cross_entropy", "held_out"))}
        words = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in losses.items())
        left = record["seconds_per_step"] * (record["steps"] - record["step"])
        until = f"  about {left:.0f} s left" if left > 1 else f"  {time.monotonic() - began:.0f} s"
        console.story(f"{method} step {record['step']:>6}/{record['steps']}  {words}{until}")

    return on_log


def _check(target: "AmortisedTarget", encoder: Any, asked: int | None, seed: int) -> "EncoderCheck | None":
    from hsivi_cli.engine.seeds import Stream
    from hsivi_cli.engine.seeds import generator as named_generator
    from hsivi_cli.targets.encoder_check import check_encoder

    if asked == 0 or (asked is None and target.simulate is None):
        return None
    console.story(f"checking the encoder on {asked or REPLICATIONS} simulated observations")
    generator = named_generator(seed, Stream.CHECK)
    return check_encoder(target, encoder.draw, encoder.log_prob, asked or REPLICATIONS, CHECK_DRAWS, generator)


def _write(report: "AmortisedReport", destination: "DrawDestination") -> bytes | None:
    import torch

    from hsivi_cli.io.draw_files import write_draws

    rows = report.rows
    number = torch.arange(1, len(rows) + 1, dtype=torch.float64).repeat_interleave(len(rows[0].values))
    values = torch.cat([number[:, None], torch.cat([row.values for row in rows])], 1)
    approx, log_prob = (torch.cat([getattr(row, name) for row in rows]) for name in ("log_approx", "log_prob"))
    return write_draws(
        destination, ("observation", *report.columns), values, approx, log_prob, note=report.verdict.line
    )


def _print(report: "AmortisedReport") -> None:
    order = list(range(len(report.rows)))
    if len(order) > SHOWN:
        order = sorted(sorted(order, key=lambda i: -_doubt(report.rows[i]))[:SHOWN])
    names = report.columns[:4]
    more = ["..."] if len(report.columns) > 4 else []
    header = ("observation", "draws by", "k-hat", "ess", "log Z", *(f"{name} (sd)" for name in names), *more)
    rows = [_cells(report.rows[i], i, len(names), more) for i in order]
    whose = (
        f"{len(report.rows)} observations"
        if len(order) == len(report.rows)
        else (f"{len(report.rows)} observations, the {SHOWN} with the largest k-hat")
    )
    console.result_table(f"{report.method}: {len(report.rows[0].values)} draws of each of {whose}", rows, header)
    console.result_line("")
    console.result_line(report.encoder)
    console.result_line(report.verdict.line)


def _cells(row: "RowDraws", i: int, parameters: int, more: list[str]) -> tuple[str, ...]:
    figures = [f"{m:.3g} ({s:.2g})" for m, s in zip(row.mean.tolist(), row.sd.tolist(), strict=True)][:parameters]
    khat = "-" if math.isnan(row.khat) else f"{row.khat:.2f}"
    ess = "-" if math.isnan(row.ess) else f"{row.ess:.0f}"
    log_z = "-" if math.isnan(row.log_z) else f"{row.log_z:.3f}"
    return (str(i + 1), row.route, khat, ess, log_z, *figures, *more)


def _doubt(row: "RowDraws") -> float:
    return 2.0 + row.khat if row.route == "smc" else row.khat if not math.isnan(row.khat) else 0.0


def _plot(path: Path, report: "AmortisedReport") -> None:
    import numpy as np
    import torch

    from hsivi_cli.evaluation.amortised_plot import plot_amortised, plot_encoder_check
    from hsivi_cli.evaluation.verdict import WORDS

    draws = torch.stack([row.values for row in report.rows]).numpy()
    plot_amortised(path, report.columns, draws, f"{report.method}: {WORDS[report.verdict.level]}")
    console.story(f"picture: {path}")
    if report.check is not None:
        beside = path.with_name(f"{path.stem}-check{path.suffix}")
        khats = np.array([row.khat for row in report.rows])
        shown = None if np.isnan(khats).all() else khats
        plot_encoder_check(beside, report.check.sbc, report.check.coverage, shown, report.encoder)
        console.story(f"diagnostics of the encoder: {beside}")

"""What the posterior commands print and write: draws, a summary of them, the verdict, and lines about progress."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsivi_cli.cli import console
from hsivi_cli.errors import GateError

if TYPE_CHECKING:
    from hsivi_cli.io.draw_files import DrawDestination
    from hsivi_cli.methods.posterior import Posterior
    from hsivi_cli.methods.posterior_report import PosteriorReport
    from hsivi_cli.methods.refine import OnProgress, Progress

SECONDS_BETWEEN_LINES = console.SECONDS_BETWEEN_LINES


@dataclass(frozen=True)
class Wanted:
    """What to do beside training: how many draws, and where everything goes."""

    draws: int | None
    out: str | None
    save: Path | None
    resume: bool
    plot: Path | None
    force: bool
    threads: int
    as_json: bool


def show(
    report: "PosteriorReport",
    posterior: "Posterior",
    draws: int,
    destination: "DrawDestination | None",
    as_json: bool,
    also: dict[str, Any],
) -> None:
    """Write the first `draws` draws, print the summary of all; exit code 3 where they are not to be used."""
    from hsivi_cli.io.draw_files import write_draws

    stream = None
    if destination is not None:
        note = f"{report.method}, {report.route}; {report.verdict.line}"
        approx = None if posterior.log_approx is None else posterior.log_approx[:draws]
        values, log_prob = posterior.values[:draws], posterior.log_prob[:draws]
        stream = write_draws(destination, posterior.columns, values, approx, log_prob, note=note)
    if destination is not None and destination.path is not None:
        kept = f"{len(values)} draws written to {destination.path}"
        console.story(kept if report.n == len(values) else f"{kept}; the summary is of {report.n}")
    if stream is not None:
        console.result_bytes(stream)
    elif as_json:
        console.result_json(report.to_json() | {"draws": draws} | also)
    else:
        _print(report)
    if report.verdict.level == "no":
        raise GateError("do not use these draws" if stream is None else report.verdict.line)
    if stream is not None:
        console.story(report.verdict.line)


def progress_lines() -> "OnProgress":
    """A line on stderr now and then, with an estimate of the time left."""
    began = told = time.monotonic()

    def on_progress(progress: "Progress") -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > SECONDS_BETWEEN_LINES:
            told = now
            left = (now - began) * (1 - progress.share) / max(progress.share, 0.01)
            console.story(f"{progress.line}; about {left:.0f} s left")

    return on_progress


def _print(report: "PosteriorReport") -> None:
    header = ("parameter", "mean", "sd", "5%", "50%", "95%", "ess", "mcse", "k-hat")
    rows = []
    for row in report.summary:
        figures = (row.mean, row.sd, row.q5, row.q50, row.q95)
        rows.append((row.name, *(f"{figure:.4g}" for figure in figures), f"{row.ess:.0f}", f"{row.mcse:.2g}"))
        rows[-1] += ("-" if row.khat is None else f"{row.khat:.2f}",)
    how = {"weights": "Pareto-smoothed weights", "smc": "tempered SMC and HMC moves", "hmc": "HMC moves"}[report.route]
    # what tempering starts from is the Gaussian, whatever was trained beside it
    if report.method in ("smc", "smc-wake") and report.route == "smc":
        how = report.note
    name = how if report.route == "smc" else f"{report.note or report.method}, corrected by {how}"
    console.result_table(f"{report.n} draws: {name}", rows, header)
    console.result_line("")
    facts = []
    if report.khat is not None:
        facts.append(
            f"k-hat {report.khat:.2f}" + (f" of {report.method} before moves" if report.route != "weights" else "")
        )
    if report.elbo is not None and math.isfinite(report.elbo):
        facts.append(f"ELBO {report.elbo:.3f}{_error(report.elbo_se)}")
    if report.log_z is not None:
        facts.append(f"log Z {report.log_z:.3f}{_error(report.log_z_se)}")
    if report.modes > 1:
        facts.append(f"{report.modes} modes")
    if report.predictive is not None:
        facts.append("predictive p: " + ", ".join(f"{c.name} {c.p:.2f}" for c in report.predictive.statistics))
    if report.calibration is not None:
        found = report.calibration
        facts.append(f"calibration: {found.replications} refits, {'passed' if found.passed else 'failed'}")
    console.result_line("; ".join(facts))
    console.result_line(report.verdict.line)


def _error(se: float | None) -> str:
    return "" if se is None else f" ({se:.2g})"

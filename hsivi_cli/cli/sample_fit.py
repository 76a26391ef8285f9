"""`hsivi sample FIT`: more draws from a posterior that `hsivi fit-posterior --save` kept."""

from pathlib import Path

from hsivi_cli.cli import console, options
from hsivi_cli.cli.fit_output import progress_lines, show

DEFAULT_DRAWS, JUDGED = 4000, 1000


def sample_fit(
    path: Path, model: str | None, n: int | None, seed: int, out: str | None, threads: int, force: bool, as_json: bool
) -> None:
    """Draw from a saved fit by its own route and judge the new draws; raises InputError for what is wrong with it."""
    from hsivi_cli.io.draw_files import open_draws
    from hsivi_cli.methods.posterior import draw_posterior
    from hsivi_cli.methods.posterior_report import report_on
    from hsivi_cli.methods.posterior_store import load_fit, with_verdict_of_fit

    count = DEFAULT_DRAWS if n is None else n
    options.resolve_device("cpu", threads)
    destination = open_draws(out, None, force) if out else None
    with console.guarded_stdout():
        fit = load_fit(path, model)
        # fewer could not be judged; only those asked for are written
        posterior = draw_posterior(fit, max(count, JUDGED), seed, progress_lines())
        report = with_verdict_of_fit(path, report_on(fit, posterior, None, seed))
    show(report, posterior, count, destination, as_json, {"out": out, "fit": str(path)})

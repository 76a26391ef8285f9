"""`hsivi fit-posterior`: draws, a summary and an honest verdict, from a table and a formula or from a user's model."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsivi_cli.cli import configuration, console, options
from hsivi_cli.cli.fit_output import SECONDS_BETWEEN_LINES, Wanted, progress_lines, show
from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    from hsivi_cli.evaluation.calibration import SbcResult
    from hsivi_cli.methods.posterior import Fit, Posterior
    from hsivi_cli.methods.posterior_registry import FitOptions
    from hsivi_cli.methods.posterior_report import PosteriorReport
    from hsivi_cli.targets.density import Density

METHODS = (
    "auto",
    "smc",
    "smc-wake",
    "vi",
    "ula",
    "mcd",
    "uha",
    "ldvi",
    "uha-em",
    "ldvi-em",
    "ldvi-mixed",
    "ldvi-exact",
    "cmcd",
    "hsivi-lb",
    "hsivi-sm",
)
LATENT_METHODS = (
    *("ddvi", "gpvae", "gpvae-fg", "vae", "iwae", "iaf", "nsf"),
    *("hierarchical", "aae", "sa-vae", "vae-decay", "pca"),
)
AMORTISED_ONLY = ("npe", "wake", "defensive-wake", "msc")
DEFAULT_DRAWS = 4000


def fit_posterior(
    data: Annotated[
        str | None,
        typer.Argument(help="CSV, TSV or parquet table, '-' for CSV on stdin; with --model also .json."),
    ] = None,
    formula: Annotated[
        str | None,
        typer.Option(
            "--formula",
            "-f",
            help="As 'y ~ x1 + log(x2) + (1|group)'. Default: the last column on all others.",
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            "--family",
            help="gaussian, bernoulli, binomial, poisson, negative-binomial or student-t; of --model latent gaussian, "
            "bernoulli, binomial or categorical. Default: guessed.",
        ),
    ] = None,
    prior: Annotated[
        list[str] | None,
        typer.Option(
            "--prior",
            help="As 'b=normal(0,10)', 'Intercept=flat', 'sigma=half_cauchy(2.5)'; may repeat. Of --model latent "
            "normal, pinwheel, swiss-roll, square or mixture.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Your Python file that defines model(data) -> hsivi_cli.Model; it is run. Or latent: a map of rows.",
        ),
    ] = None,
    example: Annotated[str | None, typer.Option("--example", help="A named example, or 'list' to see them.")] = None,
    na: Annotated[str, typer.Option("--na", help="Rows with missing values: error or drop.")] = "error",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help=f"{', '.join(METHODS)}; with --amortize smc-wake, {', '.join(AMORTISED_ONLY)}; with --model latent "
            f"{', '.join(LATENT_METHODS)}.",
        ),
    ] = "auto",
    amortize: Annotated[
        bool,
        typer.Option("--amortize", help="With --model: each row is an observation of its own, one encoder serves all."),
    ] = False,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Of smc-wake and --amortize: nsf, maf, gaussian or mixture.")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option("--estimator", help="Of smc-wake: a, b, c, naive or pimh. Default: a.")
    ] = None,
    particles: Annotated[
        int | None, typer.Option("--particles", min=2, help="Of smc-wake, a run; of wake methods and msc, a step.")
    ] = None,
    simulations: Annotated[
        int | None,
        typer.Option("--simulations", min=100, help="With --amortize: so many simulations in all. Default: no limit."),
    ] = None,
    sleep: Annotated[
        float | None,
        typer.Option(
            "--sleep",
            help="Of smc-wake --amortize: share of the gradient from simulations. Default: 0.5 if the model simulates.",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option("--embedding", help="With --amortize: auto, identity, mlp, set, image. With latents: mlp, image."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", help="With --amortize: 10x3 if a row is a set of 10 triples, 1x8x8 if an image."),
    ] = None,
    latent: Annotated[
        int | None, typer.Option("--latent", min=1, help="Of --model latent: how many latents a row has. Default: 2.")
    ] = None,
    clusters: Annotated[
        int | None, typer.Option("--clusters", min=2, help="Of --model latent: a prior of so many learned clusters.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", help="Of --model latent: a column of labels, never data; ddvi learns from it."),
    ] = None,
    color_by: Annotated[
        str | None, typer.Option("--color-by", help="Of --model latent: a column, never data, to colour and score by.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option("--group-by", help="Of --model latent: a column whose groups share a hue on the map.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Of --model latent: the data, as a,b or PC1..PC10. Default: all numbers."),
    ] = None,
    noise: Annotated[
        str | None, typer.Option("--noise", help="Of --model latent, gaussian: column, or shared if all have one unit.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", help="Of --model latent: train these too, as vae,iaf,pca; one table.")
    ] = None,
    iwae: Annotated[
        int | None,
        typer.Option("--iwae", min=1, max=100_000, help="Of --model latent: draws K a row behind log p(x); 64."),
    ] = None,
    hold_out: Annotated[
        float | None,
        typer.Option("--hold-out", help="Of --model latent: share of the rows to measure on. Default: 0.1."),
    ] = None,
    binarise: Annotated[
        float | None, typer.Option("--binarise", help="Of --model latent: numbers count as 1 above this, else as 0.")
    ] = None,
    fields_set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Of --model latent: a method's own setting, as kappa=0.1 or vae-decay.weight_decay=1; may repeat.",
        ),
    ] = None,
    covariance: Annotated[
        str, typer.Option("--covariance", help="Of --method vi: full-rank or mean-field.")
    ] = "full-rank",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps.")] = None,
    bridges: Annotated[
        int | None, typer.Option("--bridges", min=1, max=4096, help="Bridges K of a Langevin method.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, max=256, help="Layers of an HSIVI method.")] = None,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="Train HSIVI layers one after another instead of jointly.")
    ] = False,
    lr: Annotated[float | None, typer.Option("--lr", min=1e-12, max=100.0, help="Learning rate.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's parameterisation, on the raw coordinates, unwhitened.")
    ] = False,
    draws: Annotated[
        int | None,
        typer.Option(
            "--draws",
            "-n",
            min=1,
            help="Posterior draws: 4000; of each row with --amortize 1000, with --model latent none.",
        ),
    ] = None,
    refine: Annotated[
        str,
        typer.Option(
            "--refine",
            help="none, hmc (moves from the fit's draws), smc (tempered from its Gaussian), or auto: where k-hat asks.",
        ),
    ] = "auto",
    sbc: Annotated[
        int | None,
        typer.Option(
            "--sbc",
            min=0,
            help="Simulation-based calibration with this many refits (none); with --amortize simulated rows (500).",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="draws.csv, .nc (ArviZ), .parquet, or - for CSV on stdout.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Directory that keeps the fit for hsivi sample.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted --save run: same options plus this.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="fit.png: ELBO trace, marginals, pairs; or the map.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")] = False,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Fit a posterior and say whether to trust it (exit code 3: do not).

    Examples: hsivi fit-posterior kidiq.csv --formula "kid_score ~ mom_iq + mom_hs"; hsivi fit-posterior --example
    eight-schools; hsivi fit-posterior data.csv --model my_model.py --save FIT.
    """
    from hsivi_cli.targets.source import Source, check_source, open_density, read_source

    if example == "list":
        _list_examples(as_json)
        return
    if formula is not None and not formula.strip():
        raise InputError('--formula is empty: write one, as "y ~ x", or leave it out for the last column on all others')
    if out == "-" and as_json:
        raise InputError("--out - and --json both want stdout: write to a file with --out")
    if resume and save is None:
        raise InputError("--resume needs the --save directory of the interrupted run")
    of_latents: dict[str, Any] = {
        "latent": latent,
        "clusters": clusters,
        "labels": labels,
        "color_by": color_by,
        "iwae": iwae,
    }
    of_latents |= {"group_by": group_by, "columns": columns, "noise": noise, "hold_out": hold_out}
    of_latents |= {"binarise": binarise, "settings": tuple(fields_set) if fields_set else None}
    of_amortised: dict[str, Any] = {"simulations": simulations, "sleep": sleep, "embedding": embedding, "shape": shape}
    if model == "latent":
        from hsivi_cli.cli.fit_latent import fit_latent, options_from

        unused: dict[str, Any] = {"formula": formula, "example": example, "amortize": amortize, "layerwise": layerwise}
        unused |= {"encoder": encoder, "estimator": estimator, "particles": particles, "sbc": sbc} | of_amortised
        of_latents["embedding"] = unused.pop("embedding")
        unused |= {"bridges": bridges, "layers": layers}
        unused |= {"refine": refine != "auto", "covariance": covariance != "full-rank", "na": na != "error"}
        for name, given in unused.items():
            if given:
                raise InputError(f"--{name} does nothing with --model latent: leave it out")
        options.check_choice("--method", method, ("auto", *LATENT_METHODS))
        chosen_latents = of_latents | {"family": family, "steps": steps, "lr": lr, "seed": seed}
        fit_latent(
            data,
            options_from(method, tuple(prior or ()), compare, paper, **chosen_latents),
            Wanted(draws, out, save, resume, plot, force, threads, as_json),
        )
        return
    for name, value in (of_latents | {"compare": compare}).items():
        if value is not None:
            flag = "set" if name == "settings" else name.replace("_", "-")
            raise InputError(f"--{flag} goes with --model latent: add it, or leave --{flag} out")
    if method in LATENT_METHODS:
        raise InputError(f"--method {method} is for rows with latents: add --model latent")
    if draws is not None and draws < 10:
        raise InputError(f"--draws {draws}: 10 or more are needed")
    options.check_choice("--method", method, (*METHODS, *AMORTISED_ONLY))
    if method in AMORTISED_ONLY and not amortize:
        raise InputError(f"--method {method} learns from many observations: add --amortize, with a row for each")
    options.check_choice("--covariance", covariance, ("full-rank", "mean-field"))
    options.check_choice("--refine", refine, ("auto", "none", "hmc", "smc"))
    options.check_choice("--na", na, ("error", "drop"))
    source = Source(data, formula, family, tuple(prior or ()), model, example, na)
    check_source(source)
    if amortize:
        unused = {"--bridges": bridges, "--layers": layers, "--layerwise": layerwise, "--paper": paper}
        unused["--covariance"] = covariance != "full-rank"
        for flag, given in unused.items():
            if given:
                raise InputError(f"{flag} does nothing with --amortize: leave it out")
        from hsivi_cli.cli.fit_amortised import AmortisedWanted, fit_amortised
        from hsivi_cli.methods.amortised_options import AmortisedOptions

        chosen = "smc-wake" if method == "auto" else method
        fields: dict[str, Any] = of_amortised | {"encoder": encoder, "estimator": estimator, "particles": particles}
        wanted = AmortisedWanted(draws, out, save, resume, plot, force, threads, as_json, refine, sbc)
        fit_amortised(source, AmortisedOptions(chosen, steps=steps, lr=lr, seed=seed, **fields), wanted)
        return
    for name, value in of_amortised.items():
        if value is not None:
            raise InputError(f"--{name} goes with --amortize: add it, or leave --{name} out")
    draws = draws or DEFAULT_DRAWS
    from hsivi_cli.evaluation.posterior_plot import check_plot_path
    from hsivi_cli.io.draw_files import open_draws
    from hsivi_cli.methods.posterior import draw_posterior, summary_draws
    from hsivi_cli.methods.posterior_registry import FitOptions, check_options
    from hsivi_cli.methods.posterior_report import report_on
    from hsivi_cli.methods.posterior_store import fit_directory, save_fit

    settings = FitOptions(
        method=method,
        covariance=covariance,
        steps=steps,
        bridges=bridges,
        layers=layers,
        layerwise=layerwise,
        lr=lr,
        paper=paper,
        refine=refine,
        seed=seed,
        encoder=encoder,
        estimator=estimator,
        particles=particles,
    )
    check_options(settings)
    options.resolve_device("cpu", threads)
    destination = open_draws(out, None, force) if out else None
    if plot is not None:
        check_plot_path(plot, force)
    with console.guarded_stdout():
        table = read_source(source)
        density = open_density(source, table)
        for fact in density.facts:
            if not ("second derivatives" in fact and method in ("auto", "vi", "hsivi-lb", "hsivi-sm")):
                console.story(fact)
        with fit_directory(save, source, table, asdict(settings), draws, resume) as directory:
            posterior_fit = _fit(density, settings, directory, resume)
            calibration = _calibrate(density, settings, sbc) if sbc else None
            if method in ("smc", "smc-wake") and posterior_fit.route == "smc":
                console.story("tempering samplers from the prior to the posterior")
            elif posterior_fit.route != "weights":
                console.story("moving draws by HMC until they forget their start")
            posterior = draw_posterior(posterior_fit, summary_draws(posterior_fit, draws), seed, progress_lines())
            report = report_on(posterior_fit, posterior, calibration, seed)
            if save is not None:
                save_fit(directory, posterior_fit, source, table, report)
    if plot is not None:
        _plot(plot, posterior_fit, posterior, calibration, report)
    show(report, posterior, draws, destination, as_json, {"out": out, "save": str(save) if save else None})


def _fit(density: "Density", settings: "FitOptions", directory: Path, resume: bool) -> "Fit":
    from hsivi_cli.methods.posterior import fit_posterior as run

    told = time.monotonic()

    def on_log(record: dict[str, Any]) -> None:
        nonlocal told
        tenth = record["step"] % max(1, record["steps"] // 10) == 0 or record["step"] == record["steps"]
        if tenth or time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            milliseconds = 1000 * record["seconds_per_step"]
            line = f"{record['method']} step {record['step']:>6}/{record['steps']}  elbo {record['elbo']:10.3f}"
            console.story(f"{line}  {milliseconds:.1f} ms/step")

    return run(density, settings, directory, on_log, resume)


def _calibrate(density: "Density", settings: "FitOptions", replications: int) -> "SbcResult":
    import tempfile

    from hsivi_cli.methods.posterior_report import calibrate

    with (
        tempfile.TemporaryDirectory(prefix="hsivi-") as directory,
        console.progress("calibration", replications) as bar,
    ):
        return calibrate(density, settings, replications, Path(directory), bar.to)


def _plot(
    path: Path, fit: "Fit", posterior: "Posterior", calibration: "SbcResult | None", report: "PosteriorReport"
) -> None:
    from hsivi_cli.evaluation.posterior_plot import Trace, plot_fit, plot_sbc

    trace = Trace([step for step, _ in fit.trace], [elbo for _, elbo in fit.trace]) if fit.trace else None
    plot_fit(path, posterior.columns, posterior.values.numpy(), trace, title=report.verdict.line)
    console.story(f"picture: {path}")
    if calibration is not None:
        beside = path.with_name(f"{path.stem}-sbc{path.suffix}")
        plot_sbc(beside, calibration)
        console.story(f"calibration: {beside}")


def _list_examples(as_json: bool) -> None:
    from hsivi_cli.targets.examples import EXAMPLES

    if as_json:
        console.result_json(dict(EXAMPLES))
    else:
        console.result_table("Examples", list(EXAMPLES.items()))

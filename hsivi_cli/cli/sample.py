"""`hsivi sample`: images from a student or from a solver on its teacher, draws from a saved posterior."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsivi_cli.cli import configuration, console, options
from hsivi_cli.engine import processes
from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    from hsivi_cli.io.samples import Destination


def sample(
    student: Annotated[
        Path | None,
        typer.Argument(
            help="Student or run directory (with --solver: a teacher's), or a saved posterior fit. "
            "Default: the shipped student, 'shipped'."
        ),
    ] = None,
    nfe: Annotated[
        int | None, typer.Option("--nfe", min=1, help="Network evaluations an image; with --solver 10 by default.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--num-samples", min=1, help="How many images (64), or draws (4000).")
    ] = None,
    seed: options.Seed = 0,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="grid.png (the default), samples.npy, samples.npz, a folder of PNGs, or - for stdout (.npy); "
            "of a posterior draws.csv, .nc, .parquet or - (CSV).",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Your model file, where a posterior was fitted with one; it is run.")
    ] = None,
    observe: Annotated[
        str | None,
        typer.Option(
            "--observe",
            help="New rows for a fit made with --amortize or --model latent: CSV, TSV, parquet, or - for stdin.",
        ),
    ] = None,
    refine: Annotated[
        str,
        typer.Option("--refine", help="Of --observe with --model: auto corrects the draws, none leaves the encoder's."),
    ] = "auto",
    label: options.Label = None,
    solver: options.Solver = None,
    spacing: options.Spacing = None,
    order: options.Order = None,
    clip: options.Clip = False,
    network: options.Network = None,
    shape: options.Shape = None,
    schedule: options.Schedule = None,
    beta_start: options.BetaStart = None,
    beta_end: options.BetaEnd = None,
    timesteps: options.Timesteps = None,
    prediction: options.Prediction = None,
    batch_size: options.BatchSize = 64,
    precision: options.SamplingPrecision = "fp32",
    kernels: options.Kernels = "auto",
    compiled: options.Compile = False,
    graph: options.Graph = False,
    device: options.Device = "auto",
    threads: options.Threads = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Draw images from a student in a few network evaluations, or from its teacher with --solver.

    Of a fit that `hsivi fit-posterior --save` kept: draw from the posterior.
    """
    if out == "-" and as_json:
        raise InputError("--out - and --json both want stdout: write to a file with --out")
    from hsivi_cli.io.run_directory import is_posterior_fit

    if student is not None and is_posterior_fit(student):
        if processes.launched() > 1:
            raise InputError(f"{student} is a posterior fit, and one process draws from it: leave the launcher out")
        from hsivi_cli.cli.observe import observe_rows
        from hsivi_cli.cli.observe_latent import is_latent_fit, sample_latent
        from hsivi_cli.cli.sample_fit import sample_fit
        from hsivi_cli.io.run_directory import is_amortised_fit

        of_images: dict[str, Any] = {
            "--nfe": nfe,
            "--solver": solver,
            "--spacing": spacing,
            "--order": order,
            "--class": label,
        }
        of_images |= {"--network": network, "--shape": shape, "--schedule": schedule, "--prediction": prediction}
        of_images |= {"--beta-start": beta_start, "--beta-end": beta_end, "--timesteps": timesteps}
        of_images |= {"--clip": clip or None, "--compile": compiled or None, "--graph": graph or None}
        of_images |= {"--precision": None if precision == "fp32" else precision}
        of_images |= {"--kernels": None if kernels == "auto" else kernels}
        for flag, given in of_images.items():
            if given is not None:
                raise InputError(f"{flag} is for images, and {student} is a posterior fit: leave it out")
        if is_latent_fit(student):
            if model is not None:
                raise InputError(f"--model {model}: {student} was not fitted with a model file: leave it out")
            sample_latent(student, observe, n, seed, out, threads, force, as_json)
            return
        if is_amortised_fit(student):
            observe_rows(student, observe, model, refine, n, seed, out, threads, force, as_json)
            return
        if observe is not None:
            raise InputError(f"--observe: {student} was fitted to one data set: fit rows with --amortize for that")
        sample_fit(student, model, n, seed, out, threads, force, as_json)
        return
    of_fits = {"--model": model, "--observe": observe, "--refine": None if refine == "auto" else refine}
    for flag, given in of_fits.items():
        if given is not None:
            raise InputError(f"{flag} belongs to a posterior fit: name its directory")
    n, out = n or 64, out or "grid.png"
    if out == "-" and console.stdout().isatty():
        raise InputError("--out - would print binary data on the terminal: pipe it, or name a file")
    import time

    from hsivi_cli.cli.drawing import draw_all
    from hsivi_cli.io.samples import write_samples
    from hsivi_cli.methods.sampling import open_sampler

    device = options.image_device(device, threads)
    student = None if student == Path("shipped") else student  # the word that hsivi evaluate knows too
    in_precision = options.check_precision(precision, device)
    with_kernels = options.resolve_kernels(kernels, device, compiled)
    about = options.network_options(network, shape, schedule, beta_start, beta_end, timesteps, prediction)
    with console.guarded_stdout():  # of a user's own file
        sampler = open_sampler(
            student,
            nfe,
            solver,
            spacing,
            device,
            order,
            clip,
            in_precision,
            with_kernels,
            about,
            label,
            compiled,
            graph,
        )
    destination = processes.from_main(lambda: _open(out, n, sampler.shape, force))
    console.story(f"{n} images with {sampler.name}, seed {seed}, on {_where(device, n, batch_size)}")
    start = time.perf_counter()
    images = draw_all("sampling", sampler, n, seed, batch_size)
    seconds = time.perf_counter() - start
    stream = write_samples(destination, [images]) if processes.is_main() else None
    console.story(f"drawn in {seconds:.2f} s, {n / seconds:.1f} images/s")
    if stream is not None:
        console.result_bytes(stream)
    elif as_json:
        console.result_json(
            {
                "out": out,
                "n": n,
                "nfe": sampler.nfe,
                "seed": seed,
                "device": device,
                "kernels": with_kernels,
                "sampler": sampler.description,
                "seconds": seconds,
                "images_per_second": n / seconds,
            }
        )
    else:
        console.result_line(out)


def _open(out: str, n: int, shape: tuple[int, int, int], force: bool) -> "Destination":
    from hsivi_cli.io.samples import check_capacity, open_destination

    destination = open_destination(out, shape[0], force)
    check_capacity(destination, n, shape)
    return destination


def _where(device: str, n: int, batch_size: int) -> str:
    """The device, and of several processes how many have something to do."""
    batches = -(-n // batch_size)
    if processes.count() == 1:
        return device
    idle = f", of which {batches} get a batch: lower --batch-size" if batches < processes.count() else ""
    return f"{processes.count()} processes{idle}"

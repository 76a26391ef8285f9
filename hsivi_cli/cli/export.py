"""`hsivi export`: a student as one file for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from hsivi_cli.cli import configuration, console, options


def export(
    student: Annotated[Path, typer.Argument(help="Student or run directory, or 'shipped'.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .pt, .pt2 or .safetensors.")],
    nfe: Annotated[int | None, typer.Option("--nfe", min=1, help="Which student of a run.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="torchscript or torch-export: the whole sampler, noise in, images out, which needs only torch; "
            "safetensors: one file that hsivi sample opens again. Default: as the file's ending says.",
        ),
    ] = None,
    network: options.Network = None,
    device: Annotated[
        str,
        typer.Option("--device", help="Where a torchscript is to run: cpu, cuda or cuda:N; the others run anywhere."),
    ] = "cpu",
    threads: options.Threads = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Write a student to one file, open the file again, and say how far its images are from the student's."""
    from hsivi_cli.engine.run_view import refuse_unfinished
    from hsivi_cli.methods.export import check_out, choose_format, export_student
    from hsivi_cli.methods.student import load_student, select_student

    chosen = choose_format(out, kind)
    check_out(out, force)  # before a network is loaded
    device = options.resolve_device(device, threads)
    refuse_unfinished(student, nfe)
    with console.guarded_stdout():  # of a user's own file
        model = load_student(select_student(None if student == Path("shipped") else student, nfe), device, network)
    console.story(f"exporting the student of NFE {model.nfe} as {chosen}")
    with console.guarded_stdout():
        done = export_student(model, out, chosen, network, force)
    console.story(f"opened again: largest difference {done.max_difference:.3g} over {done.images} images in [-1, 1]")
    if chosen != "safetensors":
        channels, height, width = model.shape
        noise, labels = f"({model.nfe}, n, {channels}, {height}, {width})", " and labels (n,)" if model.classes else ""
        console.story(f"call it with standard normal noise {noise}{labels}")
    if as_json:
        console.result_json(
            {
                "out": str(out),
                "format": chosen,
                "bytes": done.bytes,
                "sha256": done.sha256,
                "student_sha256": model.sha256,
                "nfe": model.nfe,
                "shape": list(model.shape),
                "classes": model.classes,
                "max_difference": done.max_difference,
                "compared_images": done.images,
            }
        )
    else:
        console.result_line(str(out))

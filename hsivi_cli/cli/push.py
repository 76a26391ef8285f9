"""`hsivi push`: a student to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from hsivi_cli.cli import configuration, console, options


def push(
    student: Annotated[Path, typer.Argument(help="Student or run directory, or a file of hsivi export.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; made if it is not there.")
    ],
    nfe: Annotated[int | None, typer.Option("--nfe", min=1, help="Which student of a run.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    network: options.Network = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card and upload nothing.")] = False,
    as_json: options.AsJson = False,
    config_file: configuration.ConfigFile = None,
) -> None:
    """Upload a student to the Hugging Face hub with a model card, by huggingface_hub; log in first: hf auth login."""
    from hsivi_cli.engine.run_view import refuse_unfinished
    from hsivi_cli.methods.publish import CARD, check_repository, push_student, staged
    from hsivi_cli.methods.student import load_student, select_student

    check_repository(repository)
    refuse_unfinished(student, nfe)
    with console.guarded_stdout():  # of a user's own file
        model = load_student(select_student(student, nfe), "cpu", network)
    if dry_run:
        with staged(model, repository) as folder:
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            card = (folder / CARD).read_text(encoding="utf-8")
        console.story(f"would upload {', '.join(names)}")
        if as_json:
            console.result_json({"repository": repository, "files": names, "card": card})
        else:
            console.result_line(card)
        return
    console.story(f"uploading the student of NFE {model.nfe} to {repository}")
    done = push_student(model, repository, private)
    if as_json:
        console.result_json({"repository": repository, "url": done.url, "commit": done.commit})
    else:
        console.result_line(done.url)

"""The command tree. Command modules import nothing heavy at module level, so `hsivi --help` stays fast."""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import typer

import hsivi_cli
from hsivi_cli.cli import (
    bench,
    config,
    console,
    distill,
    env,
    evaluate,
    export,
    fit_posterior,
    inspect,
    push,
    sample,
    train,
    watch,
)
from hsivi_cli.engine import processes
from hsivi_cli.errors import HsiviError, InputError, InterruptError

SEVERAL = ("train", "distill", "sample", "evaluate")  # what torchrun and accelerate may start in several processes
INTERRUPTED = "interrupted; a run that was saved goes on from its last checkpoint with --resume"

app = typer.Typer(
    name="hsivi",
    help="Fast diffusion sampling and posterior fitting: distil score networks into few-step samplers, fit posteriors.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", short_help="Train a small score network from images.")(train.train)
app.command("distill", short_help="Turn a score network into few-step samplers, without data.")(distill.distill)
app.command("sample", short_help="Draw images in a few evaluations, or from a saved fit.")(sample.sample)
app.command("evaluate", short_help="FID and its siblings, with the protocol stated.")(evaluate.evaluate)
app.command("fit-posterior", short_help="Fit a posterior, and say whether to trust it.")(fit_posterior.fit_posterior)
app.command("export", short_help="Write a student to one file for other tools.")(export.export)
app.command("push", short_help="Upload a student to the Hugging Face hub.")(push.push)
app.command("watch", short_help="Curves of a run, as it goes.")(watch.watch)
app.command("inspect", short_help="What a checkpoint, run or fit is.")(inspect.inspect)
app.command("bench", short_help="How fast this machine is, beside the peers.")(bench.bench)
app.command(
    "config",
    short_help="The options of a command or run, as a file.",
    context_settings={"ignore_unknown_options": True},
)(config.config)
app.command("env", short_help="Versions and devices, for a bug report.")(env.env)


def _version(value: bool) -> None:
    if value:
        console.result_line(f"hsivi {hsivi_cli.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Fast diffusion sampling and posterior fitting: distil score networks into few-step samplers, fit posteriors."""
    if processes.launched() > 1 and context.invoked_subcommand not in SEVERAL:
        name = context.invoked_subcommand
        raise InputError(f"hsivi {name} runs in one process, not {processes.launched()}: start it without the launcher")


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, so that Python does not complain about it on its way out."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_outputs(arguments: Sequence[str]) -> None:
    """Raise InputError for an output without a name, which would mean the folder one is in."""
    for flag in ("--out", "--save"):
        if f"{flag}=" in arguments or (flag, "") in pairwise(arguments):
            raise InputError(f'{flag} "" is empty: name what to write')


def _bug(err: Exception, arguments: Sequence[str]) -> int:
    if (own := _own_network(err, arguments)) is not None:
        console.error(own)
        return InputError.exit_code
    console.error(f"this is a bug in hsivi {hsivi_cli.__version__}: please report the lines above", err)
    return 1


def _own_network(err: Exception, arguments: Sequence[str]) -> str | None:
    """What a user's own network, which was well at its trial, raised later; None if it was not that."""
    given = [value for flag, value in pairwise(arguments) if flag == "--network"]
    given += [argument.removeprefix("--network=") for argument in arguments if argument.startswith("--network=")]
    files = {Path(value if value.endswith(".py") else value.rpartition(":")[0]).resolve() for value in given}
    frames = [f.filename for f in traceback.extract_tb(err.__traceback__) if Path(f.filename).resolve() in files]
    if not frames:
        return None
    from hsivi_cli.targets.model_calls import describe

    return f"--network {given[-1]}: the network raised {describe(err, *frames)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (0, 1, 2, 3, 130 or 143; see `errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        _check_outputs(arguments)
        with console.told_warnings():
            code = app(args=arguments, prog_name="hsivi", standalone_mode=False, obj={"arguments": tuple(arguments)})
        if not code:
            processes.end()
    except HsiviError as err:
        console.error(str(err))
        return err.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.error(INTERRUPTED)
        return InterruptError.exit_code
    except typer.TyperException as err:
        name = getattr(getattr(err, "ctx", None), "info_name", None) or "hsivi"
        command = name if name == "hsivi" else f"hsivi {name}"
        text = err.format_message() if hasattr(err, "format_message") else str(err)
        console.error(f"{text} (see '{command} --help')")
        return 2
    except BrokenPipeError:
        # the reader of our stdout went away, as in `hsivi sample --out - | head -c 1`; nothing is left to say
        _drop_stdout()
        return 1
    except OSError as err:
        console.error(f"{err.filename or 'stdout'} cannot be written or read: {err.strerror or err}")
        _drop_stdout()
        return 1
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError) and "out of memory" not in str(err) and "allocate memory" not in str(err):
            return _bug(err, arguments)
        shaped = any(argument.split("=")[0] == "--shape" for argument in arguments)
        images = ", or give smaller images (is --shape right?)" if shaped else ""
        console.error(
            f"out of memory: lower the batch size (--batch in train and distill, --batch-size elsewhere){images}"
        )
        return 1
    except Exception as err:
        return _bug(err, arguments)
    if code == InterruptError.exit_code:  # typer has taken Ctrl-C for its own
        console.error(INTERRUPTED)
    return code if isinstance(code, int) else 0

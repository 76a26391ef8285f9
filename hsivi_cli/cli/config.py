"""`hsivi config`: the options that a command would run with, or that a run was begun with, as TOML."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hsivi_cli.cli import configuration, console, options


def config(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="COMMAND|RUN", help="As distill or train; or a run directory.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[OPTIONS OF THE COMMAND]...", help="As you would give them to it.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the resolved options of a command, defaults and --config included, or those that a run was begun with.

    What it prints is what --config reads: `hsivi config distill --nfe 5 > run.toml`, then `hsivi distill --config
    run.toml --score-net TEACHER --out RUN`. Nothing is run or checked beyond the options' own types and ranges.
    """
    group: Any = ctx.parent.command if ctx.parent is not None else None
    command = group.get_command(ctx, target)
    if command is None:
        _print_run(Path(target), arguments or [], sorted(_configurable(group)), as_json)
        return
    from hsivi_cli.errors import InputError

    if target not in _configurable(group):
        raise InputError(f"hsivi {target} takes no --config: choose from {', '.join(sorted(_configurable(group)))}")
    for parameter in command.params:
        parameter.required = False  # what is missing may be given to the command itself, beside --config
    with command.make_context(target, list(arguments or []), parent=ctx.parent) as parsed:
        if as_json:
            console.result_json({"command": target, "options": configuration.resolved_options(parsed)})
        else:
            console.result_line(configuration.options_toml(parsed).rstrip("\n"))


def _print_run(run: Path, arguments: list[str], commands: list[str], as_json: bool) -> None:
    from hsivi_cli.errors import InputError
    from hsivi_cli.io.run_directory import CONFIG, OPTIONS
    from hsivi_cli.io.toml import read_toml

    if not run.is_dir():
        raise InputError(f"{run} is no run directory and none of the commands {', '.join(commands)}")
    if not (run / OPTIONS).is_file():
        if not (run / CONFIG).is_file():
            raise InputError(f"{run} is no run directory: it holds no {OPTIONS}")
        raise InputError(f"{run} holds no {OPTIONS}: see 'hsivi inspect {run}' for what is known of it")
    if arguments:
        raise InputError(f"{arguments[0]} belongs to a command, and {run} is a run: give one or the other")
    settings = read_toml(run / OPTIONS)
    if as_json:
        command, values = next(iter(settings.items()), ("", {}))
        console.result_json({"command": command, "options": values})
    else:
        console.result_line((run / OPTIONS).read_text(encoding="utf-8").rstrip("\n"))


def _configurable(group: Any) -> set[str]:
    return {
        name
        for name, command in group.commands.items()
        if any(p.name == configuration.CONFIG_FILE for p in command.params)
    }

"""Options from a TOML file (`--config`), and the file that says which options a command ran with.

The file fills Click's `default_map`: types, ranges, help and required options stay those of the command, whichever it
is, and what the command line says wins. A file that a stranger wrote must not run code: an option that names some
counts only where the command line gives it too.
"""

import difflib
import os
import shlex
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

import hsivi_cli
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import atomic_file
from hsivi_cli.io.run_directory import CONFIG, OPTIONS
from hsivi_cli.io.toml import read_toml, toml_value

CONFIG_FILE = "config_file"
# what is said about one call, not about what it computes
OF_THE_CALL = (CONFIG_FILE, "resume", "dry_run", "force", "as_json")


def read_options(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take from the TOML file what the command line does not say; raises InputError, naming file and key."""
    if path is None or ctx.resilient_parsing:
        return path
    parameters = {parameter.name: parameter for parameter in ctx.command.params if parameter.name != CONFIG_FILE}
    names = {key: name for name, parameter in parameters.items() for key in _keys(parameter)}
    defaults = dict(ctx.default_map or {})
    for name, value in _settings(ctx, path, names).items():
        what = f"{path}: {_keys(parameters[name])[0]} = {_shown(value)}"
        defaults[name] = _converted(ctx, parameters[name], value, what)
        if _runs_code(str(ctx.info_name), name, defaults[name]):
            defaults[name] = _refusal(what, _keys(parameters[name])[0], defaults[name])
    # a run's own file does not say where it lies, so that a run can be moved or copied
    if "out" in parameters and "out" not in defaults and path.name == OPTIONS and (path.parent / CONFIG).is_file():
        defaults["out"] = str(path.parent)
    ctx.default_map = defaults
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=read_options,
        help="TOML file of options, as `hsivi config` prints or a run keeps; the command line overrides it.",
    ),
]


def resolved_options(ctx: typer.Context) -> dict[str, Any]:
    """Every option of a command that has been parsed, as plain values under its TOML key; None where it is not set."""
    parameters = [parameter for parameter in ctx.command.params if parameter.name not in OF_THE_CALL]
    return {_keys(parameter)[0]: _plain(ctx.params.get(parameter.name)) for parameter in parameters}


def options_toml(ctx: typer.Context, without: Collection[str] = ()) -> str:
    """The resolved options as a TOML file that `--config` reads; those that are not set are comments."""
    helps = {_keys(parameter)[0]: parameter.help or "" for parameter in ctx.command.params}  # type: ignore[attr-defined]
    asked = (ctx.obj or {}).get("arguments", ())
    lines = [
        f"# hsivi {hsivi_cli.__version__}, {datetime.now(UTC).isoformat(timespec='seconds')}",
        _comment(shlex.join(["hsivi", *asked])),
        _comment(f"relative paths are relative to {os.getcwd()}"),
        f"[{ctx.info_name}]",
    ]
    for key, value in resolved_options(ctx).items():
        if key in without:
            continue
        try:
            lines.append(f"{key} = {toml_value(value)}" if value is not None else f"# {key} =")
        except ValueError:  # a file name in another encoding: the run is worth more than this line
            lines.append(f"# {key} = (no Unicode text)")
        lines[-1] += f"  {_comment(helps[key])}".rstrip()
    return "\n".join(lines) + "\n"


def keep_options(ctx: typer.Context, directory: Path, resume: bool) -> None:
    """Write `config.toml` into a run directory; a run that goes on keeps what it was begun with."""
    if resume and (directory / OPTIONS).is_file():
        return
    with atomic_file(directory / OPTIONS) as temporary:
        temporary.write_text(options_toml(ctx, without=("out",)), encoding="utf-8")


def _settings(ctx: typer.Context, path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of this command, by parameter: outside of tables, then in the command's own table."""
    commands: Collection[str] = getattr(getattr(ctx.parent, "command", None), "commands", ())
    tree, command = read_toml(path), str(ctx.info_name)
    tables = {key: value for key, value in tree.items() if isinstance(value, dict) and key in commands}
    found: dict[str, Any] = {}
    for table in ({key: value for key, value in tree.items() if key not in tables}, tables.get(command, {})):
        seen: dict[str, str] = {}
        for given, value in table.items():
            key = given.replace("_", "-")
            if key not in names:
                raise InputError(f"{path}: {_unknown(given, key, value, names, command, commands)}")
            name = names[key]
            if name in seen:
                raise InputError(f"{path}: {seen[name]} and {given} are the same option: keep one")
            seen[name], found[name] = given, value
    if tables and not found and command not in tables:
        raise InputError(f"{path} says nothing about hsivi {command}: it has [{'], ['.join(tables)}]")
    return found


def _unknown(given: str, key: str, value: Any, names: Collection[str], command: str, commands: Collection[str]) -> str:
    """What to say of a key that is no option, with the nearest one that is."""
    if isinstance(value, dict) and (close := difflib.get_close_matches(key, commands, n=1)):
        return f"[{given}] is no command of hsivi: did you mean [{close[0]}]?"
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]}?" if nearest else f" (see 'hsivi {command} --help')"
    return f"{given} is no option of hsivi {command}{hint}"


def _keys(parameter: Any) -> list[str]:
    """What a parameter is called in TOML: its long options without dashes, and the name of its variable."""
    long = [option[2:] for option in parameter.opts if option.startswith("--")]
    return list(dict.fromkeys([*long, parameter.name.replace("_", "-")]))


def _converted(ctx: typer.Context, parameter: Any, value: Any, what: str) -> Any:
    """The value as the command line would give it, once the command's own checks have passed."""
    is_flag, several = getattr(parameter, "is_flag", False), parameter.multiple or parameter.nargs == -1
    if is_flag != isinstance(value, bool):
        raise InputError(f"{what}: give {'true or false' if is_flag else 'a value, not true or false'}")
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, bool | str | int | float) for item in items) or not (items or several):
        raise InputError(f"{what}: give text, a number or a list of them")
    if several:
        tries: list[Any] = [[str(item) for item in items]]
    elif isinstance(value, list):
        tries = [",".join(map(str, items))]  # how the command line takes a list, as --nfe 5,10
    else:
        tries = [value, str(value)]  # a number may be what is read from text, as --nfe 5
    problem = ""
    for candidate in tries:
        try:
            parameter.process_value(ctx, candidate)
            return candidate
        except typer.TyperException as err:
            problem = problem or getattr(err, "message", "")
        except TypeError:
            continue
    raise InputError(f"{what}: {problem or 'a value of another type is wanted'}")


def _runs_code(command: str, name: str, value: Any) -> bool:
    """Whether an option's value names code that the command would run; whatever is not known to be harmless does."""
    if name == "network":
        return not str(value).endswith(".json") or ":" in str(value)  # n.py:build.json is a function of n.py
    if name == "model":
        return (command, value) != ("fit-posterior", "latent")
    return name == "features" and value not in ("inception", "digits")


def _refusal(what: str, key: str, value: Any) -> Callable[[], Any]:
    """A default that raises InputError: Click asks for it only where the command line does not give the option."""

    def refuse() -> Any:
        add = f"--{key} {_printable(shlex.quote(str(value)))}"
        raise InputError(f"{what} runs code: add {add} to the command line if you trust it")

    return refuse


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value] or None  # an option that repeats and was not given
    return str(value) if isinstance(value, Path) else value


def _comment(text: str) -> str:
    """One line of comment, whatever is in the text."""
    return f"# {_printable(text)}" if text else ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)

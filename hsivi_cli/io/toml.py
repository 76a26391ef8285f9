"""TOML in and out: read by the standard library, written line by line so that every setting can carry a comment."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsivi_cli.errors import InputError

Value = str | int | float | bool | Sequence[Any]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises InputError, in one line, if it is missing or is no TOML."""
    try:
        tree = tomllib.loads(path.read_bytes().decode("utf-8"))
        repr(tree)  # a hexadecimal number may be one that Python refuses to write in decimals: ValueError, here
    except FileNotFoundError as err:
        raise InputError(f"{path} does not exist") from err
    except IsADirectoryError as err:
        raise InputError(f"{path} is a directory: name a TOML file, as {path}/config.toml") from err
    except OSError as err:
        raise InputError(f"{path} cannot be read ({err.strerror or err})") from err
    except (ValueError, RecursionError) as err:  # no UTF-8, no TOML, or nested without end
        raise InputError(f"{path} cannot be read as TOML ({err})") from err
    return tree


def toml_value(value: Value) -> str:
    """A string, number, truth value or list of them as TOML; raises UnicodeEncodeError for text that is none."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)  # Python's inf, nan and exponents are TOML's too
    if isinstance(value, str):
        value.encode("utf-8")
        # JSON's escapes are TOML's too, but TOML wants DEL escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(toml_value(item) for item in value)}]"

"""A user's own Python file that defines `model(data) -> Model`, run and checked before any fit starts."""

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from hsivi_cli.errors import InputError
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.model import Model, density_of
from hsivi_cli.targets.model_calls import blamed_line, describe, user_code

WANTED = "def model(data): return Model(parameters=[...], log_prior=..., log_likelihood=...)"


def load_user_model(path: Path, data: Any) -> Density:
    """The posterior of `model(data)` in the file `path`, which is run: the user named it.

    `data` is a pandas DataFrame (CSV, parquet), the object in a `.json` file, or None. Raises InputError with one line,
    and the user's line at fault, for a file that is missing or broken, and for a model that `density_of` refuses.
    """
    return density_of(model_maker(path)(data), Path(path).name)


def model_maker(path: Path) -> Callable[[Any], Model]:
    """The function `model(data)` of the file `path`, which is run once; not yet checked by `check_model`.

    It and this raise InputError with one line, and the user's line at fault.
    """
    path = Path(path)
    module = run_user_file(path, "--model", "model(data)")
    function = getattr(module, "model", None)
    if function is None:
        raise InputError(f"{path.name} defines no model: write {WANTED}")
    if not inspect.isfunction(function):
        raise InputError(f"{path.name}: model is a {type(function).__name__}, not a function: write {WANTED}")
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise InputError(
            f"{path.name}: model{inspect.signature(function)} must take the data alone: model(data)"
        ) from None

    def make(data: Any) -> Model:
        found = _call_model(path, function, data)
        if not isinstance(found, Model):
            kind = "nothing: is a return missing?" if found is None else f"a {type(found).__name__}, not a Model"
            raise InputError(f"{path.name}: model(data) returned {kind}")
        return found

    return make


def run_user_file(path: Path, flag: str, wanted: str, double: bool = True) -> ModuleType:
    """The file that `flag` names as a module, for the function `wanted` in it; its folder is importable while it runs.

    `double` makes new tensors float64 and distributions check their arguments, as a model wants.

    Raises InputError with one line, and the user's line at fault.
    """
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder: name the Python file that defines {wanted}")
    if not path.is_file():
        raise InputError(f"{flag} {path} does not exist: name a Python file that defines {wanted}")
    try:
        source = path.read_text(encoding="utf-8-sig")
        code = compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as err:
        raise InputError(f"{path.name}, line {err.lineno}: {type(err).__name__}: {err.msg}") from err
    except (OSError, ValueError) as err:  # unreadable, not UTF-8, null bytes
        raise InputError(f"{flag} {path} is no Python file ({err})") from err
    module = ModuleType(f"hsivi_user_model_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with user_code(validate=True) if double else nullcontext():
            exec(code, module.__dict__)
    except InputError as err:
        raise InputError(f"{blamed_line(err, str(path)) or path.name}: {err}") from err
    except (Exception, SystemExit) as err:
        raise InputError(f"{path.name} raised {describe(err, str(path))} while it was read") from err
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _call_model(path: Path, function: Any, data: Any) -> Any:
    try:
        with user_code(validate=True):
            return function(data)
    except InputError as err:
        raise InputError(f"{blamed_line(err, str(path)) or path.name}: {err}") from err
    except (Exception, SystemExit) as err:
        hint = ""
        if data is None and isinstance(err, TypeError | AttributeError):
            hint = "; no data file was given"
        elif isinstance(err, KeyError) and hasattr(data, "keys"):
            hint = f"; the data has {', '.join(map(str, list(data.keys())[:20]))}"
        raise InputError(f"{path.name}: model(data) raised {describe(err, str(path))}{hint}") from err

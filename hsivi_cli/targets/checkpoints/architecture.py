"""The small JSON beside a checkpoint: what its shapes do not tell. Every field is checked, unknown ones are refused."""

from collections.abc import Collection, Mapping
from typing import Any

from hsivi_cli.errors import InputError

Fields = Mapping[str, Any]
WHERE = "--network (the architecture's JSON)"


def check_known(fields: Fields, known: Collection[str]) -> None:
    """Raise InputError for a field that nothing reads."""
    unknown = sorted(str(name) for name in fields if name not in known)
    if unknown:
        raise InputError(f"{WHERE}: unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")


def integer(fields: Fields, name: str, default: int, low: int, high: int) -> int:
    """A whole number from `low` to `high`, or `default` where the field is missing."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{WHERE}: {name} must be an integer from {low} to {high}, not {value!r:.60}")
    return value


def number(fields: Fields, name: str, default: float, low: float, high: float) -> float:
    """A number from `low` to `high`, or `default` where the field is missing."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{WHERE}: {name} must be a number from {low} to {high}, not {value!r:.60}")
    return float(value)


def flag(fields: Fields, name: str, default: bool) -> bool:
    """true or false, or `default` where the field is missing."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{WHERE}: {name} must be true or false, not {value!r:.60}")
    return value


def choice(fields: Fields, name: str, default: str, among: Collection[str]) -> str:
    """One of a few words, or `default` where the field is missing."""
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in among:
        raise InputError(f"{WHERE}: {name} must be one of {', '.join(among)}, not {value!r:.60}")
    return value


def integers(fields: Fields, name: str, default: tuple[int, ...], low: int, high: int, longest: int) -> tuple[int, ...]:
    """A list of whole numbers, each from `low` to `high`, or `default` where the field is missing."""
    value = fields.get(name, default)
    if not isinstance(value, list | tuple) or len(value) > longest:
        raise InputError(f"{WHERE}: {name} must be a list of at most {longest} integers, not {value!r:.60}")
    return tuple(integer({name: entry}, name, 0, low, high) for entry in value)


def nested(fields: Fields, name: str) -> Fields:
    """An object inside the object; empty where the field is missing."""
    value = fields.get(name, {})
    if not isinstance(value, Mapping):
        raise InputError(f"{WHERE}: {name} must be an object, not {value!r:.60}")
    return value


def scheduler(kind: str, steps: int, start: float, end: float, prediction_type: str) -> dict[str, Any]:
    """The fields of a diffusers DDPMScheduler."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": steps,
        "beta_schedule": kind,
        "beta_start": start,
        "beta_end": end,
        "prediction_type": prediction_type,
    }

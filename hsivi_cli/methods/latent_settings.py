"""`--set NAME=VALUE` of `--model latent`: fields of a method's configuration that have no option of their own.

A name alone is a field of the method whose draws are kept; `METHOD.NAME` is one of any method of the comparison, so
that nothing of a peer changes unless it is named.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from hsivi_cli.errors import InputError

OWN_OPTION = ("steps", "seed", "lr")
"""Fields that have an option of their own, which is for all methods alike."""
WORDS = {"true": True, "yes": True, "false": False, "no": False}


def parse_settings(
    texts: Sequence[str], method: str, configs: Mapping[str, type], flag: str = "--set"
) -> dict[str, dict[str, Any]]:
    """Fields by method, of texts as `kappa=0.1` or `vae-decay.weight_decay=1`; `configs` are the methods trained.

    Raises InputError in one line for what is no field of that method, and for a value of another type.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in configs}
    for text in texts:
        left, equals, value = text.partition("=")
        owner, dot, name = left.strip().rpartition(".")
        owner, value = owner if dot else method, value.strip()
        if not equals or not name or not value:
            raise InputError(f"{flag} {text}: write NAME=VALUE, as kappa=0.1, or METHOD.NAME=VALUE")
        if owner not in configs:
            raise InputError(f"{flag} {text}: {owner} is not trained here: it is {', '.join(configs)}")
        if name in OWN_OPTION:
            raise InputError(f"{flag} {text}: use --{name}, which is for all methods alike")
        fields = typing.get_type_hints(configs[owner])
        known = [field.name for field in dataclasses.fields(configs[owner]) if field.name not in OWN_OPTION]
        if name not in known:
            raise InputError(f'{flag} {text}: {owner} has no "{name}": it has {", ".join(known)}')
        if name in found[owner]:
            raise InputError(f"{flag} {text}: {name} of {owner} is set twice")
        found[owner][name] = _value(value, fields[name], f"{flag} {text}")
    return found


def _value(text: str, kind: Any, where: str) -> Any:
    """The value of type `kind`: a number, a word, true or false, a list of numbers with commas, or none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _value(text, next(one for one in inner if one is not type(None)), where)
    if origin is Literal:
        if text not in inner:
            raise InputError(f"{where}: choose {', '.join(map(str, inner))}")
        return text
    if origin is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if Ellipsis not in inner and len(parts) != len(inner):
            raise InputError(f"{where}: {len(inner)} numbers with commas are needed")
        return tuple(_value(part, inner[0], where) for part in parts)
    if kind is bool:
        if text.lower() not in WORDS:
            raise InputError(f"{where}: true or false is needed")
        return WORDS[text.lower()]
    try:
        value = kind(text)
    except ValueError as err:
        raise InputError(f"{where}: {'a whole number' if kind is int else 'a number'} is needed") from err
    if kind is float and not abs(value) < float("inf"):
        raise InputError(f"{where}: a finite number is needed")
    return value


def of_method(texts: Sequence[str], method: str, name: str) -> tuple[str, ...]:
    """The texts that are for `name`, where those without a method are for `method`."""
    owners = ((text, text.partition("=")[0].strip().rpartition(".")[0] or method) for text in texts)
    return tuple(text for text, owner in owners if owner == name)

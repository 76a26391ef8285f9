"""The grammar of `--prior`: `name=distribution(arguments)`, with errors that mark the spot."""

import math
import re
from dataclasses import dataclass

from hsivi_cli.errors import InputError
from hsivi_cli.targets.priors import ARGUMENTS, Prior, make_prior

_POSITIVE = {"scale", "nu", "shape", "rate", "eta"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class PriorStatement:
    """One `--prior`: the class (`b`, `sigma`) or coefficient (`b[mom_iq]` gives target `mom_iq`, group `b`)."""

    target: str
    group: str | None
    prior: Prior
    text: str


def parse_prior(text: str) -> PriorStatement:
    """Read `b=normal(0,10)`, `b[mom_iq]=flat`, `sigma=half_cauchy(2.5)`; raises InputError with the spot >>so<<."""
    # names of coefficients may hold brackets and comparisons, so the last lone "=" divides
    target, found, right = text.rpartition("=")
    target, body = target.strip(), right.strip()
    if not found or not target:
        raise InputError(f'--prior >>{text}<<: write name=distribution(arguments), as in "b=normal(0,10)"')
    match = re.fullmatch(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", body, re.DOTALL)
    if match is None:
        raise InputError(f"--prior {target}=>>{body}<<: write distribution(arguments), as in normal(0,10)")
    name, inner = match.group(1), match.group(2)
    if name not in ARGUMENTS:
        raise InputError(f"--prior {target}=>>{name}<<{body[len(name) :]}: unknown, choose {', '.join(ARGUMENTS)}")
    pieces = [piece.strip() for piece in inner.split(",")] if inner and inner.strip() else []
    arguments = tuple(_number(piece, i, target, name, pieces) for i, piece in enumerate(pieces))
    wanted = ARGUMENTS[name]
    if name.startswith("half_") and len(arguments) == len(wanted) + 1 and arguments[-2] == 0:
        arguments = (*arguments[:-2], arguments[-1])  # a location of 0, as half_normal(0, 1)
    if len(arguments) != len(wanted):
        raise InputError(
            f"--prior {target}=>>{body}<<: {name} takes "
            + (f"{len(wanted)} arguments, {name}({', '.join(wanted)})" if wanted else "no arguments")
        )
    for value, meaning in zip(arguments, wanted, strict=True):
        if meaning in _POSITIVE and value <= 0:
            raise InputError(f"--prior {target}=>>{body}<<: the {meaning} must be positive, not {value:g}")
    if name == "uniform" and arguments[0] >= arguments[1]:
        raise InputError(f"--prior {target}=>>{body}<<: the lower end must be below the upper one")
    bracket = re.fullmatch(r"(b|sd)\[(.+)\]", target, re.DOTALL)
    group, target = (bracket.group(1), bracket.group(2).strip()) if bracket else (None, target)
    return PriorStatement(target, group, make_prior(name, *arguments), text)


def _number(piece: str, position: int, target: str, name: str, pieces: list[str]) -> float:
    if _NUMBER.fullmatch(piece) and math.isfinite(float(piece)):
        return float(piece)
    marked = ", ".join(f">>{p}<<" if i == position else p for i, p in enumerate(pieces))
    raise InputError(f"--prior {target}={name}({marked}): not a number")

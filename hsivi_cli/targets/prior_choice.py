"""Which prior each parameter of a regression gets: the user's statements first, else a weak one on the data's scale.

The defaults follow rstanarm (Goodrich et al., "Prior distributions for rstanarm models"): coefficients
`normal(0, 2.5 s_y / s_x)`, the intercept at the predictors' means `normal(m_y, 2.5 s_y)`, `sigma ~ exponential(1/s_y)`
(s_y = 1 for log and logit links). Without an intercept root mean squares take the place of s_y and s_x in the
coefficients' priors. Those of `nu`, `shape` and group sds are brms's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from hsivi_cli.errors import InputError
from hsivi_cli.targets.families import Family
from hsivi_cli.targets.formula import Design, GroupBlock
from hsivi_cli.targets.prior_grammar import PriorStatement
from hsivi_cli.targets.priors import Prior, make_prior

_AUX_ALIASES = {"phi": "shape", "df": "nu"}


@dataclass(frozen=True)
class ResponseScale:
    """Centre and spread of the response on the scale of the linear predictor, offset taken away.

    `reach` is what the predictors have to bring about: the spread, or without an intercept the whole size.
    """

    centre: float
    spread: float
    reach: float


@dataclass(frozen=True)
class ChosenPriors:
    """`coefficients` in the order (Intercept), names; `centred` says that the intercept's prior is the default one, on
    the intercept at the predictors' means. `defaulted` are the coefficients with a default prior,
    `spreads` the predictors' `column_spreads`.

    `sd` and `correlation` have an entry a group block: priors of its sds, and LKJ's eta.
    """

    coefficients: tuple[Prior, ...]
    centred: bool
    defaulted: frozenset[str]
    spreads: Float64[np.ndarray, " p"]
    aux: tuple[Prior, ...]
    sd: tuple[tuple[Prior, ...], ...]
    correlation: tuple[float, ...]
    facts: tuple[str, ...]


def response_scale(family: Family, design: Design) -> ResponseScale:
    """Mean and sd of the response (identity link); the log of the mean rate and 1 (log); 0 and 1 (logit)."""
    if family.link == "identity":
        shifted = design.y - design.offset
        spread = float(shifted.std(ddof=1))
        size = spread if design.intercept else max(spread, float(np.sqrt((shifted**2).mean())))
        return ResponseScale(float(shifted.mean()), spread, size)
    if family.link == "log":
        level = math.log((design.y.sum() + 0.5) / np.exp(design.offset).sum())
        return ResponseScale(level, 1.0, 1.0 if design.intercept else max(1.0, abs(level)))
    return ResponseScale(0.0, 1.0, 1.0)


def coefficient_names(design: Design, aux: Sequence[str]) -> tuple[str, ...]:
    """Names under which coefficients are reported: the terms', as `b[name]` where that is another parameter's."""
    reserved = {"Intercept", *aux, "lp__"}
    names = tuple(f"b[{name}]" if name in reserved else name for name in design.names)
    return (("Intercept",) if design.intercept else ()) + names


def choose_priors(
    design: Design, family: Family, scale: ResponseScale, statements: Sequence[PriorStatement]
) -> ChosenPriors:
    """Match statements with parameters: one on a coefficient beats one on its class, a later one an earlier one.

    Raises InputError for a statement that matches nothing, and for a prior that a parameter cannot have.
    """
    used: set[int] = set()
    aliases = {alias: name for alias, name in _AUX_ALIASES.items() if name in family.aux and alias not in design.names}
    # these words mean the parameter or class; a predictor of that name is reached as b[name] only
    words = {"Intercept", "b", "sd", "cor", *family.aux}

    def find(*keys: tuple[str | None, str]) -> PriorStatement | None:
        for group, target in keys:  # most specific first
            for i in reversed(range(len(statements))):
                statement = statements[i]
                if (statement.group, aliases.get(statement.target, statement.target)) == (group, target):
                    used.update(
                        j for j, other in enumerate(statements)
                        if (other.group, other.target) == (statement.group, statement.target)
                    )  # fmt: skip
                    return statement
        return None

    facts: list[str] = []
    coefficients: list[Prior] = []
    defaulted: set[str] = set()
    centred = False
    if design.intercept:
        found = find((None, "Intercept"))
        centred = found is None and bool(design.names)
        if found:
            coefficients.append(_usable(found))
            facts.append(f"prior Intercept ~ {coefficients[-1].describe()}")
        else:
            coefficients.append(make_prior("normal", scale.centre, 2.5 * scale.spread))
            where = " (default, on the intercept at the predictors' means)" if centred else " (default)"
            facts.append(f"prior Intercept ~ {coefficients[-1].describe()}{where}")
    spreads = column_spreads(design)
    reported = coefficient_names(design, family.aux)[int(design.intercept) :]
    for name, shown, spread in zip(design.names, reported, spreads, strict=True):
        found = find(("b", name), *([] if name in words else [(None, name)]), (None, "b"))
        if found:
            coefficients.append(_usable(found))
        else:
            defaulted.add(name)
            coefficients.append(make_prior("normal", 0.0, 2.5 * scale.reach / (spread or 1.0)))
        facts.append(f"prior {shown} ~ {coefficients[-1].describe()}{'' if found else ' (default)'}")
    aux = []
    for name in family.aux:
        found = find((None, name))
        aux.append(_positive(found, name) if found else _default_aux(name, scale.spread))
        note = _cut(found, aux[-1]) if found else " (default)"
        facts.append(f"prior {name} ~ {aux[-1].describe()}{note}")
    sd, correlation = [], []
    for block in design.groups:
        priors = []
        for term, spread in zip(block.terms, _term_spreads(block), strict=True):
            name = f"sd_{block.factor}[{term}]"
            found = find((None, name), ("sd", f"{'1' if term == 'Intercept' else term}|{block.factor}"), (None, "sd"))
            default = make_prior(
                "half_student_t", 3.0, scale.spread * (1.0 if family.link == "identity" else 2.5) / spread
            )
            priors.append(_positive(found, name) if found else default)
            facts.append(f"prior {name} ~ {priors[-1].describe()}{_cut(found, priors[-1]) if found else ' (default)'}")
        sd.append(tuple(priors))
        found = find((None, "cor")) if len(block.terms) > 1 else None
        correlation.append(_lkj(found) if found else 2.0)
        if len(block.terms) > 1:
            facts.append(f"prior cor_{block.factor} ~ lkj({correlation[-1]:g}){'' if found else ' (default)'}")
    _refuse_unused(statements, used, design, family)
    return ChosenPriors(
        tuple(coefficients),
        centred,
        frozenset(defaulted),
        spreads,
        tuple(aux),
        tuple(sd),
        tuple(correlation),
        tuple(facts),
    )


def column_spreads(design: Design) -> Float64[np.ndarray, " p"]:
    """Standard deviation of each predictor, exactly 0 for a constant one; without an intercept its root mean square."""
    X = design.X
    if not design.intercept:
        return np.sqrt(np.einsum("ij,ij->j", X, X) / len(X))
    spreads = X.std(0, ddof=1)
    largest = np.maximum(np.abs(X.max(0, initial=0.0)), np.abs(X.min(0, initial=0.0)))
    return np.where(spreads > 1e-12 * largest, spreads, 0.0)


def _term_spreads(block: GroupBlock) -> list[float]:
    spreads = block.values.std(0)
    return [float(s) if s > 0 else max(float(abs(v)), 1e-300) for s, v in zip(spreads, block.values[0], strict=True)]


def _default_aux(name: str, spread: float) -> Prior:
    match name:
        case "sigma":
            return make_prior("exponential", 1 / spread)
        case "nu":
            return make_prior("gamma", 2.0, 0.1)
        case _:
            return make_prior("inverse_gamma", 0.4, 0.3)


def _usable(statement: PriorStatement) -> Prior:
    if statement.prior.name == "lkj":
        raise InputError(f"--prior {statement.text}: lkj is for correlations only, as cor=lkj(2)")
    return statement.prior


def _positive(statement: PriorStatement, name: str) -> Prior:
    try:
        return _usable(statement).truncate(0.0, math.inf)
    except ValueError as err:
        raise InputError(f"--prior {statement.text}: {name} is positive, where this prior has no mass") from err


def _cut(statement: PriorStatement, prior: Prior) -> str:
    if statement.prior.name in ("normal", "student_t", "cauchy") and statement.prior.real:
        return f" ({statement.prior.describe()} cut to positive values and renormalised)"
    if statement.prior.lower < 0 and statement.prior.proper:
        return f" (cut to positive values and renormalised: ({prior.lower:g}, {prior.upper:g}))"
    return ""


def _lkj(statement: PriorStatement) -> float:
    if statement.prior.name != "lkj":
        raise InputError(f"--prior {statement.text}: correlations take lkj(eta) only")
    return statement.prior.arguments[0]


def _refuse_unused(statements: Sequence[PriorStatement], used: set[int], design: Design, family: Family) -> None:
    known = [*(["Intercept"] if design.intercept else []), *(["b"] if design.names else []), *design.names, *family.aux]
    known += ["sd"] if design.groups else []
    known += ["cor"] if any(len(block.terms) > 1 for block in design.groups) else []
    # a class that coefficients of their own priors have emptied is no mistake
    classes = {"b"} if design.names else set()
    classes |= {"sd"} if design.groups else set()
    for i, statement in enumerate(statements):
        if i not in used and not (statement.group is None and statement.target in classes):
            name = f"{statement.group}[{statement.target}]" if statement.group else statement.target
            shown = ", ".join(known[:12]) + (" ..." if len(known) > 12 else "")
            raise InputError(f'--prior {statement.text}: there is no parameter "{name}" here: choose from {shown}')

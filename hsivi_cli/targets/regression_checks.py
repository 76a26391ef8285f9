"""Whether a regression's posterior is proper, and whether its data say something about each parameter, before fitting.

A fit to an improper posterior looks like any other, so each known way to one is refused here: flat priors on dependent
columns or on more coefficients than rows, flat sds without enough rows or groups, exact fits, and separated responses
(Albert and Anderson 1984 for logits; with log links the same argument holds for the rows whose count is zero).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64
from scipy import linalg, optimize

from hsivi_cli.errors import InputError
from hsivi_cli.targets.families import Family
from hsivi_cli.targets.formula import Design
from hsivi_cli.targets.prior_choice import ChosenPriors, column_spreads

_DEPENDENT = 1e-9  # distance of a column of length one from the span of the others
_SEPARATED = 1e-7
_LP_ROWS = 500
Matrix = Float64[np.ndarray, "N k"]


def check_response_varies(design: Design, family: Family) -> None:
    """Refuse a constant response where the family has a scale to estimate; raises InputError."""
    if family.link == "identity" and np.ptp(design.y - design.offset) <= 1e-12 * np.abs(design.y).max():
        raise InputError(
            f'the response "{design.response}" is {design.y[0]:g} in every row: there is nothing to explain'
        )


def check_posterior(design: Design, family: Family, priors: ChosenPriors) -> list[str]:
    """Refuse improper posteriors; returns lines on what only the priors decide. Raises InputError."""
    flat = np.array([not prior.proper for prior in priors.coefficients], bool)
    names = (("Intercept",) if design.intercept else ()) + design.names
    X = np.concatenate([np.ones((len(design.y), int(design.intercept))), design.X], 1)
    facts = _constant_columns(design, priors)
    rank = _independent_flat(X, flat, names)
    facts += _dependent_facts(X, design, names)
    _check_scales(design, family, priors, X, rank)
    if family.link in ("logit", "log"):
        facts += _separation(X, flat, names, design, family)
    return facts


def _constant_columns(design: Design, priors: ChosenPriors) -> list[str]:
    facts = []
    for name, spread in zip(design.names, column_spreads(design), strict=True):
        if spread > 0:
            continue
        if name in priors.defaulted:
            raise InputError(
                f'the predictor "{name}" is the same in every row: leave it out, or give it a prior of its own'
            )
        facts.append(f"{name} is the same in every row: its prior decides")
    return facts


def _independent_flat(X: Matrix, flat: Bool[np.ndarray, " k"], names: Sequence[str]) -> int:
    """The number of coefficients with flat priors; raises InputError unless the data determine all of them."""
    count = int(flat.sum())
    if count > len(X):
        raise InputError(
            f"{len(X)} rows cannot determine {count} coefficients with flat priors, so the posterior is improper: "
            'give proper priors, as --prior "b=normal(0,10)"'
        )
    columns = X[:, flat]
    kept = [name for name, is_flat in zip(names, flat, strict=True) if is_flat]
    centre = bool(flat[:1].all()) and kept[:1] == ["Intercept"]
    found = _dependency(_scaled(columns, centre), kept)
    if found:
        raise InputError(
            f'{found}, so with flat priors the posterior is improper: leave "{found.split(chr(34))[1]}" out'
        )
    return count


def _dependent_facts(X: Matrix, design: Design, names: Sequence[str]) -> list[str]:
    varying = np.ones(X.shape[1], bool)
    varying[int(design.intercept) :] = column_spreads(design) > 0
    kept = [name for name, keep in zip(names, varying, strict=True) if keep]
    if len(kept) > len(X):
        return [f"{len(X)} rows for {len(kept)} coefficients: their priors decide in part"]
    found = _dependency(_scaled(X[:, varying], design.intercept), kept)
    return [f"{found}: their priors decide between them"] if found else []


def _scaled(X: Matrix, centre: bool) -> Matrix:
    """Columns of length one, all but the first centred where that is the intercept."""
    if centre:
        X = np.concatenate([X[:, :1], X[:, 1:] - X[:, 1:].mean(0)], 1)
    length = np.sqrt((X**2).sum(0))
    return X / np.where(length > 0, length, 1.0)


def _dependency(X: Matrix, names: Sequence[str]) -> str | None:
    """A line that names one column which the others determine, or None."""
    if X.shape[1] == 0:
        return None
    R = np.linalg.qr(X, mode="r")
    _, triangle, order = linalg.qr(R, mode="economic", pivoting=True)
    small = np.abs(np.diag(triangle)) < _DEPENDENT
    if not small.any():
        return None
    rank = int(small.argmax())
    last = order[rank]
    weights = linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, rank]) if rank else np.zeros(0)
    others = [names[order[i]] for i in np.argsort(-np.abs(weights)) if abs(weights[i]) > 1e-6]
    if not others:
        return f'the predictor "{names[last]}" is 0 in every row' + (" or constant" if names[0] == "Intercept" else "")
    listed = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
    return f'the predictor "{names[last]}" is a linear combination of {listed}'


def _check_scales(design: Design, family: Family, priors: ChosenPriors, X: Matrix, flat_coefficients: int) -> None:
    rows = len(X)
    for name, prior in zip(family.aux, priors.aux, strict=True):
        unbounded = not prior.proper
        if unbounded and name != "sigma":
            raise InputError(f"a flat prior on {name} makes the posterior improper: leave it to its default")
        if unbounded and rows - flat_coefficients < 2:
            raise InputError(
                f"{rows} rows and {flat_coefficients} flat coefficients leave a flat sigma undetermined, so the "
                'posterior is improper: give it a proper prior, as --prior "sigma=half_normal(10)"'
            )
    for block, sds in zip(design.groups, priors.sd, strict=True):
        if any(not prior.proper for prior in sds) and len(block.levels) < 3:
            raise InputError(
                f'a flat prior on the sd of "{block.factor}" with its {len(block.levels)} groups makes the posterior '
                "improper: leave it to its default"
            )
    if family.link == "identity" and not design.groups:
        safe = priors.aux[0].name in ("inverse_gamma", "lognormal") or priors.aux[0].lower > 0
        y = design.y - design.offset
        scaled = _scaled(X, design.intercept)
        fitted = scaled @ np.linalg.lstsq(scaled, y, rcond=1e-12)[0]
        exact = float(((y - fitted) ** 2).sum()) <= 1e-20 * float(((y - y.mean()) ** 2).sum())
        if exact and not safe and rows > np.linalg.matrix_rank(scaled):
            raise InputError(
                f'the predictors fit the response "{design.response}" without error, so sigma has no posterior: '
                "is one of them the response in disguise?"
            )


def _separation(
    X: Matrix, flat: Bool[np.ndarray, " k"], names: Sequence[str], design: Design, family: Family
) -> list[str]:
    if family.link == "logit":
        trials = np.ones_like(design.y) if design.trials is None else design.trials
        sides = np.where(design.y == trials, 1, np.where(design.y == 0, -1, 0))
        sides = np.where(trials == 0, 2, sides)  # says nothing
        what = "separate the outcomes completely or almost so"
    else:
        sides = np.where(design.y == 0, -1, 0)
        what = "single out rows whose counts are all 0"
    X, sides = X[sides != 2], sides[sides != 2]
    scaled = _scaled(X, False) * np.sqrt(max(len(X), 1))
    if flat.any():
        direction = separating_direction(scaled[:, flat], sides)
        if direction is not None:
            kept = [name for name, is_flat in zip(names, flat, strict=True) if is_flat]
            raise InputError(
                f"{_who(direction, kept)} {what}, so with flat priors the posterior is improper: "
                'give proper priors, as --prior "b=normal(0,2.5)" --prior "Intercept=normal(0,2.5)"'
            )
    if not flat.all():
        direction = separating_direction(scaled, sides)
        if direction is not None:
            return [f"{_who(direction, names)} {what}: the size of these coefficients is the priors' doing"]
    return []


def _who(direction: Float64[np.ndarray, " k"], names: Sequence[str]) -> str:
    part = [names[i] for i in np.argsort(-np.abs(direction)) if abs(direction[i]) > 1e-6]
    if part == ["Intercept"]:
        return "the rows, all of one outcome,"
    part = [name for name in part if name != "Intercept"]
    return f"the predictors {', '.join(part[:4])}{' ...' if len(part) > 4 else ''}"


def separating_direction(X: Matrix, sides: np.ndarray) -> Float64[np.ndarray, " k"] | None:
    """A direction d with `side x.d >= 0` on all rows, `x.d = 0` where side is 0, and not all of them 0; None without.

    The likelihood does not fall along d (Albert and Anderson 1984). A linear programme on a few rows, to which rows
    that its answer violates are added until none is left: what the few rule out, all rule out.
    """
    rows, k = X.shape
    if rows == 0 or k == 0:
        return None
    chosen = np.random.default_rng(0).permutation(rows)[: max(_LP_ROWS, 4 * k)]
    while True:
        part, side = X[chosen], sides[chosen]
        signed = part[side != 0] * side[side != 0][:, None]
        equal = part[side == 0]
        # without rows that have a side, any direction in the null space of `equal` would do: try the rest of the rows
        objective = -signed.sum(0) if len(signed) else -(X[sides != 0] * sides[sides != 0][:, None]).sum(0)
        result = optimize.linprog(
            objective, A_ub=-signed if len(signed) else None, b_ub=np.zeros(len(signed)) if len(signed) else None,
            A_eq=equal if len(equal) else None, b_eq=np.zeros(len(equal)) if len(equal) else None,
            bounds=(-1, 1), method="highs",
        )  # fmt: skip
        if result.status != 0 or -result.fun <= _SEPARATED * rows:
            return None
        along = X @ result.x
        violation = np.where(sides == 0, np.abs(along), -sides * along)
        worst = np.argsort(-violation)[:_LP_ROWS]
        worst = worst[violation[worst] > _SEPARATED]
        fresh = np.setdiff1d(worst, chosen)
        if len(fresh) == 0:
            return np.asarray(result.x, np.float64)
        chosen = np.concatenate([chosen, fresh])

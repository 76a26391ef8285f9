"""Whether a regression's posterior is proper, and whether its data say something about each parameter, before fitting.

A fit to an improper posterior looks like any other, so each known way to one is refused here: flat priors on dependent
columns or on more coefficients than rows, flat sds without enough rows or groups, exact fits, and separated responses
(Albert and Anderson 1984 for logits; with log links the same argument holds for the rows whose count is zero).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64
from scipy import linalg

from hsivi_cli.errors import InputError
from hsivi_cli.targets.families import Family
from hsivi_cli.targets.formula import Design
from hsivi_cli.targets.prior_choice import ChosenPriors
from hsivi_cli.targets.triangle import independent, triangle

_DEPENDENT = 1e-9  # distance of a column of length one from the span of the others
_SEPARATED = 1e-7
_LP_ROWS = 500
WIDE = 200  # columns
Matrix = Float64[np.ndarray, "N k"]
Rows = Float64[np.ndarray, " N"]
Means = Float64[np.ndarray, " k"] | None


def check_response_varies(design: Design, family: Family) -> None:
    """Refuse a constant response where the family has a scale to estimate; raises InputError."""
    if family.link == "identity" and np.ptp(design.y - design.offset) <= 1e-12 * np.abs(design.y).max():
        raise InputError(
            f'the response "{design.response}" is {design.y[0]:g} in every row: there is nothing to explain'
        )


def check_posterior(X: Matrix, design: Design, family: Family, priors: ChosenPriors) -> list[str]:
    """Refuse improper posteriors; returns lines on what only the priors decide. `X` has the column of ones, if any.

    Raises InputError.
    """
    flat = np.array([not prior.proper for prior in priors.coefficients], bool)
    names = (("Intercept",) if design.intercept else ()) + design.names
    # columns have the same lengths and dependencies in the small factor R as over a million rows; the response is last
    R = triangle(np.concatenate([X, (design.y - design.offset)[:, None]], 1))
    columns, response = R[:, : X.shape[1]], R[:, X.shape[1]]
    means = X.mean(0) if design.intercept else None
    facts = _constant_columns(design, priors)
    rank = _independent_flat(len(X), columns, means, flat, names)
    facts += _dependent_facts(len(X), columns, means, design, priors, names)
    _check_scales(len(X), design, family, priors, rank)
    facts += [
        f"every row is its own group of {block.factor}: data hardly tell sd_{block.factor} from sigma"
        for block in design.groups
        if family.link == "identity" and len(block.levels) == len(X)
    ]
    if family.link == "identity" and not design.groups:
        _check_exact(len(X), _scaled(columns, means), response, design, priors)
    if family.link in ("logit", "log"):
        facts += _separation(X, flat, names, design, family)
    return facts


def _constant_columns(design: Design, priors: ChosenPriors) -> list[str]:
    facts = []
    for name, spread in zip(design.names, priors.spreads, strict=True):
        if spread > 0:
            continue
        if name in priors.defaulted:
            raise InputError(
                f'the predictor "{name}" is the same in every row: leave it out, or give it a prior of its own'
            )
        facts.append(f"{name} is the same in every row: its prior decides")
    return facts


def _independent_flat(
    rows: int, columns: Matrix, means: Means, flat: Bool[np.ndarray, " k"], names: Sequence[str]
) -> int:
    """The number of coefficients with flat priors; raises InputError unless the data determine all of them."""
    count = int(flat.sum())
    if count > rows:
        raise InputError(
            f"{rows} rows cannot determine {count} coefficients with flat priors, so the posterior is improper: "
            'give proper priors, as --prior "b=normal(0,10)"'
        )
    kept = [name for name, is_flat in zip(names, flat, strict=True) if is_flat]
    centre = means is not None and kept[:1] == ["Intercept"]
    found = _dependency(_scaled(columns[:, flat], means[flat] if centre and means is not None else None), kept)
    if found:
        name, line = found
        raise InputError(f'{line}, so with flat priors the posterior is improper: leave "{name}" out')
    return count


def _dependent_facts(
    rows: int, columns: Matrix, means: Means, design: Design, priors: ChosenPriors, names: Sequence[str]
) -> list[str]:
    varying = np.ones(columns.shape[1], bool)
    varying[int(design.intercept) :] = priors.spreads > 0
    kept = [name for name, keep in zip(names, varying, strict=True) if keep]
    if len(kept) > rows:
        return [f"{rows} rows for {len(kept)} coefficients: their priors decide in part"]
    found = _dependency(_scaled(columns[:, varying], None if means is None else means[varying]), kept)
    return [f"{found[1]}: their priors decide between them"] if found else []


def _scaled(columns: Matrix, means: Means) -> Matrix:
    """Columns of length one; with `means` the first is the intercept's, and its multiples are taken off the others."""
    before = np.sqrt((columns**2).sum(0))
    if means is not None:
        columns = np.concatenate([columns[:, :1], columns[:, 1:] - columns[:, :1] * means[1:]], 1)
    length = np.sqrt((columns**2).sum(0))
    # what rounding leaves of a constant column is nothing, and must not be blown up to length one
    gone = length <= 1e-11 * before
    return np.where(gone, 0.0, columns / np.where(gone, 1.0, length))


def _dependency(columns: Matrix, names: Sequence[str]) -> tuple[str, str] | None:
    """A column that the others determine, and a line that says so; None without."""
    if columns.shape[1] == 0:
        return None
    if independent(columns.T @ columns) is not None:
        return None
    _, factor, order = linalg.qr(columns, mode="economic", pivoting=True)
    small = np.abs(np.diag(factor)) < _DEPENDENT
    if not small.any():
        return None
    rank = int(small.argmax())
    name = names[order[rank]]
    weights = linalg.solve_triangular(factor[:rank, :rank], factor[:rank, rank]) if rank else np.zeros(0)
    others = [names[order[i]] for i in np.argsort(-np.abs(weights)) if abs(weights[i]) > 1e-6]
    if not others:
        return name, f'the predictor "{name}" is the same in every row'
    listed = ", ".join(others[:4]) + (" ..." if len(others) > 4 else "")
    return name, f'the predictor "{name}" is a linear combination of {listed}'


def _check_scales(rows: int, design: Design, family: Family, priors: ChosenPriors, flat_coefficients: int) -> None:
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


def _check_exact(rows: int, scaled: Matrix, response: Rows, design: Design, priors: ChosenPriors) -> None:
    """Refuse fits without error: the density of sigma would grow without bound towards 0."""
    if priors.aux[0].name in ("inverse_gamma", "lognormal") or priors.aux[0].lower > 0:
        return  # these vanish at 0 faster than any power
    fitted = scaled @ np.linalg.lstsq(scaled, response, rcond=1e-12)[0]
    y = design.y - design.offset
    exact = float(((response - fitted) ** 2).sum()) <= 1e-20 * float(((y - y.mean()) ** 2).sum())
    if exact and rows > np.linalg.matrix_rank(scaled):
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
    if (sides == 2).any():
        X, sides = X[sides != 2], sides[sides != 2]
    if len(X) and abs(sides[0]) == 1 and (sides == sides[0]).all():
        what, names = "all rows have the same outcome", ()
    if flat.any():
        direction = separating_direction(X if flat.all() else X[:, flat], sides)
        if direction is not None:
            kept = [name for name, is_flat in zip(names, flat, strict=True) if is_flat] if names else []
            raise InputError(
                f"{_who(direction, kept)}{what}, so with flat priors the posterior is improper: "
                'give proper priors, as --prior "b=normal(0,2.5)" --prior "Intercept=normal(0,2.5)"'
            )
    if not flat.all() and X.shape[1] <= WIDE:  # a fact only, and the linear programme takes minutes beyond
        direction = separating_direction(X, sides)
        if direction is not None:
            return [f"{_who(direction, names)}{what}: the size of these coefficients is the priors' doing"]
    return []


def _who(direction: Float64[np.ndarray, " k"], names: Sequence[str]) -> str:
    part = [names[i] for i in np.argsort(-np.abs(direction)) if names and abs(direction[i]) > 1e-6]
    part = [name for name in part if name != "Intercept"]
    listed = f"{', '.join(part[:4])}{' ...' if len(part) > 4 else ''}"
    return f"{listed} " if part else ""


def separating_direction(X: Matrix, sides: np.ndarray) -> Float64[np.ndarray, " k"] | None:
    """A direction d with `side x.d >= 0` on all rows, `x.d = 0` where side is 0, and not all of them 0; None without.

    The likelihood does not fall along d (Albert and Anderson 1984). A linear programme on a few rows, to which rows
    that its answer violates are added until none is left: what the few rule out, all rule out.
    """
    from scipy import optimize

    rows, k = X.shape
    if rows == 0 or k == 0:
        return None
    length = np.sqrt(np.einsum("ij,ij->j", X, X) / rows)
    length[length == 0] = 1.0
    sided = sides != 0
    total = (sides[sided] @ X[sided]) / length
    chosen = np.random.default_rng(0).permutation(rows)[: max(_LP_ROWS, 4 * k)]
    while True:
        part, side = X[chosen] / length, sides[chosen]
        signed, equal = part[side != 0] * side[side != 0][:, None], part[side == 0]
        result = optimize.linprog(
            -total / rows, A_ub=-signed if len(signed) else None, b_ub=np.zeros(len(signed)) if len(signed) else None,
            A_eq=equal if len(equal) else None, b_eq=np.zeros(len(equal)) if len(equal) else None,
            bounds=(-1, 1), method="highs",
        )  # fmt: skip
        if result.status != 0 or -result.fun <= _SEPARATED:
            return None
        along = X @ (result.x / length)
        violation = np.where(sided, -sides * along, np.abs(along))
        worst = np.argpartition(-violation, min(_LP_ROWS, rows) - 1)[:_LP_ROWS]
        fresh = np.setdiff1d(worst[violation[worst] > _SEPARATED], chosen)
        if len(fresh) == 0:
            return np.asarray(result.x, np.float64)
        chosen = np.concatenate([chosen, fresh])

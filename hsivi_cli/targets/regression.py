"""Bayesian regression from a formula and a table: `kid_score ~ mom_iq + (1 | school)` to a Density.

Parameters are named as in the output: `Intercept`, the terms of the formula (`mom_iq`, `age[2]`, `x:z`,
`log(diam1 * diam2)`; as `b[sigma]` where a term has another parameter's name), `sigma`, `nu`, `shape`, `sd_g[term]`,
`cor_g[term,term]`, `r_g[level]` or `r_g[level,term]`; each is a single number. Coefficients are on the original scale
of their predictors, and so are their priors; a prior that the user gives the intercept is on the raw one, where all
predictors are 0, as in a Stan program.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.io.tables import select_complete
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.families import Family, check_response, family_named, guess_family
from hsivi_cli.targets.formula import Design, build_design, default_formula, formula_columns
from hsivi_cli.targets.formula_syntax import shortened
from hsivi_cli.targets.group_effects import GroupEffects
from hsivi_cli.targets.prior_choice import choose_priors, coefficient_names, response_scale
from hsivi_cli.targets.prior_grammar import PriorStatement, parse_prior
from hsivi_cli.targets.priors import PriorStack
from hsivi_cli.targets.regression_checks import check_posterior, check_response_varies
from hsivi_cli.targets.regression_coordinates import aux_coordinates, coefficient_map
from hsivi_cli.targets.regression_model import Regression

if TYPE_CHECKING:
    import pandas


def regression_density(
    frame: "pandas.DataFrame",
    formula: str | None,
    family: str | None,
    priors: Sequence[str] = (),
    na: str = "error",
) -> Density:
    """The posterior of a regression; without a formula the last column on all others, without a family a guess.

    `priors` are statements as `b=normal(0,10)`; the rest get weakly informative defaults, all listed in `facts`.
    `na` is `drop` or `error` and speaks of the columns in use. Raises InputError for bad formulas, data, priors, and
    for posteriors that are improper.
    """
    columns = [str(name) for name in frame.columns]
    text = formula or default_formula(columns)
    kept, dropped = select_complete(frame, formula_columns(text, frame), cast(Literal["drop", "error"], na))
    if len(kept) < 2:
        raise InputError(f"{'one row' if len(kept) else 'no row'} of data is no regression: give two or more")
    design = build_design(text, kept)
    facts = [] if formula else [f"formula {shortened(text)} (the last column on all others)"]
    chosen, reason = _family(design, family)
    if family is None:
        facts.append(f"family {chosen.name} (a guess from {design.response}: {reason}; --family says otherwise)")
    if design.levels:
        facts.append(f'response {design.response}: 1 is "{design.levels[1]}", 0 is "{design.levels[0]}"')
    if dropped:
        facts.append(f"{dropped} of {len(frame)} rows dropped for missing values")
    facts.append(f"{len(kept)} rows")
    statements = [parse_prior(statement) for statement in priors]
    return _assemble(design, chosen, statements, facts).density()


def _family(design: Design, name: str | None) -> tuple[Family, str]:
    guess, reason = guess_family(design.y, design.trials, design.levels is not None)
    family = family_named(name) if name else guess
    check_response(family, design.y, design.trials, design.response, design.levels is not None)
    return family, reason


def _assemble(design: Design, family: Family, statements: list[PriorStatement], facts: list[str]) -> Regression:
    check_response_varies(design, family)
    scale = response_scale(family, design)
    priors = choose_priors(design, family, scale, statements)
    X = np.concatenate([np.ones((len(design.y), int(design.intercept))), design.X], 1)
    notes = check_posterior(X, design, family, priors)
    mapped = coefficient_map(X, design, family, priors, scale)
    groups = None
    if design.groups:
        groups = GroupEffects(design.groups, priors.sd, priors.correlation, scale.spread)
    return Regression(
        name=design.formula,
        family=family,
        y=torch.from_numpy(design.y),
        trials=None if design.trials is None else torch.from_numpy(design.trials),
        names=coefficient_names(design, family.aux),
        matrix=torch.from_numpy(mapped.matrix),
        base=torch.from_numpy(mapped.base),
        start=torch.from_numpy(mapped.start),
        slope=torch.from_numpy(mapped.slope),
        prior_start=torch.from_numpy(mapped.prior_start),
        prior_slope=torch.from_numpy(mapped.prior_slope),
        log_det=mapped.log_det,
        coordinates=mapped.coordinates,
        coefficient_priors=PriorStack(priors.coefficients),
        aux_coordinates=aux_coordinates(family, design, priors, scale, mapped.residual),
        aux_priors=PriorStack(priors.aux),
        groups=groups,
        facts=(*facts, *priors.facts, *notes),
    )

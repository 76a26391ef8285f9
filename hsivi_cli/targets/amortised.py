"""A model as amortised inference wants it: prior, likelihood and simulator over unconstrained coordinates, for many
observations at once.

Shapes: b observations, k draws each, d coordinates, N numbers an observation. All in float64.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets.model import OUT_OF_RANGE, Model, density_of, log_values, prior_sampler, run_batched
from hsivi_cli.targets.model_calls import as_double, as_scalar, call_simulate, single_draw, user_code
from hsivi_cli.targets.model_checks import Report, check_model
from hsivi_cli.targets.supports import Parameter, Params, constrain_all, coordinate_names
from hsivi_cli.targets.user_model import model_maker

BLOCK_ENTRIES = 2_000_000
"""Draws are evaluated in blocks of about so many numbers."""
LOST_MOST = 0.5
"""A simulator that loses a larger share of its simulations (NaN) is not to be learned from."""
OBSERVATION = "y "
"""Where a draw's observation travels beside its parameters; no parameter can be called so."""

Prior = Callable[[Float[Tensor, "*n d"]], Float[Tensor, "*n"]]
Likelihood = Callable[[Float[Tensor, "b k d"], Float[Tensor, "b N"]], Float[Tensor, "b k"]]
Sampler = Callable[[int, torch.Generator], Float[Tensor, "n d"]]
Simulator = Callable[[Float[Tensor, "n d"], torch.Generator], Float[Tensor, "n N"]]


@dataclass(frozen=True)
class AmortisedTarget:
    """What a posterior given many observations needs of a model.

    `log_prior(z)` maps (..., d) to (...) and includes the log Jacobian; `log_likelihood(z, x)` maps (b, k, d) and
    (b, N) to (b, k), differentiable, -inf where a point is impossible or the arithmetic breaks down.
    `sample_prior(n, generator)` draws (n, d), `simulate(z, generator)` an observation for each row; each is None where
    the model has none. `observed` are the observations given, (B, N); `constrain` names what the user sees,
    `coordinates` the columns of z; `facts` are lines to print. `columns` are those of the table that an observation is
    made of, in their order, where it is just these; None where the model computes it.
    """

    name: str
    dim: int
    observed: Float[Tensor, "B N"]
    log_prior: Prior
    log_likelihood: Likelihood
    constrain: Callable[[Float[Tensor, "n d"]], dict[str, Tensor]]
    sample_prior: Sampler | None = None
    simulate: Simulator | None = None
    coordinates: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Simulations:
    """Prior draws `z` (n, d) and an observation `x` (n, N) of each; `lost` others were not finite and are left out."""

    z: Float[Tensor, "n d"]
    x: Float[Tensor, "n N"]
    lost: int


def load_amortised(path: Path, table: Any) -> AmortisedTarget:
    """The model in the file `path` for every row of the DataFrame `table`, one observation each.

    `model(data)` is called with tables of one row and says what is observed in it, so that covariates may not differ
    between rows. Raises InputError with one line for what cannot be amortised.
    """
    make = model_maker(path)
    name = Path(path).name
    observed = read_observations(make, table, name)
    first, last = (make(table.iloc[[row]].reset_index(drop=True)) for row in (0, len(table) - 1))
    target = amortise(first, name, observed, generated=_same_generated(first, last))
    return replace(target, columns=find_columns(table, observed))


def find_columns(table: Any, observed: Float[Tensor, "B N"]) -> tuple[str, ...] | None:
    """The columns of `table` that hold the observations, one number each and in this order; None where there are none.

    By them, new rows can be read without the model.
    """
    numbers = table.select_dtypes("number")
    if numbers.shape[1] == observed.shape[1] and bool((numbers.to_numpy(float) == observed.numpy()).all()):
        return tuple(str(name) for name in numbers.columns)
    found = []
    for column in observed.T.numpy():
        same = [str(name) for name in numbers.columns if bool((numbers[name].to_numpy(float) == column).all())]
        if len(same) != 1:  # none, or a guess
            return None
        found += same
    return tuple(found) if len(set(found)) == len(found) else None


def read_observations(make: Callable[[Any], Model], table: Any, name: str) -> Float[Tensor, "B N"]:
    """What `make(row).observed` says of every row of `table`. Raises InputError, naming the row at fault."""
    if not hasattr(table, "iloc") or not len(table):
        raise InputError(f"{name}: amortised inference wants a table (CSV or parquet) with an observation in each row")
    rows: list[Tensor] = []
    for number in range(len(table)):
        try:
            observed = make(table.iloc[[number]].reset_index(drop=True)).observed
        except InputError as err:
            raise InputError(f"row {number + 1} of the table: {err}") from err
        if observed is None:
            raise InputError(f"{name}: the model gives no observed=..., by which the rows of the table are told apart")
        if rows and len(observed) != len(rows[0]):
            raise InputError(f"{name}: row {number + 1} of the table has {len(observed)} numbers, row 1 {len(rows[0])}")
        rows.append(observed)
    return torch.stack(rows)


def amortise(
    model: Model,
    name: str = "model",
    observed: Float[Tensor, "B N"] | None = None,
    report: Report | None = None,
    generated: bool = True,
) -> AmortisedTarget:
    """`model` for the observations `observed`, by default its own alone; `report` is that of an earlier check.

    Without `generated`, `constrain` gives the parameters only: what the model generates speaks of its own observation.

    Raises InputError for what `check_model` refuses, and where the likelihood knows its own observation only.
    """
    report = report or check_model(model, name)
    parameters = tuple(model.parameters)
    dim = sum(parameter.size for parameter in parameters)
    if observed is None:
        observed = torch.zeros(1, 0, dtype=torch.float64) if model.observed is None else model.observed[None]
    if not model.takes_response and len(observed) > 1:
        raise InputError(f"{name}: log_likelihood(p) knows one observation only: write log_likelihood(p, y)")
    width = max(report.observations, observed.shape[1], dim)

    def prior(row: dict[str, Tensor]) -> Tensor:
        return as_scalar(model.log_prior(Params(row)))

    def likelihood(row: dict[str, Tensor]) -> Tensor:
        p = Params({key: value for key, value in row.items() if key != OBSERVATION})
        return as_scalar(model.log_likelihood(p, row[OBSERVATION]) if model.takes_response else model.log_likelihood(p))

    vmap = report.vmap and _batches(likelihood, parameters, observed, name, model)
    slow = f"{name} is evaluated draw by draw, slowly: torch.func.vmap cannot batch it over observations"
    facts = (*report.facts, slow) if report.vmap and not vmap else report.facts

    def log_prior(z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        def part(rows: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
            values, log_jacobian = constrain_all(parameters, rows)
            return log_values(prior, values, dim, report.vmap, name, (model.log_prior,)) + log_jacobian

        return _in_blocks(part, z.reshape(-1, dim), dim).reshape(z.shape[:-1])

    def log_likelihood(z: Float[Tensor, "b k d"], x: Float[Tensor, "b N"]) -> Float[Tensor, "b k"]:
        observation = torch.arange(len(z)).repeat_interleave(z.shape[1])

        def part(rows: Float[Tensor, "m d"], first: int) -> Float[Tensor, " m"]:
            values, _ = constrain_all(parameters, rows)
            values[OBSERVATION] = x[observation[first : first + len(rows)]].double()
            return log_values(likelihood, values, width, vmap, name, (model.log_likelihood,))

        return _in_blocks(part, z.reshape(-1, dim), width, counted=True).reshape(z.shape[:2])

    if len(observed) > 1:
        _check_response_matters(log_likelihood, observed, dim, name)
    return AmortisedTarget(
        name,
        dim,
        observed,
        log_prior,
        log_likelihood,
        density_of(model if generated else replace(model, generated=None), name, report).constrain,
        prior_sampler(model, name) if model.sample_prior is not None else None,
        _simulator(model, report, name, observed.shape[1]) if model.simulate is not None else None,
        tuple(coordinate_names(parameters)),
        facts,
        parameters,
    )


def simulate_pairs(target: AmortisedTarget, n: int, generator: torch.Generator) -> Simulations:
    """`n` prior draws and a simulated observation of each, those that are not finite left out and counted.

    Raises InputError where the model cannot simulate, RunError where most simulations are lost.
    """
    if target.sample_prior is None or target.simulate is None:
        missing = "sample_prior" if target.sample_prior is None else "simulate"
        raise InputError(f"{target.name}: simulations need {missing}=... in the model")
    z = target.sample_prior(n, generator)
    x = target.simulate(z, generator)
    kept = torch.isfinite(x).all(1) & torch.isfinite(z).all(1)
    lost = n - int(kept.sum())
    if lost > LOST_MOST * n:
        raise RunError(f"{target.name}: {lost} of {n} simulations are not finite: mend simulate, or narrow the prior")
    return Simulations(z[kept], x[kept], lost)


def _in_blocks(
    part: Callable[..., Tensor], rows: Float[Tensor, "m d"], width: int, counted: bool = False
) -> Float[Tensor, " m"]:
    """`part` of all rows, block by block; with `counted` it is also told the number of its first row."""
    size = max(1, BLOCK_ENTRIES // max(width, 1))
    found = [
        part(rows[first : first + size], *([first] if counted else [])) for first in range(0, max(len(rows), 1), size)
    ]
    value = torch.cat(found)
    return torch.where(value < math.inf, value, -math.inf)  # nan, too, and +inf: no density is infinite


def _batches(
    likelihood: Callable[[dict[str, Tensor]], Tensor],
    parameters: Any,
    observed: Float[Tensor, "B N"],
    name: str,
    model: Model,
) -> bool:
    """Whether vmap over draws and observations gives what one at a time does."""
    dim = sum(parameter.size for parameter in parameters)
    z = 0.5 * torch.randn(4, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, _ = constrain_all(parameters, z)
    values[OBSERVATION] = observed[torch.tensor([0, -1, 0, -1])]
    arguments = (likelihood, values, 1)
    alone = log_values(*arguments, False, name, (model.log_likelihood,))
    try:
        together = run_batched(*arguments, True, name, (model.log_likelihood,))
    except RunError as err:
        return isinstance(err.__cause__, OUT_OF_RANGE)  # broke down at a point, which is dealt with where it happens
    finite = torch.isfinite(alone)
    return torch.allclose(alone[finite], together[finite], rtol=1e-9, atol=1e-9)


def _check_response_matters(
    log_likelihood: Likelihood, observed: Float[Tensor, "B N"], dim: int, name: str, rows: int = 10
) -> None:
    """Raises InputError where other observations do not change the likelihood: it has captured the first one."""
    x = torch.unique(observed, dim=0)[:rows]
    z = torch.randn(1, 20, dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        found = log_likelihood(z.expand(len(x), -1, -1), x)
    if len(x) > 1 and bool(torch.isfinite(found).any()) and bool((found == found[:1]).all()):
        raise InputError(f"{name}: log_likelihood(p, y) is the same for all observations: it must use y, not the data")


def _same_generated(first: Model, last: Model) -> bool:
    """Whether `generated` of two observations says the same of the same parameters, so that it serves for all."""
    if first.generated is None or last.generated is None:
        return False
    parameters = tuple(first.parameters)
    z = 0.5 * torch.randn(3, sum(p.size for p in parameters), generator=torch.Generator().manual_seed(4)).double()
    with contextlib.suppress(Exception), user_code(validate=False):
        for point in z:
            one, other = (model.generated(single_draw(point, parameters)[0]) for model in (first, last))  # type: ignore[misc]
            if any(not torch.equal(as_double(one[key]), as_double(other[key])) for key in one):
                return False
        return True
    return False


def _simulator(model: Model, report: Report, name: str, size: int) -> Simulator:
    """`simulate` of many draws in blocks; rows of NaN where its arithmetic breaks down."""
    parameters, simulate = tuple(model.parameters), model.simulate
    assert simulate is not None

    def some(values: dict[str, Tensor], generator: torch.Generator) -> Float[Tensor, "m N"]:
        rows = len(next(iter(values.values())))
        try:
            return call_simulate(simulate, values, generator, size, name, report.vmap_simulate)
        except RunError as err:
            if not isinstance(err.__cause__, OUT_OF_RANGE):
                raise
        if rows == 1:
            return torch.full((1, size), torch.nan, dtype=torch.float64)
        halves = (slice(rows // 2), slice(rows // 2, rows))
        return torch.cat([some({key: value[half] for key, value in values.items()}, generator) for half in halves])

    def draw(z: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n N"]:
        found = []
        for part in z.detach().split(max(1, BLOCK_ENTRIES // max(size, 1))):
            values, _ = constrain_all(parameters, part)
            found.append(some(values, generator))
        return torch.cat(found) if found else torch.zeros(0, size, dtype=torch.float64)

    return draw

"""A user's own model: named parameters, a log prior and a log likelihood in plain torch, written for one draw.

Everything a user's function sees is on the constrained scale. The transforms, their Jacobians, the batching over draws
(torch.func.vmap) and the derivatives are ours.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets.density import Batch, Density, Parts, Predictive
from hsivi_cli.targets.model_calls import as_double, as_scalar, call_sample_prior, call_simulate, describe, user_code
from hsivi_cli.targets.model_checks import Report, check_model
from hsivi_cli.targets.supports import Parameter, Params, constrain_all, unconstrain_all

__all__ = ["Model", "Parameter", "density_of"]

OUT_OF_RANGE = (
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    ArithmeticError,
    ValueError,
)
"""What a model raises where its arithmetic breaks down; Stan, too, takes such points as impossible."""
CHUNK_ENTRIES = 20_000_000
"""Draws are evaluated in chunks of about so many float64 entries, however many are asked for."""


@dataclass(frozen=True)
class Model:
    """What a user's `model(data)` returns; every function is written for ONE draw `p` of the parameters.

    `p["mu"]` or `p.mu` is a float64 tensor of that parameter's shape, on its support.

    - `log_prior(p)`: a scalar, the log density on the constrained scale (no Jacobian). 0.0 means flat.
    - `log_likelihood(p)`: a scalar, or a vector with one value per observation. With two arguments it is called as
      `log_likelihood(p, observed)`, and the model can be given other responses, as `--sbc` needs.
    - `generated(p)`: a dict of further quantities to report.
    - `observed`, `simulate(p, generator)`: the response (N,), and one replicated response, for predictive
    - `sample_prior(generator)`: a dict with one prior draw of every parameter, for `--sbc`.

    In the last two, torch.distributions' own `.sample()` is seeded too; numpy is not. Raises InputError for what cannot
    be a model.
    """

    parameters: Sequence[Parameter]
    log_prior: Callable[[Any], Any]
    log_likelihood: Callable[..., Any]
    generated: Callable[[Any], Mapping[str, Any]] | None = None
    simulate: Callable[[Any, torch.Generator], Any] | None = None
    sample_prior: Callable[[torch.Generator], Mapping[str, Any]] | None = None
    observed: Any = None

    def __post_init__(self) -> None:
        """Check the fields and turn `observed` into a float64 vector."""
        listed = isinstance(self.parameters, list | tuple) and len(self.parameters) > 0
        if not listed or not all(isinstance(parameter, Parameter) for parameter in self.parameters):
            raise InputError("Model: parameters must be a list with one Parameter(...) at least")
        object.__setattr__(self, "parameters", tuple(self.parameters))
        names = [parameter.name for parameter in self.parameters]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"Model: two parameters are called {twice[0]!r}: give each its own name")
        for field in ("log_prior", "log_likelihood", "generated", "simulate", "sample_prior"):
            value = getattr(self, field)
            if not callable(value) and (value is not None or field.startswith("log_")):
                raise InputError(f"Model: {field} must be a function, not {type(value).__name__}")
        if self.observed is not None:
            try:
                observed = torch.as_tensor(self.observed).detach().double()
            except (TypeError, ValueError, RuntimeError):
                raise InputError("Model: observed must be a tensor of numbers") from None
            if observed.ndim != 1 or not bool(torch.isfinite(observed).all()):
                shape = tuple(observed.shape)
                raise InputError(f"Model: observed must be a vector of finite numbers, its shape is {shape}")
            object.__setattr__(self, "observed", observed)
        if self.takes_response and self.observed is None:
            raise InputError("Model: log_likelihood(p, y) takes the response: give it as observed=...")

    @cached_property
    def takes_response(self) -> bool:
        """Whether `log_likelihood` takes the response as its second argument."""
        return _required_arguments(self.log_likelihood) == 2

    def prior_term(self, p: Params) -> Any:
        """`log_prior` of one draw, as the user returns it."""
        return self.log_prior(p)

    def likelihood_term(self, p: Params) -> Any:
        """`log_likelihood` of one draw, as the user returns it."""
        return self.log_likelihood(p, self.observed) if self.takes_response else self.log_likelihood(p)


def _required_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def density_of(model: Model, name: str = "model", report: Report | None = None) -> Density:
    """The posterior of `model` as a density over its unconstrained coordinates, in the order of the parameters.

    Without the `report` of an earlier check the model is tried at a few points first: InputError, with the line at
    fault where it is known, for what raises, has a wrong shape, is NaN, is not differentiable, or looks improper.
    Where the model later raises a numerical error (a matrix that is not positive definite far from the data), the
    density is zero there; anything else that it raises is a RunError.
    """
    report = report or check_model(model, name)
    parameters = tuple(model.parameters)

    def one(values: dict[str, Tensor]) -> Tensor:
        p = Params(values)
        prior, likelihood = as_scalar(model.prior_term(p)), as_scalar(model.likelihood_term(p))
        return prior + likelihood

    def total(values: dict[str, Tensor]) -> Float[Tensor, " n"]:
        return log_values(one, values, report.observations, report.vmap, name, (model.log_prior, model.log_likelihood))

    def log_prob(z: Batch) -> Float[Tensor, " n"]:
        values, log_jacobian = constrain_all(parameters, z)
        return total(values) + log_jacobian

    def constrain(z: Batch) -> dict[str, Tensor]:
        values, _ = constrain_all(parameters, z)
        if model.generated is None or len(z) == 0:
            return values
        with torch.no_grad():
            more = run_batched(_generated(model), values, 1, report.vmap_generated, name, (model.generated,))
        return values | more

    return Density(
        name,
        sum(parameter.size for parameter in parameters),
        log_prob,
        constrain,
        predictive=_predictive(model, name, report),
        facts=(f"priors: as log_prior of {name} has them", *report.facts),
        parts=_parts(model, name, report),
    )


def _parts(model: Model, name: str, report: Report) -> Parts | None:
    """Prior and likelihood apart, where the model can draw from its prior."""
    if model.sample_prior is None:
        return None
    parameters = tuple(model.parameters)

    def term(function: Callable[[Params], Any], values: dict[str, Tensor], blamed: Any) -> Float[Tensor, " n"]:
        def one(row: dict[str, Tensor]) -> Tensor:
            return as_scalar(function(Params(row)))

        return log_values(one, values, report.observations, report.vmap, name, (blamed,))

    def log_prior(z: Batch) -> Float[Tensor, " n"]:
        values, log_jacobian = constrain_all(parameters, z)
        return term(model.prior_term, values, model.log_prior) + log_jacobian

    def log_likelihood(z: Batch) -> Float[Tensor, " n"]:
        return term(model.likelihood_term, constrain_all(parameters, z)[0], model.log_likelihood)

    return Parts(prior_sampler(model, name), log_prior, log_likelihood)


def _generated(model: Model) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    assert model.generated is not None
    generated = model.generated
    return lambda values: {key: as_double(value) for key, value in generated(Params(values)).items()}


def log_values(
    function: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    width: int,
    vmap: bool,
    name: str,
    blamed: tuple[Callable[..., Any], ...],
) -> Float[Tensor, " n"]:
    """`run_batched` for a log density: -inf for draws at which the user's arithmetic breaks down."""
    rows = len(next(iter(values.values())))
    try:
        found: Tensor = run_batched(function, values, width, vmap, name, blamed)
        return found
    except RunError as err:
        if not isinstance(err.__cause__, OUT_OF_RANGE):
            raise
    if rows == 1:  # the sum keeps the graph, with a gradient of zero
        return -torch.inf + 0.0 * torch.stack([value.nan_to_num().sum() for value in values.values()]).sum()[None]
    # a batch raises as a whole: halve it until the rows at fault are alone
    parts = (slice(rows // 2), slice(rows // 2, rows))
    halves = [{key: value[part] for key, value in values.items()} for part in parts]
    return torch.cat([log_values(function, half, width, vmap, name, blamed) for half in halves])


def run_batched(
    function: Callable[[dict[str, Tensor]], Any],
    values: dict[str, Tensor],
    width: int,
    vmap: bool,
    name: str,
    blamed: tuple[Callable[..., Any], ...],
) -> Any:
    """`function` of every draw, by vmap or draw by draw; `width` entries a draw decide the chunks.

    Raises RunError, caused by what the user's code raised and naming the line of the user's file.
    """
    draws = len(next(iter(values.values())))
    try:
        with user_code(validate=False):
            if vmap and draws:
                chunk = max(1, CHUNK_ENTRIES // max(width, 1))
                return torch.func.vmap(function, chunk_size=chunk if chunk < draws else None)(values)
            rows = [function({key: value[i] for key, value in values.items()}) for i in range(draws)]
    except Exception as err:
        raise RunError(f"{name} failed at a draw: {describe(err, *blamed)}") from err
    if rows and isinstance(rows[0], dict):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)


def _predictive(model: Model, name: str, report: Report) -> Predictive | None:
    """What the model says about its response, as far as it says it."""
    if model.observed is None or model.simulate is None:
        return None
    parameters, observed, simulate = tuple(model.parameters), model.observed, model.simulate

    def replicate(z: Batch, generator: torch.Generator) -> Float[Tensor, "n N"]:
        values, _ = constrain_all(parameters, z.detach())
        return call_simulate(simulate, values, generator, len(observed), name, report.vmap_simulate)

    def log_likelihood(z: Batch) -> Float[Tensor, "n N"]:
        values, _ = constrain_all(parameters, z)
        pointwise = lambda row: as_double(model.likelihood_term(Params(row)))  # noqa: E731
        return run_batched(pointwise, values, len(observed), report.vmap, name, (model.log_likelihood,))

    def prior(n: int, generator: torch.Generator) -> Batch:
        return unconstrain_all(parameters, call_sample_prior(model, n, generator, name))

    def condition(response: Float[Tensor, " N"]) -> Density:
        # checked once already, and a check per simulated response would cost more than it tells
        return density_of(replace(model, observed=response), name, report)

    return Predictive(
        observed,
        replicate,
        log_likelihood if report.pointwise else None,
        prior if model.sample_prior is not None else None,
        condition if model.takes_response else None,
    )


def prior_sampler(model: Model, name: str) -> Callable[[int, torch.Generator], Batch]:
    """Draws from the prior, by vmap where it draws what single calls draw, else draw by draw."""
    parameters = tuple(model.parameters)

    def varies(vmap: bool) -> list[bool]:
        drawn = call_sample_prior(model, 4, torch.Generator().manual_seed(0), name, vmap)
        return [bool((drawn[parameter.name] != drawn[parameter.name][:1]).any()) for parameter in parameters]

    try:
        vmap = varies(True) == varies(False)  # numpy's numbers would be the same in every row
    except RunError:
        vmap = False

    def draw(n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        return unconstrain_all(parameters, call_sample_prior(model, n, generator, name, vmap))

    return draw

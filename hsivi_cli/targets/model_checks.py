"""A user's model tried at a few points: one clear line for whatever is wrong with it, before any fit starts."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.targets.model_calls import (
    as_double,
    as_scalar,
    call_sample_prior,
    call_simulate,
    describe,
    single_draw,
    user_code,
)
from hsivi_cli.targets.model_improper import check_proper
from hsivi_cli.targets.supports import Params, constrain_all, slices, unconstrain_all

if TYPE_CHECKING:
    from hsivi_cli.targets.model import Model

PROBES = 5
"""Points tried: the origin and standard normals of half the size, in the unconstrained coordinates."""
PRIOR_TRIES = 200
"""Prior draws looked through where the density of a probe is zero."""
DIFFERENCE_STEP, DIFFERENCE_TOLERANCE = 1e-5, 1e-4
CUT = "keep the calculation in torch: .item(), float(), .detach(), numpy and rounding cut the gradient"

NO_LANGEVIN = "train by vi or hsivi, not by a Langevin method, which needs them"


@dataclass(frozen=True)
class Report:
    """What the check found out: whether vmap runs the functions, the entries of `log_likelihood`, lines to print."""

    vmap: bool = True
    vmap_generated: bool = True
    vmap_simulate: bool = False
    observations: int = 1
    pointwise: bool = False
    facts: tuple[str, ...] = ()


def check_model(model: "Model", name: str) -> Report:
    """Try every function of `model` at a few points. Raises InputError with one line that says what to mend."""
    parameters = tuple(model.parameters)
    dim = sum(parameter.size for parameter in parameters)
    draws = torch.Generator().manual_seed(0)
    z = 0.5 * torch.randn(PROBES, dim, generator=draws, dtype=torch.float64)
    z[0] = 0.0
    with user_code(validate=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of here is told better below
        z = _possible_points(model, name, z, draws)
        _check_values(model, name, z)
        _check_gradients(model, name, z[1:3])
        width, pointwise = _check_observations(model, name, z)
        facts = _check_dependence(model, name, z)
        vmap, reason = _try_vmap(model, z)
        if not vmap:
            facts.append(f"{name} is evaluated draw by draw, slowly: torch.func.vmap cannot batch it ({reason})")
        facts += _check_second_derivatives(model, z[1])
        vmap_generated = _check_generated(model, name, z)
        vmap_simulate = _check_draws(model, name, z, draws)
    check_proper(model, name, z[1:3], vmap)
    return Report(vmap, vmap_generated, vmap_simulate, width, pointwise, tuple(facts))


def _possible_points(
    model: "Model", name: str, z: Float[Tensor, "n d"], draws: torch.Generator
) -> Float[Tensor, "n d"]:
    """`z` with prior draws in place of the points whose density is zero: a check there would see nothing."""
    if model.sample_prior is None:
        return z
    parameters = tuple(model.parameters)

    def possible(point: Tensor) -> bool:
        p, _ = single_draw(point, parameters)
        return bool(as_scalar(model.prior_term(p)) + as_scalar(model.likelihood_term(p)) > -torch.inf)

    with contextlib.suppress(Exception):  # whatever is wrong is told by the checks
        inside = [possible(point) for point in z]
        if not all(inside):
            drawn = unconstrain_all(parameters, call_sample_prior(model, PRIOR_TRIES, draws, name))
            others = iter([point for point in drawn if possible(point)])
            return torch.stack([point if good else next(others, point) for point, good in zip(z, inside, strict=True)])
    return z


def _shown(p: Params) -> str:
    """Where: the first few parameters and their values."""
    parts = []
    for key, value in list(p.items())[:4]:
        numbers = [f"{x:.4g}" for x in value.detach().reshape(-1)[:3].tolist()]
        more = ", ..." if value.numel() > 3 else ""
        parts.append(f"{key}={numbers[0]}" if value.ndim == 0 else f"{key}=[{', '.join(numbers)}{more}]")
    return ", ".join(parts) + (", ..." if len(p) > 4 else "")


def _terms(model: "Model") -> list[tuple[str, Callable[[Params], Any], Callable[..., Any]]]:
    return [
        ("log_prior", model.prior_term, model.log_prior),
        ("log_likelihood", model.likelihood_term, model.log_likelihood),
    ]


def _evaluate(name: str, what: str, term: Callable[[Params], Any], user: Callable[..., Any], p: Params) -> Tensor:
    """One term at one point, its type and shape checked."""
    try:
        value = term(p)
    except Exception as err:
        raise InputError(f"{name}: {what} raised {describe(err, user)} at {_shown(p)}") from err
    if not isinstance(value, Tensor | float | int) or isinstance(value, bool):
        kind = "nothing: is a return missing?" if value is None else f"a {type(value).__name__}: return a torch tensor"
        raise InputError(f"{name}: {what} returned {kind}")
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        if what == "log_prior" and shape != ():
            raise InputError(f"{name}: log_prior returned shape {shape}: sum it to a scalar")
        if len(shape) > 1 or 0 in shape:
            hint = " (do two vectors meet as a row and a column?)" if len(shape) == 2 else ""
            raise InputError(
                f"{name}: log_likelihood returned shape {shape}: return a scalar or one value per observation{hint}"
            )
        if value.dtype in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(f"{name}: {what} returned {value.dtype}: parameters are float64, do not cast them")
        if value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{name}: {what} returned {value.dtype}: return a real number")
    return as_double(value)


def _check_values(model: "Model", name: str, z: Float[Tensor, "n d"]) -> None:
    inside = False
    for point in z:
        total = 0.0
        for what, term, user in _terms(model):
            p, _ = single_draw(point, tuple(model.parameters))
            value = _evaluate(name, what, term, user, p)
            again = _evaluate(name, what, term, user, p)
            if bool(torch.isnan(value).any()):
                raise InputError(f"{name}: {what} is NaN at {_shown(p)}: it must be a number, or -inf where impossible")
            if bool((value == torch.inf).any()):
                raise InputError(f"{name}: {what} is +infinity at {_shown(p)}: a log density is finite or -inf")
            if not torch.equal(value, again):
                raise InputError(f"{name}: {what} differs when called twice: it must not draw random numbers")
            total += float(value.sum())
        inside = inside or total > -torch.inf
    if not inside:
        p, _ = single_draw(z[1], tuple(model.parameters))
        raise InputError(
            f"{name}: log_prior + log_likelihood is -inf at every point tried, as {_shown(p)}: "
            "do the supports of the parameters match the prior?"
        )


def _check_gradients(model: "Model", name: str, z: Float[Tensor, "n d"]) -> None:
    """Autograd against central differences, along one random direction in each parameter."""
    parameters = tuple(model.parameters)
    signs = torch.where(torch.rand(z.shape[1], generator=torch.Generator().manual_seed(1)) < 0.5, -1.0, 1.0).double()
    for what, term, user in _terms(model):

        def total(point: Tensor, term: Any = term, what: str = what, user: Any = user) -> Tensor:
            return _evaluate(name, what, term, user, single_draw(point, parameters)[0]).sum()

        wrong = {parameter.name: 0 for parameter in parameters}
        for row in z:
            point = row.clone().requires_grad_(True)
            value = total(point)
            if not bool(torch.isfinite(value)):
                continue
            gradient = torch.zeros_like(row)
            if value.requires_grad:
                try:
                    found = torch.autograd.grad(value, point, allow_unused=True)[0]
                except Exception as err:
                    raise InputError(f"{name}: {what} cannot be differentiated: {describe(err, user)}") from err
                gradient = gradient if found is None else found
            for parameter, where in slices(parameters):
                if not bool(torch.isfinite(gradient[where]).all()):
                    at = _shown(single_draw(row, parameters)[0])
                    raise InputError(
                        f"{name}: the gradient of {what} in {parameter.name!r} is NaN or infinite at {at}: "
                        "look for sqrt(0) or 0 * inf, also inside torch.where"
                    )
                direction = torch.zeros_like(row)
                direction[where] = signs[where]
                upper, lower = total(row + DIFFERENCE_STEP * direction), total(row - DIFFERENCE_STEP * direction)
                slope = float((upper - lower) / (2 * DIFFERENCE_STEP))
                size = 1 + abs(slope) + 1e-6 * float(value.detach().abs())
                if not abs(float(gradient @ direction) - slope) <= DIFFERENCE_TOLERANCE * size:
                    wrong[parameter.name] += 1
        blamed = [key for key, count in wrong.items() if count == len(z)]
        if blamed:
            raise InputError(f"{name}: {what} is not differentiable in {blamed[0]!r}: {CUT}")


def _check_dependence(model: "Model", name: str, z: Float[Tensor, "n d"]) -> list[str]:
    """A line to print where the data say nothing: a likelihood that forgets its parameters is a common slip."""
    parameters = tuple(model.parameters)
    found = torch.stack([as_scalar(model.likelihood_term(single_draw(point, parameters)[0])).detach() for point in z])
    if bool((found - found[0]).abs().max() > 1e-12 * (1 + found[0].abs())):
        return []
    return [f"{name}: log_likelihood is the same at every point tried, so the posterior is the prior: is that meant?"]


def _check_observations(model: "Model", name: str, z: Float[Tensor, "n d"]) -> tuple[int, bool]:
    """Entries of `log_likelihood`, and whether they are one per observation."""
    shapes = {
        tuple(as_double(model.likelihood_term(single_draw(point, tuple(model.parameters))[0])).shape) for point in z
    }
    if len(shapes) > 1:
        raise InputError(f"{name}: log_likelihood returned different shapes at different points: {sorted(shapes)}")
    shape = shapes.pop()
    if shape and model.observed is not None and shape[0] != len(model.observed):
        raise InputError(
            f"{name}: log_likelihood returned {shape[0]} values for {len(model.observed)} observed: "
            "return one each, or their sum"
        )
    return (shape[0] if shape else 1), bool(shape) and model.observed is not None


def _try_vmap(model: "Model", z: Float[Tensor, "n d"]) -> tuple[bool, str]:
    """Whether vmap gives the same values and gradients as one draw at a time, or why not."""
    parameters = tuple(model.parameters)

    def function(p: Params) -> Tensor:
        return as_scalar(model.prior_term(p)) + as_scalar(model.likelihood_term(p))

    with user_code(validate=False):
        point = z.clone().requires_grad_(True)
        alone = torch.stack([function(single_draw(row, parameters)[0]) for row in point])
        try:
            values, _ = constrain_all(parameters, point)
            together = torch.func.vmap(lambda row: function(Params(row)))(values)
        except Exception as err:
            reason = " ".join(str(err).split()).split(". ")[0]
            causes = "usual causes: x[i] = ... on a fresh tensor, where torch.stack would do, .item(), if on a value"
            return False, f"{causes}; torch says: {reason[:120]}"
        finite = torch.isfinite(alone)
        if not torch.allclose(alone[finite], together[finite], rtol=1e-9, atol=1e-9):
            return False, "values differ from those of single draws"
        if not together.requires_grad:
            return not alone.requires_grad, "it loses the gradient"
        first = torch.autograd.grad(alone[finite].sum(), point)[0]
        second = torch.autograd.grad(together[finite].sum(), point)[0]
        return torch.allclose(first, second, rtol=1e-7, atol=1e-7), "gradients differ from those of single draws"


def _check_second_derivatives(model: "Model", z: Float[Tensor, " d"]) -> list[str]:
    """A line to print where Langevin methods, which differentiate through the gradient, have nothing to go by."""
    signs = torch.randn(len(z), generator=torch.Generator().manual_seed(2), dtype=z.dtype).sign()

    def gradient(point: Tensor) -> Tensor:
        p, log_jacobian = single_draw(point, tuple(model.parameters))
        total = as_scalar(model.prior_term(p)) + as_scalar(model.likelihood_term(p)) + log_jacobian
        return torch.autograd.grad(total, point, create_graph=True)[0]

    point = z.clone().requires_grad_(True)
    try:
        first = gradient(point)
        product = first @ signs
        found = torch.autograd.grad(product, point)[0] if product.requires_grad else torch.zeros_like(z)
    except RuntimeError as err:
        reason = " ".join(str(err).split())[:120]
        return [f"no second derivatives ({reason}): {NO_LANGEVIN}"]
    ahead, behind = (gradient((z + h * signs).requires_grad_(True)) for h in (DIFFERENCE_STEP, -DIFFERENCE_STEP))
    curvature = (ahead - behind).detach() / (2 * DIFFERENCE_STEP)
    size = 1 + curvature.abs().max() + 1e-6 * first.detach().abs().max()
    if not bool(((found - curvature).abs() <= 10 * DIFFERENCE_TOLERANCE * size).all()):
        return [f"second derivatives are wrong or not finite: {NO_LANGEVIN}"]
    return []


def _check_generated(model: "Model", name: str, z: Float[Tensor, "n d"]) -> bool:
    """Whether vmap runs `generated`."""
    if model.generated is None:
        return True
    shapes = []
    for row in z:
        p = single_draw(row, tuple(model.parameters))[0]
        try:
            found = model.generated(p)
        except Exception as err:
            raise InputError(f"{name}: generated raised {describe(err, model.generated)} at {_shown(p)}") from err
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise InputError(f"{name}: generated must return a dict of named tensors, not {type(found).__name__}")
        clash = sorted(set(found) & set(p))
        if clash:
            raise InputError(f"{name}: generated returns {clash[0]!r}, which is a parameter: choose another name")
        for key, value in found.items():
            if not isinstance(value, Tensor | float | int):
                raise InputError(f"{name}: generated returns a {type(value).__name__} for {key!r}: return a tensor")
        shapes.append({key: tuple(as_double(value).shape) for key, value in found.items()})
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(f"{name}: generated returns other names or shapes at other points: keep them fixed")
    with user_code(validate=False):
        values, _ = constrain_all(tuple(model.parameters), z)
        user = model.generated
        try:
            torch.func.vmap(lambda row: {key: as_double(value) for key, value in user(Params(row)).items()})(values)
        except Exception:
            return False
    return True


def _check_draws(model: "Model", name: str, z: Float[Tensor, "n d"], generator: torch.Generator) -> bool:
    """A few prior draws and simulated responses; whether vmap runs `simulate`."""
    try:
        if model.sample_prior is not None:
            call_sample_prior(model, 3, generator, name)
        if model.simulate is None or model.observed is None:
            return False
        values, _ = constrain_all(tuple(model.parameters), z[1:2].expand(4, -1))
        arguments = (model.simulate, values, generator, len(model.observed), name)
        alone = call_simulate(*arguments, vmap=False)
    except RunError as err:
        raise InputError(str(err)) from err
    if bool(torch.isnan(alone).any(1).all()):  # now and then is allowed: such simulations are counted and left out
        raise InputError(f"{name}: simulate returned NaN")
    try:
        together = call_simulate(*arguments, vmap=True)
    except RunError:
        return False
    # numpy's random numbers would be the same in every row; so may small counts by chance, which costs only time
    return together.shape == alone.shape and len(torch.unique(together, dim=0)) == len(together)

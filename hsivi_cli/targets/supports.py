"""Named parameters with a support, and the maps between them and the unconstrained coordinates of a density.

The maps are those of torch.distributions (`biject_to`), with two more for ordered vectors and covariance factors. They
act on whole batches, Jacobian included.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from hsivi_cli.errors import InputError

SUPPORTS = (
    "real, positive, negative, unit, interval(a,b), greater_than(a), less_than(b), simplex, ordered, "
    "correlation_cholesky, covariance_cholesky"
)
_PLAIN = {
    "real": constraints.real,
    "positive": constraints.positive,
    "negative": constraints.less_than(0.0),
    "unit": constraints.unit_interval,
    "simplex": constraints.simplex,
    "correlation_cholesky": constraints.corr_cholesky,
}
_EVENT_DIM = {"simplex": 1, "ordered": 1, "correlation_cholesky": 2, "covariance_cholesky": 2}


class Params(dict[str, Tensor]):
    """The parameters of one draw, as `p["mu"]` or `p.mu`."""

    def __getattr__(self, name: str) -> Tensor:
        """The parameter called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no parameter is called {name!r}: there are {', '.join(self)}") from None


class OrderedTransform(Transform):
    """`y_1 = x_1`, `y_k = y_{k-1} + exp(x_k)`: increasing vectors."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], torch.exp(x[..., 1:])], -1).cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], torch.log(y.diff(dim=-1))], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The Jacobian is triangular: its diagonal is 1, exp(x_2), ..."""
        return x[..., 1:].sum(-1)


class CovarianceCholeskyTransform(Transform):
    """`k(k+1)/2` numbers, row by row, to a lower triangle with a positive diagonal (through exp)."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """(..., k(k+1)/2) to (..., k, k)."""
        side = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], side, side))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """(..., k, k) to (..., k(k+1)/2)."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _call(self, x: Tensor) -> Tensor:
        shape = self.forward_shape(x.shape)
        row, column = torch.tril_indices(shape[-1], shape[-1])
        entries = torch.where(row == column, torch.exp(x), x)
        flat = x.new_zeros(*shape[:-2], shape[-1] ** 2)
        return flat.index_copy(-1, row * shape[-1] + column, entries).reshape(shape)

    def _inverse(self, y: Tensor) -> Tensor:
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1])
        entries = y[..., row, column]
        return torch.where(row == column, torch.log(entries.clamp_min(0)), entries)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of the diagonal, summed."""
        return torch.diagonal(y, dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True)
class Parameter:
    """A named unknown: its constrained `shape` and its `support`.

    `support` is one of SUPPORTS (`simplex` and `ordered` speak of the last dimension, the Cholesky factors of the last
    two), or a constraint of torch.distributions. Raises InputError for a name, shape or support that cannot be.
    """

    name: str
    shape: tuple[int, ...] = ()
    support: str | constraints.Constraint = "real"

    def __post_init__(self) -> None:
        """Check the fields; a whole number as `shape` means a vector."""
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise InputError(f"parameter name {self.name!r}: use letters, digits and underscores, no digit first")
        shape: tuple[Any, ...] = (self.shape,)
        if not isinstance(self.shape, int):
            shape = tuple(self.shape) if isinstance(self.shape, list | tuple) else ("?",)
        if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in shape):
            raise InputError(f"parameter {self.name!r}: shape {self.shape!r} is not a tuple of positive whole numbers")
        object.__setattr__(self, "shape", shape)
        dims = self.transform.codomain.event_dim
        if len(shape) < dims or (dims == 2 and shape[-1] != shape[-2]):
            wanted = {1: "a last dimension of 1 or more", 2: "two last dimensions that are equal"}[dims]
            raise InputError(f"parameter {self.name!r}: support {self.support} needs {wanted}, the shape is {shape}")
        if self.size == 0:
            raise InputError(f"parameter {self.name!r}: support {self.support} with shape {shape} leaves nothing free")

    @cached_property
    def transform(self) -> Transform:
        """Unconstrained to constrained."""
        return _transform(self.name, self.support)

    @cached_property
    def unconstrained_shape(self) -> tuple[int, ...]:
        """Shape before the transform: a simplex of 3 has 2 coordinates."""
        if self.transform.codomain.event_dim == 0:  # entry by entry; torch's way to say so imports sympy, two seconds
            return self.shape
        return tuple(self.transform.inverse_shape(torch.Size(self.shape)))

    @property
    def size(self) -> int:
        """How many unconstrained coordinates."""
        return math.prod(self.unconstrained_shape)

    def constrain(self, u: Float[Tensor, "n size"]) -> tuple[Float[Tensor, "n ..."], Float[Tensor, " n"]]:
        """Constrained values, and the log Jacobian of each row."""
        u = u.reshape(len(u), *self.unconstrained_shape)
        if self.support == "real":
            return u, u.new_zeros(len(u))
        value = self.transform(u)
        jacobian = self.transform.log_abs_det_jacobian(u, value)
        return value, jacobian.reshape(len(u), math.prod(jacobian.shape[1:])).sum(1)

    def unconstrain(self, value: Float[Tensor, "n ..."]) -> Float[Tensor, "n size"]:
        """The inverse of `constrain`; not finite where `value` is on or beyond the edge of the support."""
        return self.transform.inv(value).reshape(len(value), self.size)


def _transform(name: str, support: str | constraints.Constraint) -> Transform:
    if isinstance(support, constraints.Constraint):
        try:
            return biject_to(support)
        except NotImplementedError:
            raise InputError(f"parameter {name!r}: torch has no transform to {support}: use {SUPPORTS}") from None
    if not isinstance(support, str):
        raise InputError(f"parameter {name!r}: support {support!r} is not known: use {SUPPORTS}")
    if support in _PLAIN:
        return biject_to(_PLAIN[support])
    if support == "ordered":
        return OrderedTransform()
    if support == "covariance_cholesky":
        return CovarianceCholeskyTransform()
    call = re.fullmatch(r"\s*(interval|greater_than|less_than)\s*\(([^()]*)\)\s*", support)
    if call:
        try:
            edges = [float(edge) for edge in call[2].split(",")]
        except ValueError:
            edges = []
        finite = all(math.isfinite(edge) for edge in edges)
        if call[1] == "interval" and len(edges) == 2 and finite and edges[0] < edges[1]:
            return biject_to(constraints.interval(*edges))
        if call[1] != "interval" and len(edges) == 1 and finite:
            return biject_to(getattr(constraints, call[1])(edges[0]))
        raise InputError(f"parameter {name!r}: support {support!r} needs finite edges, as interval(0,10)")
    raise InputError(f"parameter {name!r}: support {support!r} is not known: use {SUPPORTS}")


def slices(parameters: tuple[Parameter, ...]) -> Iterator[tuple[Parameter, slice]]:
    """Each parameter and its unconstrained coordinates, in order."""
    start = 0
    for parameter in parameters:
        yield parameter, slice(start, start + parameter.size)
        start += parameter.size


def constrain_all(
    parameters: tuple[Parameter, ...], z: Float[Tensor, "n d"]
) -> tuple[dict[str, Float[Tensor, "n ..."]], Float[Tensor, " n"]]:
    """Every parameter on its own scale, and the log Jacobian of each row."""
    values, log_jacobian = {}, z.new_zeros(len(z))
    for parameter, where in slices(parameters):
        values[parameter.name], jacobian = parameter.constrain(z[:, where])
        log_jacobian = log_jacobian + jacobian
    return values, log_jacobian


def unconstrain_all(parameters: tuple[Parameter, ...], values: Mapping[str, Tensor]) -> Float[Tensor, "n d"]:
    """The unconstrained coordinates of named values, each (n, *shape)."""
    return torch.cat([parameter.unconstrain(values[parameter.name]) for parameter in parameters], 1)


def coordinate_names(parameters: tuple[Parameter, ...]) -> list[str]:
    """A name for each unconstrained coordinate: `mu`, `beta[2]`."""
    names = []
    for parameter in parameters:
        scalar = parameter.unconstrained_shape == ()
        names += [parameter.name if scalar else f"{parameter.name}[{i + 1}]" for i in range(parameter.size)]
    return names

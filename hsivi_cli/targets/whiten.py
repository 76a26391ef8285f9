"""A density in coordinates centred and scaled by a Gaussian: `z = location + scale u`, so that u is about N(0, I)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.density import Batch, Density, Linearised, Parts, Predictive


@dataclass(frozen=True)
class Affine:
    """The map `z = location + scale u`; `scale` is a lower-triangular (d, d) factor or its positive diagonal (d,)."""

    location: Float[Tensor, " d"]
    scale: Float[Tensor, "d d"] | Float[Tensor, " d"]

    @property
    def log_det(self) -> Float[Tensor, ""]:
        """Log |dz / du|."""
        return (self.scale if self.scale.ndim == 1 else self.scale.diagonal()).abs().log().sum()

    def forward(self, u: Batch) -> Batch:
        """z of u, (n, d)."""
        return self.location + (u * self.scale if self.scale.ndim == 1 else u @ self.scale.T)

    def inverse(self, z: Batch) -> Batch:
        """u of z, (n, d)."""
        centred = z - self.location
        if self.scale.ndim == 1:
            return centred / self.scale
        return torch.linalg.solve_triangular(self.scale, centred.T, upper=False).T

    def pull_back(self, gradient: Batch) -> Batch:
        """The gradient in u of a function whose gradient in z is given, `scale^T g`."""
        return gradient * self.scale if self.scale.ndim == 1 else gradient @ self.scale


def whiten(
    density: Density, location: Float[Tensor, " d"], scale: Float[Tensor, "d d"] | Float[Tensor, " d"]
) -> Density:
    """`density` in `u = scale^-1 (z - location)`, with the log Jacobian added, so that the evidence stays the same.

    `scale` is a lower-triangular factor (d, d) or a diagonal (d,). The gradient keeps its analytic form, and can still
    be differentiated. What the user sees (`constrain`, `predictive`) and known truths (`exact_draws`) are carried over.
    Raises InputError if the map is not finite and invertible, or of the wrong size.
    """
    _check(density.dim, location, scale)
    affine = Affine(location.detach().double(), scale.detach().double())
    log_det = affine.log_det
    exact_draws = density.exact_draws
    return replace(
        density,
        log_prob=lambda u: density.log_prob(affine.forward(u)) + log_det,
        constrain=lambda u: density.constrain(affine.forward(u)),
        analytic_gradient=_pulled_back(density.analytic_gradient, affine),
        linearise=_linearised(density.linearise, affine),
        predictive=None if density.predictive is None else _transported(density.predictive, affine),
        exact_draws=None if exact_draws is None else lambda n, generator: affine.inverse(exact_draws(n, generator)),
        parts=None if density.parts is None else _parts(density.parts, affine),
        initial=None if density.initial is None else affine.inverse(density.initial.double()[None])[0],
    )


def _pulled_back(gradient: Callable[[Batch], Batch] | None, affine: Affine) -> Callable[[Batch], Batch] | None:
    if gradient is None:
        return None
    return lambda u: affine.pull_back(gradient(affine.forward(u)))


def _linearised(
    linearise: Callable[[np.ndarray], Linearised] | None, affine: Affine
) -> Callable[[np.ndarray], Linearised] | None:
    """Gradient and Hessian products in u: `scale^T g` and `scale^T H scale v`."""
    if linearise is None:
        return None
    inner = linearise
    location = affine.location.numpy()
    scale = affine.scale.numpy() if affine.scale.ndim == 2 else np.diag(affine.scale.numpy())
    forward = np.ascontiguousarray(scale.T)

    def whitened(u: np.ndarray) -> Linearised:
        gradient, product = inner(location + u @ forward)
        return gradient @ scale, lambda v: product(v @ forward) @ scale

    return whitened


def _transported(predictive: Predictive, affine: Affine) -> Predictive:
    """The same model seen from u: what takes a z is given it, what returns one is mapped back."""
    prior, condition, log_likelihood = predictive.prior, predictive.condition, predictive.log_likelihood
    return replace(
        predictive,
        simulate=lambda u, generator: predictive.simulate(affine.forward(u), generator),
        log_likelihood=None if log_likelihood is None else lambda u: log_likelihood(affine.forward(u)),
        prior=None if prior is None else lambda n, generator: affine.inverse(prior(n, generator)),
        condition=None
        if condition is None
        else lambda response: whiten(condition(response), affine.location, affine.scale),
    )


def _parts(parts: Parts, affine: Affine) -> Parts:
    """Prior and likelihood seen from u; the Jacobian belongs to the prior."""
    return Parts(
        lambda n, generator: affine.inverse(parts.sample_prior(n, generator)),
        lambda u: parts.log_prior(affine.forward(u)) + affine.log_det,
        lambda u: parts.log_likelihood(affine.forward(u)),
    )


def _check(dim: int, location: Tensor, scale: Tensor) -> None:
    if location.shape != (dim,) or scale.shape not in ((dim,), (dim, dim)):
        raise InputError(
            f"cannot whiten a density of {dim} dimensions with {tuple(location.shape)}, {tuple(scale.shape)}"
        )
    diagonal = scale if scale.ndim == 1 else scale.diagonal()
    triangular = scale.ndim == 1 or bool((scale.triu(1) == 0).all())
    if not (bool(location.isfinite().all()) and bool(scale.isfinite().all()) and bool((diagonal != 0).all())):
        raise InputError("cannot whiten with a location or scale that is not finite, or a scale of zero")
    if not triangular:
        raise InputError("cannot whiten with a scale that is not lower triangular")

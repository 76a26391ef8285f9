"""The geometric bridge `log pi_k = (1 - b_k) log q + b_k log p` from a Gaussian q to a target, with learned `b_k`.

Geffner & Domke 2023 (arXiv 2208.07743), section 3 and their released code for the schedule.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LOG_TWO_PI = math.log(2 * math.pi)
MOST_INTERVALS = 32  # a schedule of more bridges than this is interpolated from 33 increments


@dataclass(frozen=True)
class DiagonalGaussian:
    """`N(mean, diag(exp(2 log_scale)))`; both have shape (d,) and may want gradients."""

    mean: Float[Tensor, " d"]
    log_scale: Float[Tensor, " d"]

    def draw(self, noise: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Reparameterised draws from standard normal noise."""
        return torch.addcmul(self.mean, self.log_scale.exp(), noise)

    def log_prob_of_noise(self, noise: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """`log q(draw(noise))`; the mean cancels."""
        return -0.5 * (noise.square().sum(1) + LOG_TWO_PI * noise.shape[1]) - self.log_scale.sum()

    def log_prob(self, z: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log density of each row."""
        return self.log_prob_of_noise((z - self.mean) * (-self.log_scale).exp())

    def gradient(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Gradient of `log_prob`."""
        return (self.mean - z) * (-2 * self.log_scale).exp()


def increment_count(bridges: int) -> int:
    """How many increments the schedule of this many bridges has."""
    return min(bridges, MOST_INTERVALS) + 1


@functools.cache
def _interpolation(bridges: int) -> Float[Tensor, "k g"]:
    """The matrix from normalised increments to the values at `k / (K + 1)`."""
    count = increment_count(bridges)
    place = torch.arange(1, bridges + 1, dtype=torch.float64) * count / (bridges + 1)  # in knots
    return (place[:, None] - torch.arange(count)).clamp(0, 1)  # the share of each increment passed by then


def schedule(increments: Float[Tensor, " g"], bridges: int) -> Float[Tensor, " k"]:
    """`b_1 < ... < b_K` in (0, 1) from positive increments; equal increments give `k / (K + 1)`.

    The normalised cumulative sums of the increments are the values at equidistant knots; `b_k` is their linear
    interpolation at `k / (K + 1)`. Up to 32 bridges the knots are those points. Raises ValueError unless there are
    `increment_count(bridges)` increments.
    """
    if increments.shape != (increment_count(bridges),):
        raise ValueError(f"{bridges} bridges need {increment_count(bridges)} increments, not {tuple(increments.shape)}")
    return _interpolation(bridges) @ (increments / increments.sum())


Rows = Float[Tensor, "n d"]
Array = np.ndarray
Linearised = tuple[Array, Callable[[Array], Array]]


def linearise_by_autograd(gradient: Callable[[Rows], Rows]) -> Callable[[Array], Linearised]:
    """What `GeometricBridge.linearise` wants, for any differentiable gradient."""

    def at(z: Array) -> Linearised:
        with torch.enable_grad():
            point = torch.from_numpy(z).requires_grad_(True)
            value = gradient(point)

        def product(v: Array) -> Array:
            return torch.autograd.grad(value, point, torch.from_numpy(v), retain_graph=True)[0].numpy()

        return value.detach().numpy(), product

    return at


@dataclass(frozen=True)
class GeometricBridge:
    """The bridges 1 .. K between `reference` and the density whose gradient is `target_gradient`.

    `linearise(z)` is that gradient at the rows of an array z, and the product `v -> H v` with the target's Hessian at
    each row (both must be safe to keep, and new arrays); it is what a walk spends its time in.
    """

    reference: DiagonalGaussian
    target_gradient: Callable[[Rows], Rows]
    betas: Float[Tensor, "k 1 1"]
    linearise: Callable[[Array], Linearised]

    def gradient(self, k: int, z: Rows) -> Rows:
        """`g_k = (1 - b_k) grad log q + b_k grad log p` at z, k counted from 0."""
        return torch.lerp(self.reference.gradient(z), self.target_gradient(z), self.betas[k, 0])


def geometric_bridge(
    reference: DiagonalGaussian,
    target_gradient: Callable[[Rows], Rows],
    betas: Float[Tensor, " k"],
    linearise: Callable[[Array], Linearised] | None = None,
) -> GeometricBridge:
    """A bridge whose Hessian products come from autograd unless `linearise` is given.

    Without gradients there are no products either: the walk then asks for the gradient alone.
    """
    if not torch.is_grad_enabled():
        return GeometricBridge(reference, target_gradient, betas[:, None, None], _gradient_alone(target_gradient))
    products = linearise or linearise_by_autograd(target_gradient)
    return GeometricBridge(reference, target_gradient, betas[:, None, None], products)


def _gradient_alone(gradient: Callable[[Rows], Rows]) -> Callable[[Array], Linearised]:
    def no_product(v: Array) -> Array:
        raise RuntimeError("this walk was made without gradients")

    return lambda z: (gradient(torch.from_numpy(z)).detach().numpy(), no_product)

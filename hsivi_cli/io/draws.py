"""Draws from a posterior approximation: what every method returns, before they are named, weighted or written."""

from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """`n` draws in the unconstrained coordinates of their density, all in float64.

    `log_prob` is the unnormalised log density there. `log_weight` is an unbiased weight, `E exp(log_weight) = Z`, for
    the methods that have one (None for the others); its mean is then the ELBO. `log_approx` is the log density of the
    approximation at the draw, exact, or estimated as `note` says, or None.
    """

    z: Float64[Tensor, "n d"]
    log_prob: Float64[Tensor, " n"]
    log_weight: Float64[Tensor, " n"] | None = None
    log_approx: Float64[Tensor, " n"] | None = None
    note: str = ""

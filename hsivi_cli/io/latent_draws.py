"""Draws of the latents of rows: what every posterior of a latent-variable model returns, before anything is written."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LatentDraws:
    """k draws of d latents for each of n rows, with the mean and standard deviation of the approximation.

    Where those have no closed form they are of the k draws, so that one draw has a deviation of 0.

    `log_weight` is an unbiased weight, `E exp(log_weight) = p(x)` exactly (methods with auxiliary variables use the
    exact auxiliary ratio), so that its mean is a true ELBO and its logmeanexp IWAE-k; None where there is no density,
    and where none were asked for (`weigh=False`, which costs no decoder).
    """

    z: Float[Tensor, "k n d"]
    log_weight: Float[Tensor, "k n"] | None
    mean: Float[Tensor, "n d"]
    sd: Float[Tensor, "n d"]

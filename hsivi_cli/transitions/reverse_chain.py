"""A chain run backwards from y_T to y_0 = z by Gaussian kernels, with all that its densities need kept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""`(t, y_t)` to mean and log sd of `q(y_{t-1} | y_t, x)`, shapes (m, d) each, or (1, d) for the log sd."""


@dataclass(frozen=True)
class Chain:
    """m chains of T steps in R^d, reparameterised by standard normals throughout.

    `states[t]` is y_t; step t, entry t - 1 of `mean`, `log_sd` and `noise`, leads from y_t to y_{t-1}. `start_mean`,
    `start_log_sd` and `start_noise` are those of q(y_T | x).
    """

    states: Float[Tensor, "T+1 m d"]
    mean: Float[Tensor, "T m d"]
    log_sd: Float[Tensor, "T m d"]
    noise: Float[Tensor, "T m d"]
    start_mean: Float[Tensor, "m d"]
    start_log_sd: Float[Tensor, "m d"]
    start_noise: Float[Tensor, "m d"]

    @property
    def z(self) -> Float[Tensor, "m d"]:
        """The chains' ends, y_0."""
        return self.states[0]


def run_chain(
    start_mean: Float[Tensor, "m d"],
    start_log_sd: Float[Tensor, "m d"],
    kernel: Kernel,
    noise: Float[Tensor, "T+1 m d"],
) -> Chain:
    """Run m chains; `noise[T]` makes y_T and `noise[t - 1]` makes y_{t-1}."""
    shocks = noise.unbind(0)
    state = torch.addcmul(start_mean, start_log_sd.exp(), shocks[-1])
    states, means, log_sds = [state], [], []
    for t in range(len(shocks) - 1, 0, -1):
        mean, log_sd = kernel(t, state)
        state = torch.addcmul(mean, log_sd.exp(), shocks[t - 1])
        states.append(state)
        means.append(mean)
        log_sds.append(log_sd)
    states.reverse()
    means.reverse()
    log_sds.reverse()
    return Chain(
        torch.stack(states),
        torch.stack(means),
        torch.stack(log_sds),
        noise[:-1],
        start_mean,
        start_log_sd,
        noise[-1],
    )


@torch.no_grad()
def run_to_end(
    start_mean: Float[Tensor, "m d"],
    start_log_sd: Float[Tensor, "m d"],
    kernel: Kernel,
    noise: Float[Tensor, "T+1 m d"],
) -> Float[Tensor, "m d"]:
    """The same chains' ends alone, where no density is asked for; no gradients."""
    state = torch.addcmul(start_mean, start_log_sd.exp(), noise[-1])
    for t in range(len(noise) - 1, 0, -1):
        mean, log_sd = kernel(t, state)
        state = torch.addcmul(mean, log_sd.exp(), noise[t - 1])
    return state

"""The noising process of a latent, `y_0 = z, y_1, ..., y_T` (DDVI, arXiv 2401.02739), and the tables that depend on it.

    r(y_t | y_{t-1}) = N(sqrt(alpha_t) y_{t-1}, beta_t I),   r(y_t | z) = N(sqrt(abar_t) z, (1 - abar_t) I),
    r(y_{t-1} | y_t, z) = N(w0_t z + w1_t y_t, btilde_t I).

Three schedules. "cosine" (Nichol & Dhariwal 2021) and "linear" (the betas of a DDPM with 1000 steps, multiplied by
1000 / T) leave next to nothing of z at y_T for any T. "unscaled" is the public code's: betas from 1e-4 to 0.02 for
every T, so that y_20 still has 0.82 of the variance of z, and a Gaussian q(y_T | x) cannot fit two modes.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError

NoiseName = Literal["cosine", "linear", "unscaled"]
NOISES = ("cosine", "linear", "unscaled")
COSINE_OFFSET, COSINE_LEAST, COSINE_MOST = 0.008, 1e-4, 0.9999
LINEAR_FIRST, LINEAR_LAST, LINEAR_MOST = 0.1, 20.0, 0.999  # the rate of the diffusion in time 0..1
UNSCALED_FIRST, UNSCALED_LAST = 1e-4, 0.02
MOST_TIMES = 1000


@dataclass(frozen=True)
class LatentNoise:
    """Tables of T + 1 entries, entry t that of time t; entry 0 is that of no noise (abar 1, beta and weights 0)."""

    beta: Float[Tensor, " T+1"]
    alpha: Float[Tensor, " T+1"]
    abar: Float[Tensor, " T+1"]
    w0: Float[Tensor, " T+1"]
    w1: Float[Tensor, " T+1"]
    btilde: Float[Tensor, " T+1"]

    @property
    def times(self) -> int:
        """T."""
        return len(self.beta) - 1

    def to(self, like: Tensor) -> "LatentNoise":
        """The same tables in the type and on the device of `like`."""
        return LatentNoise(**{field.name: getattr(self, field.name).to(like) for field in fields(self)})

    def diffuse(
        self, z: Float[Tensor, "n d"], times: Tensor, eps: Float[Tensor, "... n d"]
    ) -> Float[Tensor, "... n d"]:
        """`y_t` of r(y_t | z) from standard normal `eps`; `times` (...) or (..., n), a time for each row."""
        times = times[(...,) + (None,) * (eps.ndim - times.ndim)]
        abar = self.abar[times]
        return abar.sqrt() * z + (1 - abar).sqrt() * eps


def make_noise(name: str, times: int) -> LatentNoise:
    """The process of T = `times` steps, float64. Raises InputError for a name that is not known or a T out of range."""
    if not 1 <= times <= MOST_TIMES:
        raise InputError(f"--diffusion-steps {times}: use 1 to {MOST_TIMES}")
    if name == "cosine":
        angle = [(t / times + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2 for t in range(times + 1)]
        level = [math.cos(at) ** 2 for at in angle]
        ratio = torch.tensor([1 - level[t + 1] / level[t] for t in range(times)], dtype=torch.float64)
        beta = ratio.clamp(COSINE_LEAST, COSINE_MOST)
    elif name == "linear":
        beta = (torch.linspace(LINEAR_FIRST, LINEAR_LAST, times, dtype=torch.float64) / times).clamp_max(LINEAR_MOST)
    elif name == "unscaled":
        beta = torch.linspace(UNSCALED_FIRST, UNSCALED_LAST, times, dtype=torch.float64)
    else:
        raise InputError(f"noise schedule {name!r} is not known: use {', '.join(NOISES)}")
    beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])
    alpha, abar = 1 - beta, (-beta).log1p().cumsum(0).exp()
    noised = -(-beta).log1p().cumsum(0).expm1()  # 1 - abar to all digits, where abar is nearly 1
    zero = torch.zeros(1, dtype=torch.float64)
    w0 = torch.cat([zero, beta[1:] * abar[:-1].sqrt() / noised[1:]])
    w1 = torch.cat([zero, alpha[1:].sqrt() * noised[:-1] / noised[1:]])
    btilde = torch.cat([zero, beta[1:] * noised[:-1] / noised[1:]])
    return LatentNoise(beta, alpha, abar, w0, w1, btilde)

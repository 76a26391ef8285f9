"""A double-well diffusion seen through noise (Detommaso et al. 2018; KSIVI, Cheng et al. 2024).

`dx = 10 x (1 - x^2) / (1 + x^2) dt + dW` from `x_0 = 0` in 100 Euler steps on [0, 1]; every fifth state is seen with
noise of sd 0.1. The coordinates are x_1..x_100. The observations are made here, from the process itself and a fixed
seed (KSIVI's code simulates its data without the denominator, so that its numbers belong to another process).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.targets.density import Batch, Density, Predictive
from hsivi_cli.targets.examples.common import normal_log_density, randn

STEPS = 100
STEP = 1.0 / STEPS
STEP_SD = math.sqrt(STEP)
SEEN = torch.arange(4, STEPS, 5)  # t = 0.05, 0.10, ..., 1
NOISE = 0.1
# made by `synthetic(2022)`, rounded
# fmt: off
OBSERVED = torch.tensor([
    0.2302, 0.1187, 0.0166, 0.0958, 0.1712, 0.4959, -0.1202, -0.3138, -0.5828, -0.4376,
    -0.6681, -0.7236, -0.5234, -0.6844, -0.8364, -1.1241, -1.2221, -1.0315, -0.9195, -1.3416,
], dtype=torch.float64)
# fmt: on


def example() -> Density:
    """The diffusion given the observations that ship."""
    return conditioned_diffusion_density(OBSERVED)


def drift(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Towards the wells at -1 and 1."""
    return 10 * x * (1 - x**2) / (1 + x**2)


def _drift_slope(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return 10 * (1 - 4 * x**2 - x**4) / (1 + x**2) ** 2


def simulate_path(n: int, generator: torch.Generator) -> Batch:
    """Draws of the unconditioned diffusion, x_1..x_100."""
    path = [torch.zeros(n, dtype=torch.float64)]
    for _ in range(STEPS):
        path.append(path[-1] + STEP * drift(path[-1]) + STEP_SD * randn(n, generator=generator))
    return torch.stack(path[1:], 1)


def synthetic(seed: int) -> Float[Tensor, " 20"]:
    """Observations of one path."""
    generator = torch.Generator().manual_seed(seed)
    return simulate_path(1, generator)[0, SEEN] + NOISE * randn(len(SEEN), generator=generator)


def conditioned_diffusion_density(observed: Float[Tensor, " 20"]) -> Density:
    """The path given `observed`, every fifth state with noise."""

    def before(x: Batch) -> Batch:
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)

    def log_likelihood(x: Batch) -> Float[Tensor, "n 20"]:
        return normal_log_density(observed, x[:, SEEN], NOISE)

    def log_prob(x: Batch) -> Float[Tensor, " n"]:
        start = before(x)
        return normal_log_density(x, start + STEP * drift(start), STEP_SD).sum(1) + log_likelihood(x).sum(1)

    def gradient(x: Batch) -> Batch:
        start = before(x)
        pull = (x - start - STEP * drift(start)) / STEP
        back = pull[:, 1:] * (1 + STEP * _drift_slope(x[:, :-1]))
        by_path = torch.cat([back, torch.zeros_like(x[:, :1])], 1) - pull
        return by_path.index_add(1, SEEN, (observed - x[:, SEEN]) / NOISE**2)

    def simulate(x: Batch, generator: torch.Generator) -> Float[Tensor, "n 20"]:
        return x[:, SEEN] + NOISE * randn(len(x), len(SEEN), generator=generator)

    return Density(
        "conditioned-diffusion",
        STEPS,
        log_prob,
        lambda x: {"x": x},
        gradient,
        Predictive(observed, simulate, log_likelihood, simulate_path, conditioned_diffusion_density),
        ("prior: dx = 10 x (1 - x^2) / (1 + x^2) dt + dW from 0, 100 Euler steps on [0, 1]",),
    )

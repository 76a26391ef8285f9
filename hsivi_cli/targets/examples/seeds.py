"""Seeds: germination on 21 plates, random-effects logistic regression (Crowder 1978; the BUGS example).

`tau ~ Gamma(0.01, rate 0.01)`, `a0, a1, a2, a12 ~ N(0, 10)`, `b_i ~ N(0, 1 / sqrt(tau))`,
`r_i ~ Binomial(n_i, sigmoid(a0 + a1 x1 + a2 x2 + a12 x1 x2 + b_i))`, binomial coefficients kept.
Unconstrained order: a0, a1, a12, a2, b_1..b_21, log tau.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from hsivi_cli.targets.density import Batch, Density, Predictive
from hsivi_cli.targets.examples.common import LOG_2PI, normal_log_density

# fmt: off
GERMINATED = torch.tensor(
    [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3], dtype=torch.float64)
SEEDS = torch.tensor(
    [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7], dtype=torch.float64)
X1 = torch.tensor([0] * 11 + [1] * 10, dtype=torch.float64)
X2 = torch.tensor([0] * 5 + [1] * 6 + [0] * 5 + [1] * 5, dtype=torch.float64)
# fmt: on
DESIGN = torch.stack([torch.ones_like(X1), X1, X1 * X2, X2], 1)  # a0, a1, a12, a2
PLATES = len(SEEDS)
WEIGHT_SD, CONCENTRATION, RATE = 10.0, 0.01, 0.01


def example() -> Density:
    """The published 21 plates."""
    return seeds_density(GERMINATED)


def seeds_density(r: Float[Tensor, " 21"]) -> Density:
    """The model given `r` germinated seeds a plate. No prior draws: Gamma(0.01) spans hundreds of decades."""
    coefficient = torch.lgamma(SEEDS + 1) - torch.lgamma(r + 1) - torch.lgamma(SEEDS - r + 1)
    log_gamma_normaliser = CONCENTRATION * math.log(RATE) - math.lgamma(CONCENTRATION)

    def logits(z: Batch) -> Float[Tensor, "n 21"]:
        return z[:, :4] @ DESIGN.T + z[:, 4:25]

    def constrain(z: Batch) -> dict[str, Tensor]:
        names = {name: z[:, i] for i, name in enumerate(("a0", "a1", "a12", "a2"))}
        return names | {"b": z[:, 4:25], "tau": torch.exp(z[:, 25])}

    def log_likelihood(z: Batch) -> Float[Tensor, "n 21"]:
        logit = logits(z)
        return coefficient + r * logit - SEEDS * softplus(logit, threshold=40)

    def log_prob(z: Batch) -> Float[Tensor, " n"]:
        weights, b, log_tau = z[:, :4], z[:, 4:25], z[:, 25]
        tau = torch.exp(log_tau)
        effects = 0.5 * PLATES * (log_tau - LOG_2PI) - 0.5 * tau * b.square().sum(1)
        # Gamma density of tau and the Jacobian of its logarithm
        precision = log_gamma_normaliser + CONCENTRATION * log_tau - RATE * tau
        return log_likelihood(z).sum(1) + normal_log_density(weights, 0.0, WEIGHT_SD).sum(1) + effects + precision

    def gradient(z: Batch) -> Batch:
        weights, b, tau = z[:, :4], z[:, 4:25], torch.exp(z[:, 25:])
        miss = r - SEEDS * torch.sigmoid(logits(z))
        by_log_tau = 0.5 * PLATES + CONCENTRATION - tau * (RATE + 0.5 * b.square().sum(1, keepdim=True))
        return torch.cat([miss @ DESIGN - weights / WEIGHT_SD**2, miss - tau * b, by_log_tau], 1)

    def simulate(z: Batch, generator: torch.Generator) -> Float[Tensor, "n 21"]:
        probability = torch.sigmoid(logits(z))
        return torch.binomial(SEEDS.expand_as(probability).contiguous(), probability, generator=generator)

    return Density(
        "seeds",
        26,
        log_prob,
        constrain,
        gradient,
        Predictive(r, simulate, log_likelihood, None, seeds_density),
        ("prior: a ~ normal(0, 10), tau ~ gamma(0.01, 0.01), b ~ normal(0, 1 / sqrt(tau))",),
    )

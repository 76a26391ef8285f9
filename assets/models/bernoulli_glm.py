"""A neuron's filter: spikes in 100 time bins, driven by the last nine values of white noise, through a sigmoid.

    hsivi fit-posterior bernoulli_glm.csv --model bernoulli_glm.py --method smc-wake --amortize

Each row of the data is one recording, `bin1` to `bin100` with 1 for a spike; each gets
its posterior. All recordings have the same stimulus, drawn once from a seed. The prior wants a smooth filter: its
second differences are standard normal (Lueckmann et al. 2021, who give sums of stimulus times spikes instead).
"""

import math

import torch
from torch.distributions import Bernoulli, Normal

from hsivi_cli import Model, Parameter

BINS, LAGS = 100, 9


def model(data):
    observed = torch.tensor(data.iloc[0].to_numpy(), dtype=torch.float64)
    stimulus = torch.randn(BINS + LAGS - 1, generator=torch.Generator().manual_seed(42), dtype=torch.float64)
    lagged = stimulus.unfold(0, LAGS, 1).flip(1)  # row t: the value at t, at t - 1, ...
    differences = torch.diag(1 + torch.sqrt(torch.arange(LAGS, dtype=torch.float64) / LAGS))
    differences += torch.diag(torch.full((LAGS - 1,), -2.0), -1) + torch.diag(torch.ones(LAGS - 2), -2)
    log_det = torch.log(torch.diagonal(differences)).sum()
    offset = Normal(0, math.sqrt(2))

    def spikes(p):
        return Bernoulli(logits=p.offset + lagged @ p.filter)

    def sample_prior(generator):
        noise = torch.randn(LAGS, 1)
        return {
            "offset": offset.sample(),
            "filter": torch.linalg.solve_triangular(differences, noise, upper=False)[:, 0],
        }

    return Model(
        parameters=[Parameter("offset"), Parameter("filter", (LAGS,))],
        log_prior=lambda p: offset.log_prob(p.offset) + Normal(0, 1).log_prob(differences @ p.filter).sum() + log_det,
        log_likelihood=lambda p, y: spikes(p).log_prob(y),
        simulate=lambda p, generator: spikes(p).sample(),
        sample_prior=sample_prior,
        observed=observed,
    )

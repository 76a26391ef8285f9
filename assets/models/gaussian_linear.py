"""A Gaussian mean with a Gaussian prior, in ten dimensions: the posterior is known, N(x / 2, 0.05 I).

    hsivi fit-posterior gaussian_linear.csv --model gaussian_linear.py --method smc-wake --amortize

Each row of the data is one observation, `x1` to `x10`; each gets its posterior. Prior and noise both
have variance 0.1, as in the benchmark of Lueckmann et al. (2021).
"""

import math

import torch
from torch.distributions import Normal

from hsivi_cli import Model, Parameter

SD = math.sqrt(0.1)


def model(data):
    observed = torch.tensor(data.iloc[0].to_numpy(), dtype=torch.float64)
    size = len(observed)

    return Model(
        parameters=[Parameter("theta", (size,))],
        log_prior=lambda p: Normal(0, SD).log_prob(p.theta).sum(),
        log_likelihood=lambda p, y: Normal(p.theta, SD).log_prob(y),
        simulate=lambda p, generator: Normal(p.theta, SD).sample(),
        sample_prior=lambda generator: {"theta": Normal(0, SD).sample((size,))},
        observed=observed,
    )

"""Autoregression of order K: each value of a series on the K before it (posteriordb's arK, with K = 5).

    hsivi fit-posterior ark.csv --model ark.py

The data are a column `y` in order of time. From a JSON file they may say `K` too: {"K": 5, "y": [...]}.
The first K values are taken as given, the likelihood is of the others.
"""

import torch
from torch.distributions import HalfCauchy, Normal

from hsivi_cli import Model, Parameter


def model(data):
    K = int(data.get("K", 5))
    series = torch.tensor(data["y"], dtype=torch.float64)
    past = series.unfold(0, K, 1)[:-1].flip(1)  # row t: y[t-1], ..., y[t-K]

    def log_prior(p):
        weights = Normal(0, 10).log_prob(p.alpha) + Normal(0, 10).log_prob(p.beta).sum()
        return weights + HalfCauchy(2.5).log_prob(p.sigma)

    def log_likelihood(p, y):
        return Normal(p.alpha + past @ p.beta, p.sigma).log_prob(y)

    def simulate(p, generator):  # one step ahead, as the likelihood has it
        return Normal(p.alpha + past @ p.beta, p.sigma).sample()

    return Model(
        parameters=[Parameter("alpha"), Parameter("beta", (K,)), Parameter("sigma", support="positive")],
        log_prior=log_prior,
        log_likelihood=log_likelihood,
        simulate=simulate,
        observed=series[K:],
    )

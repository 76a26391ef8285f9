"""Groups that share a mean: eight of them with five measurements each, all scales unknown.

    hsivi fit-posterior hierarchical_gaussian.csv --model hierarchical_gaussian.py --method smc-wake --amortize

Each row of the data is one data set, `g1_1` (first measurement of the first group) to `g8_5`; each
gets its posterior. The groups' means are theta = mu + tau t, with t standard normal (non-centred).
"""

import torch
from torch.distributions import LogNormal, Normal

from hsivi_cli import Model, Parameter

GROUPS = 8


def model(data):
    observed = torch.tensor(data.iloc[0].to_numpy(), dtype=torch.float64)
    each = len(observed) // GROUPS
    priors = {"mu": Normal(0, 2), "tau": LogNormal(0, 0.5), "sigma": LogNormal(0, 0.5)}

    def measurements(p):
        theta = p.mu + p.tau * p.t
        return Normal(theta.repeat_interleave(each), p.sigma)

    return Model(
        parameters=[
            Parameter("mu"),
            Parameter("tau", support="positive"),
            Parameter("sigma", support="positive"),
            Parameter("t", (GROUPS,)),
        ],
        log_prior=lambda p: (
            sum(prior.log_prob(p[name]) for name, prior in priors.items()) + Normal(0, 1).log_prob(p.t).sum()
        ),
        log_likelihood=lambda p, y: measurements(p).log_prob(y),
        generated=lambda p: {"theta": p.mu + p.tau * p.t},
        simulate=lambda p, generator: measurements(p).sample(),
        sample_prior=lambda generator: (
            {name: prior.sample() for name, prior in priors.items()} | {"t": Normal(0, 1).sample((GROUPS,))}
        ),
        observed=observed,
    )

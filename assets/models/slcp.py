"""Simple likelihood, complex posterior (Papamakarios et al. 2019): four points of a Gaussian, its scales squared.

    hsivi fit-posterior slcp.csv --model slcp.py --method smc-wake --amortize

Each row of the data is one observation, four points of the plane (`x1`, `y1`, ..., `y4`); each
gets its posterior. theta1 and theta2 are their mean, theta3^2 and theta4^2 their standard deviations, tanh(theta5)
their correlation: two signs are lost, so there are four modes, and the box cuts them off.
"""

import torch
from torch.distributions import MultivariateNormal, Uniform

from hsivi_cli import Model, Parameter

JITTER = 1e-6  # of the benchmark of Lueckmann et al. (2021): theta3 = 0 has a density, too


def model(data):
    observed = torch.tensor(data.iloc[0].to_numpy(), dtype=torch.float64)
    prior = Uniform(-3.0, 3.0)

    def point(p):
        s1, s2, correlation = p.theta[2] ** 2, p.theta[3] ** 2, torch.tanh(p.theta[4])
        first = torch.sqrt(s1**2 + JITTER)
        below = correlation * s1 * s2 / first
        second = torch.sqrt(s2**2 + JITTER - below**2)
        rows = [torch.stack([first, torch.zeros_like(first)]), torch.stack([below, second])]
        return MultivariateNormal(p.theta[:2], scale_tril=torch.stack(rows))

    return Model(
        parameters=[Parameter("theta", (5,), "interval(-3,3)")],
        log_prior=lambda p: prior.log_prob(p.theta).sum(),
        log_likelihood=lambda p, y: point(p).log_prob(y.reshape(4, 2)).sum(),
        simulate=lambda p, generator: (p.theta[:2] + torch.randn(4, 2) @ point(p).scale_tril.T).reshape(-1),
        sample_prior=lambda generator: {"theta": prior.sample((5,))},
        observed=observed,
    )

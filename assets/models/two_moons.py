"""Two moons: a posterior of two crescents, the first test of simulation-based inference (Greenberg et al. 2019).

    hsivi fit-posterior two_moons.csv --model two_moons.py --method smc-wake --amortize

Each row of the data is one observation (`x1`, `x2`): a point on a half circle of radius about 0.1, shifted by
-|theta1 + theta2| / sqrt 2 and (theta2 - theta1) / sqrt 2, so that its sign is lost. Each row
gets its posterior. The likelihood is exact: a point at distance rho from the centre of the half circle has the density
of rho spread over half of a circumference, pi rho.
"""

import math

import torch
from torch.distributions import Normal, Uniform

from hsivi_cli import Model, Parameter

ROOT = math.sqrt(2)


def model(data):
    observed = torch.tensor(data[["x1", "x2"]].iloc[0].to_numpy(), dtype=torch.float64)
    prior, radius, angle = Uniform(-1.0, 1.0), Normal(0.1, 0.01), Uniform(-math.pi / 2, math.pi / 2)

    def centre(p):
        return torch.stack([0.25 - (p.theta[0] + p.theta[1]).abs() / ROOT, (p.theta[1] - p.theta[0]) / ROOT])

    def log_likelihood(p, y):
        u, v = y - centre(p)
        rho = torch.sqrt(torch.where(u > 0, u, 1.0) ** 2 + v**2)  # 1 keeps the gradient finite where it is not used
        return torch.where(u > 0, radius.log_prob(rho) - torch.log(math.pi * rho), -torch.inf)

    def simulate(p, generator):
        r, a = radius.sample(), angle.sample()
        return centre(p) + torch.stack([r * torch.cos(a), r * torch.sin(a)])

    return Model(
        parameters=[Parameter("theta", (2,), "interval(-1,1)")],
        log_prior=lambda p: prior.log_prob(p.theta).sum(),
        log_likelihood=log_likelihood,
        simulate=simulate,
        sample_prior=lambda generator: {"theta": prior.sample((2,))},
        observed=observed,
    )

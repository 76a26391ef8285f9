"""Gaussian process regression: a smooth curve through noisy points, its scales unknown.

    hsivi fit-posterior gp_regression.csv --model gp_regression.py

The data have columns `x` and `y`. The curve itself is integrated out: the unknowns are how far it wanders
(`amplitude`), how fast (`lengthscale`) and the noise around it (`noise`). `curve` is its mean at a few points.
"""

import torch
from torch.distributions import HalfNormal, LogNormal, MultivariateNormal

from hsivi_cli import Model, Parameter


def model(data):
    x = torch.tensor(data["x"], dtype=torch.float64)
    y = torch.tensor(data["y"], dtype=torch.float64)
    shown = torch.linspace(x.min(), x.max(), 5)
    priors = {"amplitude": HalfNormal(2), "lengthscale": LogNormal(0, 1), "noise": HalfNormal(1)}

    def kernel(p, a, b):
        return p.amplitude**2 * torch.exp(-0.5 * ((a[:, None] - b) / p.lengthscale) ** 2)

    def response(p):
        jitter = 1e-8 * (1 + p.amplitude**2)  # keeps the Cholesky factor real for long lengthscales
        covariance = kernel(p, x, x) + (p.noise**2 + jitter) * torch.eye(len(x))
        return MultivariateNormal(torch.zeros(len(x)), scale_tril=torch.linalg.cholesky(covariance))

    def generated(p):
        weights = torch.cholesky_solve(y[:, None], response(p).scale_tril)[:, 0]
        return {"curve": kernel(p, shown, x) @ weights}

    return Model(
        parameters=[Parameter(name, support="positive") for name in priors],
        log_prior=lambda p: sum(prior.log_prob(p[name]) for name, prior in priors.items()),
        log_likelihood=lambda p, y: response(p).log_prob(y),  # a scalar: the points are not independent
        generated=generated,
        simulate=lambda p, generator: response(p).sample(),
        sample_prior=lambda generator: {name: prior.sample() for name, prior in priors.items()},
        observed=y,
    )

"""Eight schools (Rubin 1981; Gelman et al. 2014, section 5.5), non-centred, as posteriordb states it.

`mu ~ N(0, 5)`, `tau ~ half-Cauchy(5)`, `theta_j = mu + tau t_j`, `t_j ~ N(0, 1)`, `y_j ~ N(theta_j, sigma_j)`.
Unconstrained order: t_1..t_J, mu, log tau. Given tau everything is Gaussian, so the evidence and exact draws come from
one quadrature over log tau.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.density import Batch, Density, Predictive
from hsivi_cli.targets.examples.common import LOG_2PI, normal_log_density, numeric_column, rand, randn

EFFECT = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
STANDARD_ERROR = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
MU_SD, TAU_SCALE = 5.0, 5.0


def example(data: Mapping[str, Any] | None = None) -> Density:
    """The published eight schools, or the columns `y` and `sigma` of a table."""
    if data is None:
        return eight_schools_density(EFFECT, STANDARD_ERROR)
    y = numeric_column(data, "y", "the example eight-schools")
    sigma = numeric_column(data, "sigma", "the example eight-schools")
    if not bool((sigma > 0).all()):
        raise InputError("column 'sigma' holds a value that is not positive: it is the standard error of y")
    return eight_schools_density(y, sigma)


def eight_schools_density(y: Float[Tensor, " J"], sigma: Float[Tensor, " J"]) -> Density:
    """The hierarchy for effects `y` with known standard errors `sigma`; log Z and exact draws included."""
    schools = len(y)

    def split(z: Batch) -> tuple[Float[Tensor, "n J"], Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        return z[:, :schools], z[:, schools : schools + 1], torch.exp(z[:, schools + 1 :])

    def constrain(z: Batch) -> dict[str, Tensor]:
        t, mu, tau = split(z)
        return {"theta": mu + tau * t, "mu": mu[:, 0], "tau": tau[:, 0]}

    def log_likelihood(z: Batch) -> Float[Tensor, "n J"]:
        t, mu, tau = split(z)
        return normal_log_density(y, mu + tau * t, sigma)

    def log_prob(z: Batch) -> Float[Tensor, " n"]:
        t, mu, tau = split(z)
        log_tau = z[:, schools + 1]
        hierarchy = normal_log_density(t, 0.0, 1.0).sum(1) + normal_log_density(mu, 0.0, MU_SD)[:, 0]
        return log_likelihood(z).sum(1) + hierarchy + _log_half_cauchy(tau[:, 0]) + log_tau

    def gradient(z: Batch) -> Batch:
        t, mu, tau = split(z)
        pull = (y - mu - tau * t) / sigma**2
        by_mu = pull.sum(1, keepdim=True) - mu / MU_SD**2
        by_log_tau = (tau * t * pull).sum(1, keepdim=True) + 1 - 2 * tau**2 / (TAU_SCALE**2 + tau**2)
        return torch.cat([tau * pull - t, by_mu, by_log_tau], 1)

    def simulate(z: Batch, generator: torch.Generator) -> Float[Tensor, "n J"]:
        return constrain(z)["theta"] + sigma * randn(len(z), schools, generator=generator)

    def prior(n: int, generator: torch.Generator) -> Batch:
        tau = TAU_SCALE * torch.tan(0.5 * math.pi * rand(n, 1, generator=generator).clamp(1e-15, 1 - 1e-15))
        t, mu = randn(n, schools, generator=generator), MU_SD * randn(n, 1, generator=generator)
        return torch.cat([t, mu, torch.log(tau)], 1)

    log_z, exact_draws = _exact(y, sigma)
    return Density(
        "eight-schools",
        schools + 2,
        log_prob,
        constrain,
        gradient,
        Predictive(y, simulate, log_likelihood, prior, lambda response: eight_schools_density(response, sigma)),
        ("prior: mu ~ normal(0, 5), tau ~ half_cauchy(5), theta ~ normal(mu, tau)",),
        log_z,
        exact_draws,
    )


def _log_half_cauchy(tau: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return math.log(2 / (math.pi * TAU_SCALE)) - torch.log1p((tau / TAU_SCALE) ** 2)


def _exact(y: Float[Tensor, " J"], sigma: Float[Tensor, " J"]) -> tuple[float, Any]:
    """Log evidence, and a sampler of exact draws; the trapezium rule is spectrally accurate on this smooth bump."""
    log_tau = torch.linspace(-30.0, 25.0, 5501, dtype=torch.float64)
    step = float(log_tau[1] - log_tau[0])
    variance = sigma**2 + torch.exp(2 * log_tau)[:, None]
    precision = 1 / MU_SD**2 + (1 / variance).sum(1)  # of mu given tau and y
    weighted = (y / variance).sum(1)
    log_marginal = -0.5 * (
        (torch.log(variance) + LOG_2PI + y**2 / variance).sum(1)
        + torch.log(MU_SD**2 * precision)
        - weighted**2 / precision
    )
    log_joint = log_marginal + _log_half_cauchy(torch.exp(log_tau)) + log_tau
    log_z = float(torch.logsumexp(log_joint, 0)) + math.log(step)
    weight = torch.softmax(log_joint, 0)

    def draw(n: int, generator: torch.Generator) -> Batch:
        cell = torch.multinomial(weight, n, replacement=True, generator=generator)
        # hat functions on the grid: the density's linear interpolation
        jitter = rand(n, generator=generator) - rand(n, generator=generator)
        chosen = log_tau[cell] + step * jitter
        mu = weighted[cell] / precision[cell] + randn(n, generator=generator) / precision[cell].sqrt()
        tau = torch.exp(chosen)[:, None]
        spread = 1 + (tau / sigma) ** 2  # precision of t
        t = tau * (y - mu[:, None]) / sigma**2 / spread + randn(n, len(y), generator=generator) / spread.sqrt()
        return torch.cat([t, mu[:, None], chosen[:, None]], 1)

    return log_z, draw

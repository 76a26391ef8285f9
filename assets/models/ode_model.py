"""An epidemic as a differential equation: influenza in an English boarding school of 763 boys, 1978.

    hsivi fit-posterior ode_model.csv --model ode_model.py

The data have the number of boys in bed (`cases`) on each `day`. Susceptible, infected and recovered shares follow
s' = -beta s i, i' = beta s i - gamma i, solved by the Runge-Kutta method of order 4 in logarithms (so that no share
turns negative); the counts are negative binomial around 763 i. Any ODE can be put in place of `slope`.
"""

import math

import torch
from torch.distributions import Exponential, LogNormal, NegativeBinomial

from hsivi_cli import Model, Parameter

BOYS = 763
STEPS_PER_DAY = 4


def model(data):
    cases = torch.tensor(data["cases"], dtype=torch.float64)
    priors = {"beta": LogNormal(math.log(2), 0.5), "gamma": LogNormal(math.log(0.5), 0.5), "phi_inv": Exponential(5)}

    def slope(state, p):  # of (log s, log i)
        s, i = torch.exp(state[0]), torch.exp(state[1])
        return torch.stack([-p.beta * i, p.beta * s - p.gamma])

    def infected(p):  # the expected number in bed on each day
        state = torch.tensor([math.log(1 - 1 / BOYS), math.log(1 / BOYS)])
        h, days = 1 / STEPS_PER_DAY, []
        for _ in range(len(cases)):
            for _ in range(STEPS_PER_DAY):
                k1 = slope(state, p)
                k2 = slope(state + h / 2 * k1, p)
                k3 = slope(state + h / 2 * k2, p)
                k4 = slope(state + h * k3, p)
                state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            days.append(state[1])
        return BOYS * torch.exp(torch.stack(days))

    def counts(p):
        phi_inv = p.phi_inv + 1e-8  # below that it is Poisson, and the log gammas of 1 / phi_inv lose their digits
        return NegativeBinomial(1 / phi_inv, logits=torch.log(infected(p) * phi_inv))

    return Model(
        parameters=[Parameter(name, support="positive") for name in priors],
        log_prior=lambda p: sum(prior.log_prob(p[name]) for name, prior in priors.items()),
        log_likelihood=lambda p, y: counts(p).log_prob(y),
        generated=lambda p: {"R0": p.beta / p.gamma, "recovery_days": 1 / p.gamma},
        simulate=lambda p, generator: counts(p).sample(),
        sample_prior=lambda generator: {name: prior.sample() for name, prior in priors.items()},
        observed=cases,
    )

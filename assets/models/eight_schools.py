"""Eight schools (Rubin 1981): what does coaching do for test scores, school by school?

    hsivi fit-posterior eight_schools.csv --model eight_schools.py

The data have an effect `y` and its standard error `sigma` for each school. The schools' true effects `theta` are drawn
around a common mean `mu` with spread `tau`; `t` are their standardised deviations, which are easier to sample
(non-centred). `--sbc` works too: the model knows its own prior, and its likelihood takes the response.
"""

import torch
from torch.distributions import HalfCauchy, Normal

from hsivi_cli import Model, Parameter


def model(data):
    y = torch.tensor(data["y"], dtype=torch.float64)
    sigma = torch.tensor(data["sigma"], dtype=torch.float64)
    schools = len(y)

    def log_prior(p):
        return Normal(0, 1).log_prob(p.t).sum() + Normal(0, 5).log_prob(p.mu) + HalfCauchy(5).log_prob(p.tau)

    def log_likelihood(p, y):  # one value per school
        return Normal(p.mu + p.tau * p.t, sigma).log_prob(y)

    def generated(p):
        return {"theta": p.mu + p.tau * p.t}

    def simulate(p, generator):
        return Normal(p.mu + p.tau * p.t, sigma).sample()

    def sample_prior(generator):
        return {"t": Normal(0, 1).sample((schools,)), "mu": Normal(0, 5).sample(), "tau": HalfCauchy(5).sample()}

    return Model(
        parameters=[Parameter("t", (schools,)), Parameter("mu"), Parameter("tau", support="positive")],
        log_prior=log_prior,
        log_likelihood=log_likelihood,
        generated=generated,
        simulate=simulate,
        sample_prior=sample_prior,
        observed=y,
    )

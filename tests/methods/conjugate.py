"""z ~ N(0, I) in two dimensions, x | z ~ N(z, 0.5^2): the posterior is N(0.8 x, 0.2), the evidence that of N(0, 1.25).

Of one observation as a density, of many as an amortised target; for the tests of SMC, SMC-Wake and their kin.
"""

import math
from dataclasses import replace

import torch

from hsivi_cli.targets.amortised import AmortisedTarget
from hsivi_cli.targets.density import Density, Parts

NORMAL = torch.distributions.Normal
X = torch.tensor([1.0, -0.5], dtype=torch.float64)
SD, LOG_Z = 1 / math.sqrt(5), float(NORMAL(0.0, math.sqrt(1.25)).log_prob(X).sum())


def sample_prior(n, generator):
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def log_prior(z):
    return NORMAL(0.0, 1.0).log_prob(z).sum(-1)


def conjugate(impossible_below=-math.inf):
    """The posterior of `X`; where the first coordinate is not above `impossible_below`, the likelihood is zero."""

    def likelihood(z):
        return torch.where(z[:, 0] > impossible_below, NORMAL(z, 0.5).log_prob(X).sum(1), -math.inf)

    parts = Parts(sample_prior, log_prior, likelihood)
    return Density("conjugate", 2, lambda z: log_prior(z) + likelihood(z), parts=parts)


def conjugate_target(observed, **changed):
    """The posteriors of `observed` (B, 2), with a simulator; `changed` fields take the place of the right ones."""

    def likelihood(z, x):
        return NORMAL(z, 0.5).log_prob(x[:, None]).sum(-1)

    def simulate(z, generator):
        return z + 0.5 * torch.randn(z.shape, generator=generator, dtype=torch.float64)

    target = AmortisedTarget(
        "conjugate",
        2,
        observed,
        log_prior,
        likelihood,
        lambda z: {"z": z},
        sample_prior,
        simulate,
        ("z[1]", "z[2]"),
    )
    return replace(target, **changed)

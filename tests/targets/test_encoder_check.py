"""The exact posterior of a linear Gaussian passes; a narrow one, a shifted one and the prior do not."""

import math

import pytest
import torch
from torch.distributions import Normal

from hsivi_cli import Model, Parameter
from hsivi_cli.networks.posterior_encoder import EncoderConfig, build_encoder
from hsivi_cli.targets.amortised import amortise
from hsivi_cli.targets.encoder_check import check_encoder

REPLICATIONS, DRAWS = 200, 99


def target():
    """theta ~ N(0, I), y ~ N(theta, I): the posterior is N(y / 2, I / 2)."""
    model = Model(
        parameters=[Parameter("theta", (2,))],
        log_prior=lambda p: Normal(0, 1).log_prob(p.theta).sum(),
        log_likelihood=lambda p, y: Normal(p.theta, 1).log_prob(y),
        simulate=lambda p, generator: Normal(p.theta, 1).sample(),
        sample_prior=lambda generator: {"theta": Normal(0, 1).sample((2,))},
        observed=torch.zeros(2),
    )
    return amortise(model)


def checked(scale=1.0, shift=0.0, ignore=False):
    def law(x):
        return Normal(0 * x, 1) if ignore else Normal(x / 2 + shift, scale * math.sqrt(0.5))

    def draw(n, generator, x):
        return law(x[:, None]).mean + law(x[:, None]).stddev * torch.randn(len(x), n, 2, generator=generator)

    def log_q(z, x):
        return law(x[:, None]).log_prob(z).sum(2)

    return check_encoder(target(), draw, log_q, REPLICATIONS, DRAWS, torch.Generator().manual_seed(0))


def test_the_exact_posterior_passes():
    found = checked()
    assert found.sbc.passed
    assert found.coverage.inside
    assert found.lost == 0
    assert found.sbc.columns == ("theta[1]", "theta[2]", "log_likelihood", "(density)", "(joint)")


@pytest.mark.parametrize(
    ("options", "column"),
    [
        ({"scale": 0.5}, "(density)"),
        ({"scale": 2.0}, "theta[1]"),
        ({"shift": 0.5}, "theta[2]"),
        ({"ignore": True}, "log_likelihood"),
    ],
)
def test_wrong_posteriors_fail(options, column):
    assert column in checked(**options).sbc.failing


def test_an_untrained_encoder_is_found_out():
    encoder = build_encoder(EncoderConfig("mixture", hidden=(8,)), 2, (2,), seed=0)
    found = check_encoder(target(), encoder.draw, encoder.log_prob, 100, DRAWS, torch.Generator().manual_seed(0))
    assert not found.sbc.passed

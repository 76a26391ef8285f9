"""Digits under a linear decoder: no encoder may pass the maximum likelihood of PPCA, and linear ones get there.

Tipping & Bishop 1999: the maximum is known from the eigenvalues of the covariance, and at it the posterior of z is
axis-aligned, so that a diagonal Gaussian with a linear mean is exact. Figures are nats an image.
"""

import pytest
import torch
from linear_latent import maximise
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from hsivi_cli.networks.random_function import FunctionPrior, RandomEncoder
from hsivi_cli.objectives.gpvae_bound import expected_linear_log_likelihood, expected_prior_kl, information


def digits():
    images = load_digits()
    train, test = train_test_split(images.data / 16, test_size=360, random_state=0, stratify=images.target)
    return torch.from_numpy(train), torch.from_numpy(test)


def best_log_likelihood(train, test, latent):
    centred = train - train.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(train))
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[latent:].mean()
    covariance = (vectors[:, :latent] * (values[:latent] - noise)) @ vectors[:, :latent].T + noise * torch.eye(64)
    log_prob = torch.distributions.MultivariateNormal(train.mean(0), covariance).log_prob
    return float(log_prob(train).mean()), float(log_prob(test).mean()), float(noise)


@pytest.mark.parametrize(
    ("latent", "train_value", "test_value", "noise"), [(2, 0.090, -0.437, 0.0540), (5, 8.964, 8.505, 0.0361)]
)
def test_linear_encoders_reach_ppca_and_never_pass_it(latent, train_value, test_value, noise):
    train, test = digits()
    best = best_log_likelihood(train, test, latent)
    assert best == pytest.approx((train_value, test_value, noise), abs=1e-3)
    for covariance in ("none", "diagonal")[: 2 if latent == 2 else 1]:  # the random one is slow to converge
        generator = torch.Generator().manual_seed(0)
        head = FunctionPrior(covariance, tau=1.0)
        encoder = RandomEncoder(nn.Identity(), 64, latent, head, FunctionPrior("none"), generator, "none").double()
        weight = nn.Parameter(0.3 * torch.randn(64, latent, generator=generator, dtype=torch.float64))
        offset, log_sd = nn.Parameter(train.mean(0)), nn.Parameter(torch.tensor(-1.0).double())

        def bound(encoder=encoder, weight=weight, offset=offset, log_sd=log_sd):
            at = encoder(train)
            given = expected_linear_log_likelihood(train, weight, offset, log_sd.exp(), at)
            return (given - expected_prior_kl(at)).mean() - encoder.weight_kl() / len(train)

        parameters = [weight, offset, log_sd, *(p for p in encoder.parameters() if p.requires_grad)]
        reached = maximise(bound, parameters, steps=150)
        with torch.no_grad():
            at = encoder(train)
            given = expected_linear_log_likelihood(train, weight, offset, log_sd.exp(), at) - expected_prior_kl(at)
            elbo = float((given + information(at)).mean())  # of the marginal that draws come from, (10)
        assert reached <= float(given.mean()) + 1e-9
        assert reached < best[0] + 1e-6
        assert best[0] - 0.05 < elbo < best[0] + 1e-3

"""The closed forms of GPVAE's bound against Monte Carlo, and the identity that says what the random function costs."""

import math

import pytest
import torch

from hsivi_cli.objectives.gpvae_bound import (
    Moments,
    draw_latent,
    expected_entropy,
    expected_linear_log_likelihood,
    expected_prior_kl,
    expected_prior_kl_log_variance,
    expected_variance,
    information,
    loss_per_row,
    weights_kl,
)

NORMAL = torch.distributions.Normal
DRAWS = 1_000_000


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


AT = Moments(vector(0.4, -1.1), vector(-0.8, 0.2), vector(0.07, 0.3), vector(0.15, 0.02))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def functions(at, seed=0, draws=DRAWS):
    e = noise(2, draws, len(at.mean), seed=seed)
    return at.mean + at.v.sqrt() * e[0], at.log_sd + at.s.sqrt() * e[1]


def within_noise(draws, expected, errors=4.0):
    error = draws.std(0) / math.sqrt(len(draws))
    return bool(((draws.mean(0) - expected).abs() < errors * error).all())


def test_the_example_of_the_note():
    at = Moments(vector(0.4), vector(-0.8), vector(0.07), vector(0.15))
    assert float(expected_prior_kl(at)) == pytest.approx(0.551266, abs=1e-6)
    other = expected_prior_kl_log_variance(vector(0.4), vector(0.07), vector(-0.8), vector(0.15))
    assert float(other) == pytest.approx(0.257162, abs=1e-6)


def test_prior_kl_is_the_mean_over_functions():
    f, g = functions(AT)
    kl = 0.5 * (f**2 + (2 * g).exp() - 1 - 2 * g).sum(-1)
    assert within_noise(kl, expected_prior_kl(AT))
    assert float(kl.mean()) == pytest.approx(float(expected_prior_kl(AT)), rel=2e-3)
    # a log variance instead of a log deviation is another function, and neither passes for the other
    half = 0.5 * (f**2 + g.exp() - 1 - g).sum(-1)
    assert within_noise(half, expected_prior_kl_log_variance(AT.mean, AT.v, AT.log_sd, AT.s))
    assert not within_noise(kl, expected_prior_kl_log_variance(AT.mean, AT.v, 2 * AT.log_sd, AT.s))
    # the plug-in e^{2 g} would be below the truth: the bound could pass log p
    plug_in = Moments(AT.mean, AT.log_sd, AT.v, torch.zeros(2))
    assert expected_prior_kl(plug_in) < expected_prior_kl(AT)
    assert torch.equal(expected_variance(plug_in), (2 * AT.log_sd).exp())


def test_entropy_and_a_normal_prior_give_the_prior_kl_again():
    z = draw_latent(AT, noise(3, DRAWS, 2))
    draws = -expected_entropy(AT) - NORMAL(0.0, 1.0).log_prob(z).sum(-1)
    assert within_noise(draws, expected_prior_kl(AT))


def test_local_reparameterisation_has_the_moments_of_the_marginal():
    z = draw_latent(AT, noise(3, DRAWS, 2))
    assert within_noise(z, AT.mean)
    assert within_noise((z - AT.mean) ** 2, AT.v + expected_variance(AT))
    certain = Moments(AT.mean, AT.log_sd, torch.zeros(2).double(), torch.zeros(2).double())
    assert torch.equal(draw_latent(certain, noise(3, 5, 2)), AT.mean + AT.log_sd.exp() * noise(3, 5, 2)[2])


def test_a_variance_of_zero_has_a_gradient_of_zero():
    v = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    draw_latent(Moments(AT.mean, AT.log_sd, v, v), noise(3, 4, 2)).sum().backward()
    assert torch.equal(v.grad, torch.zeros(2).double())


@pytest.mark.parametrize("sd", [0.7, vector(0.5, 0.9, 1.3)], ids=["shared", "a column each"])
def test_linear_decoder_in_closed_form(sd):
    weight, offset, x = noise(3, 2, seed=1), noise(3, seed=2), noise(3, seed=3)
    f, g = functions(AT)
    z = f + g.exp() * noise(DRAWS, 2, seed=5)
    draws = NORMAL(z @ weight.T + offset, sd).log_prob(x).sum(-1)
    exact = expected_linear_log_likelihood(x, weight, offset, sd, AT)
    assert within_noise(draws, exact)
    assert float(draws.mean()) == pytest.approx(float(exact), rel=5e-3)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_weights_kl_is_that_of_torch(covariance):
    d, p, tau = 3, 4, torch.tensor(0.6, dtype=torch.float64)
    mean, root = noise(d, p, seed=1), 0.2 * noise(d, p, p, seed=2)
    scales = root @ root.mT + 0.1 * torch.eye(p)
    if covariance == "diagonal":
        scales = torch.diag_embed(scales.diagonal(dim1=1, dim2=2))
    q = torch.distributions.MultivariateNormal(mean, scales)
    p_w = torch.distributions.MultivariateNormal(torch.zeros(p).double(), tau**2 * torch.eye(p).double())
    exact = torch.distributions.kl_divergence(q, p_w).sum()
    ours = weights_kl(mean, scales.diagonal(dim1=1, dim2=2).sum(-1), torch.logdet(scales), tau)
    assert float(ours) == pytest.approx(float(exact), rel=1e-12)
    assert float(weights_kl(torch.zeros(d, p), tau**2 * p * torch.ones(d), 2 * p * tau.log() * torch.ones(d), tau)) == (
        pytest.approx(0.0, abs=1e-6)
    )


def test_the_bound_pays_the_information_in_the_function():
    """ELBO of the marginal N(m, v + h^2) less E_f of the ELBO given f, for a decoder that is not linear."""
    at = Moments(AT.mean, AT.log_sd, AT.v, torch.zeros(2).double())
    weight, x = noise(4, 2, seed=7), vector(1.0, 0.0, 1.0, 1.0)
    f, g = functions(at)
    h = g.exp()
    z = f + h * noise(DRAWS, 2, seed=8)
    log_joint = NORMAL(0.0, 1.0).log_prob(z).sum(-1) + torch.distributions.Bernoulli(
        logits=torch.tanh(z) @ weight.T
    ).log_prob(x).sum(-1)
    marginal = NORMAL(at.mean, (at.v + h**2).sqrt()).log_prob(z).sum(-1)
    given_f = NORMAL(f, h).log_prob(z).sum(-1)
    gain = (log_joint - marginal) - (log_joint - given_f)  # the same z: its marginal is the inflated Gaussian
    assert within_noise(gain, information(at))
    covariance = torch.diag(at.v) @ torch.diag((-2 * at.log_sd).exp())
    assert float(information(at)) == pytest.approx(0.5 * float(torch.logdet(torch.eye(2) + covariance)), rel=1e-12)
    # the published sort of mistake: drawn with v, weighed without; it takes z's density for a narrower one
    mismatched = log_joint - NORMAL(at.mean, h).log_prob(z).sum(-1)
    assert not within_noise(mismatched, (log_joint - marginal).mean())


def test_a_minibatch_estimates_the_bound_of_all_rows_and_not_of_its_own():
    log_likelihood, prior_kl, weight_kl = noise(60, seed=1), noise(60, seed=2) ** 2, torch.tensor(7.0).double()
    bound = (log_likelihood - prior_kl).sum() - weight_kl
    batches = [
        loss_per_row(a, b, weight_kl, 60) for a, b in zip(log_likelihood.split(12), prior_kl.split(12), strict=True)
    ]
    assert float(torch.stack(batches).mean()) == pytest.approx(-float(bound) / 60, rel=1e-12)
    # the weight of the KL does not depend on the size of the minibatch
    assert float(loss_per_row(log_likelihood[:12], prior_kl[:12], weight_kl, 60) - batches[0]) == 0.0
    tempered = loss_per_row(log_likelihood, prior_kl, weight_kl, 60, kappa=0.0)
    assert float(tempered) == pytest.approx(float((prior_kl - log_likelihood).mean()), rel=1e-12)

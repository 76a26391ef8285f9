"""Random heads: their moments against draws of the weights, their KL against torch's, their limits, their routing."""

import math

import pytest
import torch
from torch import nn

from hsivi_cli.networks import random_function
from hsivi_cli.networks.random_function import (
    HIGHEST_LOG_SD,
    MOST_S,
    FeatureNorm,
    FunctionPrior,
    RandomEncoder,
    RandomHead,
)

FEATURES, OUTPUTS = 5, 3
KINDS = ("diagonal", "full", "shared")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken_head(covariance, mean_function=False, learn_tau=False, seed=0):
    head = RandomHead(FEATURES, OUTPUTS, FunctionPrior(covariance, 0.7, mean_function, learn_tau), generator(seed))
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name != "log_tau":
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator(seed + 1)))
    return head.double()


def covariances(head):
    factor = head.factor()
    return (factor @ factor.mT).expand(OUTPUTS, -1, -1).detach()


def features(n, seed=3):
    return torch.randn(n, FEATURES, generator=generator(seed), dtype=torch.float64)


def encoder(mean, log_sd, latent=2, normalise="layer", seed=0):
    trunk = nn.Sequential(nn.Linear(4, FEATURES), nn.Tanh())
    with torch.no_grad():
        for p in trunk.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(9)))
    return RandomEncoder(trunk, FEATURES, latent, mean, log_sd, generator(seed), normalise).double()


@pytest.mark.parametrize("mean_function", [True, False])
@pytest.mark.parametrize("covariance", KINDS)
def test_moments_are_those_of_drawn_weights(covariance, mean_function):
    head, psi = shaken_head(covariance, mean_function), features(4)
    mean, variance = head(psi)
    centre = torch.zeros(OUTPUTS, FEATURES).double() if head.mean is None else head.mean.detach()
    q = torch.distributions.MultivariateNormal(centre, covariances(head))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = q.sample((200_000,))
    f = torch.einsum("sjp,np->snj", weights, psi)
    if mean_function:
        f = f + head.linear(psi).detach()
    error = f.std(0) / math.sqrt(len(f))
    assert bool(((f.mean(0) - mean).abs() < 4 * error).all())
    assert torch.allclose(f.var(0), variance, rtol=0.02)


@pytest.mark.parametrize("covariance", KINDS)
@pytest.mark.parametrize("many", [1, 40, 10_000])
def test_variances_are_quadratic_forms_whatever_the_blocks_and_the_axes(covariance, many, monkeypatch):
    monkeypatch.setattr(random_function, "NUMBERS_AT_ONCE", many)
    head = shaken_head(covariance)
    for shape in ((), (0,), (7,), (2, 7)):
        psi = torch.randn(*shape, FEATURES, generator=generator(2), dtype=torch.float64)
        exact = torch.einsum("...p,jpq,...q->...j", psi, covariances(head), psi)
        assert torch.allclose(head(psi)[1], exact, rtol=1e-10)


@pytest.mark.parametrize("mean_function", [True, False])
@pytest.mark.parametrize("covariance", KINDS)
def test_kl_is_that_of_torch(covariance, mean_function):
    head = shaken_head(covariance, mean_function)
    centre = torch.zeros(OUTPUTS, FEATURES).double() if head.mean is None else head.mean
    q = torch.distributions.MultivariateNormal(centre, covariances(head))
    p = torch.distributions.MultivariateNormal(torch.zeros(FEATURES).double(), 0.49 * torch.eye(FEATURES).double())
    assert float(head.kl().detach()) == pytest.approx(
        float(torch.distributions.kl_divergence(q, p).sum().detach()), rel=1e-6
    )


def test_no_covariance_is_a_linear_head_and_a_vanishing_tau_comes_to_it():
    plain = shaken_head("none", seed=4)
    mean, variance = plain(features(4))
    assert torch.equal(mean, plain.linear(features(4)))
    assert not variance.any()
    assert float(plain.kl()) == 0.0
    assert plain.q_parameters() == []
    for covariance in KINDS:
        prior = FunctionPrior(covariance, tau=1e-6)
        one, other = (RandomHead(FEATURES, OUTPUTS, p, generator()) for p in (prior, FunctionPrior("none")))
        psi = features(4).float()
        assert torch.equal(one(psi)[0], other(psi)[0])
        assert float(one(psi)[1].max()) < 1e-10


def test_a_free_mean_pays_and_a_mean_function_does_not():
    paying, free = shaken_head("diagonal", False), shaken_head("diagonal", True)
    paying.kl().backward()
    free.kl().backward()
    assert torch.allclose(paying.mean.grad, paying.mean / 0.49, rtol=1e-6)
    assert free.linear.weight.grad is None
    assert paying.log_tau.grad is None
    learnt = shaken_head("diagonal", False, learn_tau=True)
    learnt.kl().backward()
    assert learnt.log_tau.grad is not None
    assert {id(p) for p in learnt.q_parameters()} == {id(learnt.log_sd), id(learnt.log_tau)}


def test_features_have_unit_size_whatever_the_trunk_does_with_its_scale():
    for kind in ("layer", "scale"):
        unit = FeatureNorm(400, kind, False)(torch.randn(50, 400, generator=generator()))
        assert torch.allclose(unit.norm(dim=1), torch.ones(50), atol=1e-3 if kind == "layer" else 0.15)
    norm = FeatureNorm(FEATURES, "layer", True)
    assert torch.allclose(norm(features(6)), norm(100 * features(6)), atol=1e-4)
    assert torch.equal(norm(features(6))[:, -1], torch.ones(6).double())
    # row by row: what the other rows are does not matter
    assert torch.equal(norm(features(6))[2:3], norm(features(6)[2:3]))


def test_without_functions_the_encoder_is_that_of_a_vae_with_the_same_weights():
    none = FunctionPrior("none")
    x = torch.randn(7, 4, generator=generator(1), dtype=torch.float64)
    plain, random = encoder(none, none), encoder(FunctionPrior("full"), FunctionPrior("diagonal"))
    one, other = plain(x), random(x)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.log_sd, other.log_sd)
    assert not one.v.any()
    assert not one.s.any()
    assert bool((other.v > 0).all())
    assert bool((other.s > 0).all())
    assert not plain.random
    assert random.random
    assert float(plain.weight_kl()) == 0.0
    assert float(random.weight_kl()) == pytest.approx(float(random.mean_head.kl() + random.log_sd_head.kl()))


def test_beyond_the_clamps_the_gradient_leads_back():
    made = encoder(FunctionPrior("none"), FunctionPrior("diagonal", tau=0.3))
    with torch.no_grad():
        made.log_sd_head.linear.bias.fill_(9.0)
        made.log_sd_head.log_sd.fill_(4.0)
    at = made(torch.randn(3, 4, generator=generator(1), dtype=torch.float64))
    assert float(at.log_sd.max()) == pytest.approx(HIGHEST_LOG_SD)
    assert float(at.s.max()) == pytest.approx(MOST_S)
    (at.log_sd.sum() + at.s.sum()).backward()
    assert bool((made.log_sd_head.linear.bias.grad > 0).all())
    assert bool((made.log_sd_head.log_sd.grad.abs() > 0).any())


def test_making_a_head_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    RandomHead(FEATURES, OUTPUTS, FunctionPrior("full"), generator())
    assert torch.equal(torch.get_rng_state(), before)

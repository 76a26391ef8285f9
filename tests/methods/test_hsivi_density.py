"""Estimates of a chain's log density: exact where it is linear, never too low in the mean, unbiased as weights."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from hsivi_cli.methods.hsivi_density import (
    PriorEstimate,
    ReverseEstimate,
    Walk,
    best_estimate,
    prior_estimate,
    random_walks,
    reverse_estimate,
)
from hsivi_cli.networks.conditional_gaussian import ConditionalGaussian

F64 = torch.float64


def chain(dim, layers, hidden, spread, seed=0, sigma=0.5, **kwargs):
    """Layers whose means are random and far from the identity; no hidden sizes: linear ones."""
    draws = torch.Generator().manual_seed(seed)
    made = [ConditionalGaussian(dim, dim, hidden, draws, sigma=sigma, **kwargs) for _ in range(layers)]
    for layer in made:
        layer.requires_grad_(False)
        layer.net.net[-1].weight.normal_(std=spread, generator=draws)
        layer.net.net[-1].bias.normal_(std=0.5, generator=draws)
    return made


def walks(layers, n, seed=9):
    return random_walks(layers, layers[0].dim, n, seed)


def linear_marginal(layers):
    dim = layers[0].dim
    mean, covariance = torch.zeros(dim, dtype=F64), torch.eye(dim, dtype=F64)
    for layer in reversed(layers):
        matrix = layer.net.net[0].weight[:dim] + layer.skip * torch.eye(dim, dtype=F64)
        mean = matrix @ mean + layer.net.net[0].bias[:dim]
        covariance = matrix @ covariance @ matrix.T + torch.diag((2 * layer.log_sigma).exp())
    return MultivariateNormal(mean, covariance)


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(values.numel()))


def test_backward_steps_give_a_linear_chain_in_many_dimensions_where_components_cannot():
    layers = chain(20, 3, (), spread=0.3)
    walk, exact = walks(layers, 1000), linear_marginal(layers)
    truth = exact.log_prob(walk.states[0])
    found = best_estimate(layers, 20, components=1024, paths=16, seed=0)
    assert isinstance(found, ReverseEstimate)
    assert "path" in found.note
    gap = found.log_prob(walk) - truth
    assert float(gap.abs().mean()) < 0.3
    mean, error = mean_and_error(gap)
    assert abs(mean) < 4 * error + 0.03  # 16 paths, and errors that draws share
    mean, error = mean_and_error(prior_estimate(layers, 20, 1024, 0).log_prob(walk) - truth)
    assert mean - 4 * error > 1.0


def test_components_are_chosen_where_the_way_back_parts():
    found = best_estimate(chain(2, 2, (8,), spread=2.0), 2, components=1024, paths=4, seed=0)
    assert isinstance(found, PriorEstimate)
    assert "J = 1024" in found.note


ESTIMATES = {
    "prior": lambda layers, seed: prior_estimate(layers, 2, 3, seed),
    "reverse": lambda layers, seed: reverse_estimate(layers, 2, 3, seed),
}


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("varying", [False, True])
def test_weights_are_unbiased_for_few_components(estimate, varying):
    # a chain with bends and much noise, and a target within that noise, have light weights; J = 3, many banks
    layers = chain(2, 2, (8,), spread=0.2, sigma=0.9, varying=varying)
    target = MultivariateNormal(walks(layers, 2000).states[0].mean(0), 0.3 * torch.eye(2, dtype=F64))
    means = []
    for seed in range(100):
        walk = walks(layers, 300, seed=1000 + seed)
        log_q = ESTIMATES[estimate](layers, seed).log_prob(walk)
        means.append((target.log_prob(walk.states[0]) - log_q).exp().mean())
    mean, error = mean_and_error(torch.stack(means))
    assert error < 0.07
    assert abs(mean - 1) < 4 * error


def test_paths_of_two_draws_share_no_noise():
    # the errors of a common bank of 15 paths would not average out over draws
    layers = chain(5, 2, (), spread=0.3)
    walk = random_walks(layers, 5, 2, 9)
    state = [row[:1].expand(400, -1) for row in walk.states]
    found = reverse_estimate(layers, 5, 8, 0)
    spins = torch.rand(400, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert float(found.log_prob(Walk(state, spins)).std()) > 1e-3
    assert float(found.log_prob(Walk(state, spins[:1].expand(400))).std()) < 1e-12


def test_the_own_component_is_one_of_j():
    assert len(prior_estimate(chain(2, 2, (8,), spread=1.0), 2, 16, 0).means) == 15

"""HSIVI-LB against closed forms of linear-Gaussian layers, HSIVI-SM against the Fisher divergence of Gaussians."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from hsivi_cli.objectives.hsivi_bound import fisher_minimax, log_mixture, pairwise_log_density, surrogate_bound

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_pairwise_densities_are_those_of_torch_also_far_from_the_origin():
    x, means, log_sigma = randn(2, 5, 3) + 1e4, randn(2, 7, 3, seed=1) + 1e4, randn(2, 3, seed=2) - 2
    found = pairwise_log_density(x, means, log_sigma)
    normal = Normal(means.unsqueeze(1), log_sigma.exp()[:, None, None])
    torch.testing.assert_close(found, normal.log_prob(x.unsqueeze(2)).sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("extra", [0, 2, 6])
def test_mixture_is_the_own_component_and_the_next_ones_and_its_gradient_is_autograds(extra):
    values = [randn(2, 4, 3), randn(2, 7, 3, seed=1), 0.3 * randn(2, 3, seed=2)]
    x, means, log_sigma = (value.clone().requires_grad_(True) for value in values)
    pairs = pairwise_log_density(x, means, log_sigma)
    columns = torch.tensor([[(i + j) % 7 for j in range(extra + 1)] for i in range(4)])
    plain = pairs.gather(-1, columns.expand(2, -1, -1)).logsumexp(-1) - math.log(extra + 1)
    found = log_mixture(x, means, log_sigma, extra)
    torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)
    weight = randn(2, 4, seed=3)
    expected = torch.autograd.grad((weight * plain).sum(), (x, means, log_sigma))
    gradients = torch.autograd.grad((weight * found).sum(), (x, means, log_sigma))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_more_components_than_chains_are_refused():
    with pytest.raises(ValueError, match="components"):
        log_mixture(randn(4, 2), randn(4, 2), torch.zeros(2, dtype=F64), 4)


# One linear-Gaussian layer: y ~ N(0, I), x = W y + b + sigma zeta, so that q(x) = N(b, W W' + diag sigma^2).
W = torch.tensor([[0.9, -0.4, 0.1], [0.3, 0.6, -0.2]], dtype=F64)
B = torch.tensor([0.5, -1.0], dtype=F64)
LOG_SIGMA = torch.tensor([-0.3, 0.1], dtype=F64)
TARGET = MultivariateNormal(torch.tensor([0.2, 0.4], dtype=F64), torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=F64))
LOG_Z = 1.7


def marginal():
    return MultivariateNormal(B, W @ W.T + torch.diag((2 * LOG_SIGMA).exp()))


def layer_draws(n, m, seed):
    """log p and log mixtures for n pairs each with m components of its own (leading dimension: the pairs)."""
    draws = torch.Generator().manual_seed(seed)
    means = torch.randn((n, m, 3), dtype=F64, generator=draws) @ W.T + B
    x = means[:, :1] + LOG_SIGMA.exp() * torch.randn((n, 1, 2), dtype=F64, generator=draws)
    return LOG_Z + TARGET.log_prob(x), x, means


def log_mix_of(x, means, extra):
    return log_mixture(x, means, LOG_SIGMA.expand(len(x), -1), extra)


def closed_form_elbo():
    return LOG_Z - float(torch.distributions.kl_divergence(marginal(), TARGET))


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(values.numel()))


def test_bound_tends_to_the_closed_form_elbo_and_rises_with_j():
    log_p, x, means = layer_draws(2000, 257, seed=0)
    elbo = closed_form_elbo()
    bounds = {J: (log_p - log_mix_of(x, means, J)).flatten() for J in (0, 1, 4, 16, 256)}
    ladder = list(bounds.values())
    for lower, higher in itertools.pairwise(ladder):
        rise, error = mean_and_error(higher - lower)  # paired: the same x and nested components
        assert rise > 4 * error
    # J = 0 in closed form: E log p minus the layer's negative entropy
    mean, error = mean_and_error(bounds[0])
    noise_entropy = float(LOG_SIGMA.sum()) + 1 + math.log(2 * math.pi)
    cross = float(torch.distributions.kl_divergence(marginal(), TARGET)) + float(marginal().entropy())
    assert abs(mean - (LOG_Z - cross + noise_entropy)) < 4 * error
    mean, error = mean_and_error(bounds[256])
    assert abs(mean - elbo) < 4 * error + 0.01
    assert elbo < LOG_Z
    for values in ladder:
        mean, error = mean_and_error(values)
        assert mean < elbo + 4 * error


def test_weights_against_the_mixture_are_unbiased_for_every_j():
    # so the bound is Jensen's, below log Z whatever the layer
    for J in (1, 8):
        log_p, x, means = layer_draws(40_000, J + 1, seed=J)
        mean, error = mean_and_error((log_p - log_mix_of(x, means, J) - LOG_Z).exp())
        assert error < 0.05
        assert abs(mean - 1) < 4 * error
    without = math.log(8) - pairwise_log_density(x, means[:, 1:], LOG_SIGMA.expand(len(x), -1)).logsumexp(-1)
    # without the own component it is no lower bound any more
    mean, error = mean_and_error(log_p + without)
    assert mean > closed_form_elbo() + 4 * error


def test_bound_of_several_layers_is_that_of_each():
    log_p, log_mix = randn(3, 10), randn(3, 10, seed=1)
    torch.testing.assert_close(surrogate_bound(log_p, log_mix)[1], (log_p[1] - log_mix[1]).mean())


def score(normal, x):
    return (normal.loc - x) @ normal.precision_matrix


def test_fisher_value_at_the_best_critic_is_the_divergence_and_any_other_critic_is_below():
    _, x, means = layer_draws(100_000, 1, seed=3)
    x, means = x[:, 0], means[:, 0]
    difference = score(TARGET, x) + (x - means) / (2 * LOG_SIGMA).exp()
    best = score(TARGET, x) - score(marginal(), x)
    value = float(fisher_minimax(best, difference))
    # E |A x - c|^2 in closed form
    q = marginal()
    A = q.precision_matrix - TARGET.precision_matrix
    c = q.precision_matrix @ q.loc - TARGET.precision_matrix @ TARGET.loc
    divergence = float((A @ q.loc - c).square().sum() + (A @ q.covariance_matrix @ A.T).trace())
    terms = (2 * best * difference - best**2).sum(-1)
    assert abs(value - divergence) < 4 * mean_and_error(terms)[1]
    assert divergence > 0.5
    for other in (0.8 * best, best + 0.2, torch.zeros_like(best)):
        assert float(fisher_minimax(other, difference)) < value
    # linear critics: least squares of the difference on x finds the closed form
    design = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
    solution = torch.linalg.lstsq(design, difference).solution
    torch.testing.assert_close(solution, torch.cat([A.T, -c.unsqueeze(0)]), rtol=0, atol=0.05)

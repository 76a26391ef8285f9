"""HSIVI-LB against closed forms of linear-Gaussian layers, HSIVI-SM against the Fisher divergence of Gaussians."""

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from hsivi_cli.objectives.hsivi_bound import fisher_minimax, log_mixture_sum, mixture_at, surrogate_bound

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("extra", [0, 2, 6])
def test_mixture_is_the_own_component_and_the_next_ones_and_its_score_is_autograds(rows, extra):
    # far from the origin, where squares that are multiplied out would lose their digits
    x, means, log_sigma = randn(4, 3) + 1e4, randn(7, 3, seed=1) + 1e4, 0.3 * randn(rows, 3, seed=2) - 1
    columns = torch.tensor([[(i + j) % 7 for j in range(extra + 1)] for i in range(4)])
    x.requires_grad_(True)
    pairs = Normal(means, log_sigma.exp()).log_prob(x.unsqueeze(1)).sum(-1)
    expected = pairs.gather(1, columns).logsumexp(1) - math.log(extra + 1)
    found = mixture_at(x, means, log_sigma, extra)
    torch.testing.assert_close(found.log_density, expected.detach(), rtol=1e-8, atol=1e-8)
    score = torch.autograd.grad(expected.sum(), x)[0]
    torch.testing.assert_close(found.score, score, rtol=1e-8, atol=1e-8)
    assert not found.score.requires_grad
    total = log_mixture_sum(x.detach(), means, log_sigma)
    torch.testing.assert_close(total, pairs.detach().logsumexp(1), rtol=1e-8, atol=1e-8)


def test_more_components_than_chains_are_refused():
    with pytest.raises(ValueError, match="components"):
        mixture_at(randn(4, 2), randn(4, 2), torch.zeros(1, 2, dtype=F64), 4)


# One linear-Gaussian layer: y ~ N(0, I), x = W y + b + sigma zeta, so that q(x) = N(b, W W' + diag sigma^2).
W = torch.tensor([[0.9, -0.4, 0.1], [0.3, 0.6, -0.2]], dtype=F64)
B = torch.tensor([0.5, -1.0], dtype=F64)
LOG_SIGMA = torch.tensor([-0.3, 0.1], dtype=F64)
TARGET = MultivariateNormal(torch.tensor([0.2, 0.4], dtype=F64), torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=F64))
LOG_Z = 1.7


def marginal():
    return MultivariateNormal(B, W @ W.T + torch.diag((2 * LOG_SIGMA).exp()))


def layer_draws(n, m, seed, spread=1.0):
    """x and the m inputs' means for n independent rounds; each x came from the first component of its round."""
    draws = torch.Generator().manual_seed(seed)
    means = spread * torch.randn((n, m, 3), dtype=F64, generator=draws) @ W.T + B
    return means[:, 0] + LOG_SIGMA.exp() * torch.randn((n, 2), dtype=F64, generator=draws), means


def mixtures_of(x, means):
    found = [mixture_at(x[i : i + 1], means[i], LOG_SIGMA.unsqueeze(0), means.shape[1] - 1) for i in range(len(x))]
    return torch.cat([each.log_density for each in found]), torch.cat([each.score for each in found])


def log_p_of(x):
    return LOG_Z + TARGET.log_prob(x)


def closed_form_elbo():
    return LOG_Z - float(torch.distributions.kl_divergence(marginal(), TARGET))


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(values.numel()))


def test_bound_tends_to_the_closed_form_elbo_and_rises_with_j():
    x, means = layer_draws(1000, 257, seed=0)
    elbo = closed_form_elbo()
    bounds = {J: log_p_of(x) - mixtures_of(x, means[:, : J + 1])[0] for J in (0, 1, 4, 16, 256)}
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
    # so the bound is Jensen's, below log Z whatever the layer. A target and means within the noise: light weights
    narrow = MultivariateNormal(B, 0.4 * TARGET.covariance_matrix)
    for J in (1, 8):
        x, means = layer_draws(4000, J + 1, seed=J, spread=0.4)
        mean, error = mean_and_error((narrow.log_prob(x) - mixtures_of(x, means)[0]).exp())
        assert error < 0.03
        assert abs(mean - 1) < 4 * error
    x, means = layer_draws(4000, 9, seed=8)
    # without the own component it is no lower bound any more
    mean, error = mean_and_error(log_p_of(x) - mixtures_of(x, means[:, 1:])[0])
    assert mean > closed_form_elbo() + 4 * error


def test_gradient_along_x_is_the_bounds_whole_gradient_in_the_mean_with_less_noise():
    # In (W, b, log sigma) for J = 2: what it leaves out, the mixture's derivative in its own parameters, has mean zero
    rounds, J = 5000, 2
    draws = torch.Generator().manual_seed(4)
    inputs = torch.randn((rounds, J + 1, 3), dtype=F64, generator=draws)
    zeta = torch.randn((rounds, 2), dtype=F64, generator=draws)
    offset = torch.zeros((rounds, 2), dtype=F64, requires_grad=True)  # of b, and of log sigma, one a round
    stretch = torch.zeros((rounds, 2), dtype=F64, requires_grad=True)
    means, sigma = inputs @ W.T + B + offset.unsqueeze(1), (LOG_SIGMA + stretch).exp()
    x = means[:, 0] + sigma * zeta
    log_mix = Normal(means, sigma.unsqueeze(1)).log_prob(x.unsqueeze(1)).sum(-1).logsumexp(1)
    whole = torch.cat(torch.autograd.grad((log_p_of(x) - log_mix).sum(), (offset, stretch), retain_graph=True), 1)
    direction = score(TARGET, x.detach()) - mixtures_of(x.detach(), means.detach())[1]
    along = torch.cat(torch.autograd.grad(x, (offset, stretch), direction), 1)
    for parameter in range(4):
        gap, error = mean_and_error((whole - along)[:, parameter])
        assert abs(gap) < 4 * error
    assert bool((along.var(0) < 0.7 * whole.var(0))[2:].all())


def test_score_of_the_mixture_is_the_conditionals_in_the_mean_with_less_noise():
    x, means = layer_draws(4000, 9, seed=5)
    conditional = (means[:, 0] - x) / (2 * LOG_SIGMA).exp()
    mixed = mixtures_of(x, means)[1]
    for critic in (torch.ones_like(x), x, x.square(), torch.sin(3 * x)):
        for column in range(2):
            gap, error = mean_and_error(((mixed - conditional) * critic)[:, column])
            assert abs(gap) < 4 * error
    assert bool((mixed.var(0) < 0.8 * conditional.var(0)).all())
    # negative control: without the own component the two differ
    gap, error = mean_and_error(((mixtures_of(x, means[:, 1:])[1] - conditional) * x)[:, 0])
    assert abs(gap) > 4 * error


def score(normal, x):
    return (normal.loc - x) @ normal.precision_matrix


def test_fisher_value_at_the_best_critic_is_the_divergence_and_any_other_critic_is_below():
    x, means = layer_draws(100_000, 1, seed=3)
    means = means[:, 0]
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


def test_a_draw_of_density_zero_does_not_end_a_run():
    log_p, log_mix = torch.tensor([0.5, -math.inf, 1.5]), torch.zeros(3)
    assert float(surrogate_bound(log_p, log_mix)) == 1.0
    assert float(surrogate_bound(torch.full((3,), -math.inf), log_mix)) == -math.inf

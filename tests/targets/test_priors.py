"""Priors integrate to one, agree with scipy, sample what they say, and keep all this when truncated."""

import math

import pytest
import torch
from scipy import integrate, stats

from hsivi_cli.errors import InputError
from hsivi_cli.targets.priors import PriorStack, make_prior

CASES = [
    (make_prior("normal", 1.0, 2.0), stats.norm(1, 2)),
    (make_prior("student_t", 3.0, -1.0, 2.0), stats.t(3, -1, 2)),
    (make_prior("cauchy", 0.5, 2.5), stats.cauchy(0.5, 2.5)),
    (make_prior("half_normal", 2.0), stats.halfnorm(scale=2)),
    (make_prior("half_cauchy", 2.5), stats.halfcauchy(scale=2.5)),
    (make_prior("gamma", 2.0, 0.5), stats.gamma(2, scale=2)),
    (make_prior("inverse_gamma", 3.0, 2.0), stats.invgamma(3, scale=2)),
    (make_prior("exponential", 0.7), stats.expon(scale=1 / 0.7)),
    (make_prior("lognormal", 0.3, 0.8), stats.lognorm(0.8, scale=math.exp(0.3))),
    (make_prior("uniform", -1.0, 4.0), stats.uniform(-1, 5)),
]
IDS = [prior.describe() for prior, _ in CASES]


def density(prior):
    return lambda x: float(prior.log_density(torch.tensor(x, dtype=torch.float64)).exp())


@pytest.mark.parametrize(("prior", "law"), CASES, ids=IDS)
def test_density_is_scipys_and_score_its_derivative(prior, law):
    x = torch.from_numpy(law.ppf([0.01, 0.2, 0.5, 0.8, 0.99])).requires_grad_(True)
    value = prior.log_density(x)
    torch.testing.assert_close(value.detach(), torch.from_numpy(law.logpdf(x.detach())), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(value.sum() + 0 * x.sum(), x)
    torch.testing.assert_close(prior.score(x).detach(), slope)


@pytest.mark.parametrize(("prior", "law"), CASES, ids=IDS)
@pytest.mark.parametrize(("lower", "upper"), [(0.0, math.inf), (0.3, 2.0)])
def test_truncated_priors_integrate_to_one_and_sample_themselves(prior, law, lower, upper):
    cut = prior.truncate(lower, upper)
    top = min(upper, cut.upper)
    assert abs(integrate.quad(density(cut), lower, top, epsabs=1e-11, limit=200)[0] - 1) < 1e-7
    draws = cut.sample((20_000,), torch.Generator().manual_seed(3)).numpy()
    mass = law.cdf(top) - law.cdf(lower)
    assert draws.min() >= lower
    assert draws.max() <= top
    # 1.95 / sqrt(n) is passed by chance once in a thousand
    assert stats.kstest(draws, lambda x: (law.cdf(x) - law.cdf(lower)) / mass).statistic < 1.95 / 20_000**0.5


def test_truncation_far_in_the_tail_keeps_its_digits():
    cut = make_prior("normal", -10.0, 1.0).truncate(0.0, math.inf)
    assert abs(integrate.quad(density(cut), 0, 2)[0] - 1) < 1e-9
    draws = cut.sample((4000,), torch.Generator().manual_seed(0))
    exact = stats.truncnorm(10, math.inf, loc=-10).mean()
    assert abs(float(draws.mean()) - exact) < 5 * float(draws.std()) / 4000**0.5
    with pytest.raises(ValueError, match="no mass"):
        make_prior("normal", -100.0, 1.0).truncate(0.0, math.inf)
    with pytest.raises(ValueError, match="no overlap"):
        make_prior("uniform", -3.0, -1.0).truncate(0.0, math.inf)


def test_half_forms_are_truncations_and_flat_is_improper():
    assert make_prior("normal", 0.0, 2.0).truncate(0.0, math.inf) == make_prior("half_normal", 2.0)
    assert make_prior("cauchy", 0.0, 2.5).truncate(0.0, math.inf).describe() == "half_cauchy(2.5)"
    flat = make_prior("flat")
    assert not flat.proper
    assert float(flat.log_density(torch.ones(1, dtype=torch.float64))) == 0
    with pytest.raises(InputError, match="flat"):
        flat.sample((1,), torch.Generator())


def test_a_stack_is_the_sum_of_its_priors():
    priors = [prior.truncate(0.0, math.inf) for prior, _ in CASES] + [
        make_prior("flat"),
        make_prior("normal", 5.0, 1.0),
    ]
    stack = PriorStack(priors)
    x = torch.rand(7, len(priors), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    columns = [prior.log_density(x[:, i]) for i, prior in enumerate(priors)]
    torch.testing.assert_close(stack.log_density(x), torch.stack(columns).sum(0))
    scores = [prior.score(x[:, i]) for i, prior in enumerate(priors)]
    torch.testing.assert_close(stack.score(x), torch.stack(scores, 1))
    assert not stack.proper

"""Response families: they are distributions, their scores are derivatives, and they simulate themselves."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from hsivi_cli.errors import InputError
from hsivi_cli.targets.families import FAMILIES, check_response, family_named, guess_family

ETA, SIGMA, NU, SHAPE = 0.4, 1.3, 4.5, 2.5
MEAN = np.exp(ETA)
P = 1 / (1 + np.exp(-ETA))
LAWS = {
    "gaussian": stats.norm(ETA, SIGMA),
    "student-t": stats.t(NU, ETA, SIGMA),
    "bernoulli": stats.bernoulli(P),
    "binomial": stats.binom(7, P),
    "poisson": stats.poisson(MEAN),
    "negative-binomial": stats.nbinom(SHAPE, SHAPE / (SHAPE + MEAN)),
}
VALUES = {"sigma": SIGMA, "nu": NU, "shape": SHAPE}
COUNTS = {"bernoulli": [0.0, 1.0], "binomial": list(range(8))}


def pieces(name, y):
    family = FAMILIES[name]
    aux = {key: torch.tensor([VALUES[key]], dtype=torch.float64, requires_grad=True) for key in family.aux}
    eta = torch.full((1, len(y)), ETA, dtype=torch.float64, requires_grad=True)
    trials = torch.full((len(y),), 7.0, dtype=torch.float64) if name == "binomial" else None
    return family, aux, eta, trials


@pytest.mark.parametrize("name", FAMILIES)
def test_log_likelihood_is_scipys(name):
    y = torch.tensor(COUNTS.get(name, [0.0, 1.0, 2.0, 9.0, 30.0]), dtype=torch.float64)
    family, aux, eta, trials = pieces(name, y)
    value = family.constant(y, trials) + family.auxiliary(y, aux) + family.kernel(y, trials, eta, aux)
    law = LAWS[name]
    expected = law.logpmf(y.numpy()) if hasattr(law, "pmf") else law.logpdf(y.numpy())
    torch.testing.assert_close(value.detach()[0], torch.from_numpy(expected), rtol=1e-11, atol=1e-11)
    if name in ("gaussian", "student-t"):
        assert abs(integrate.quad(law.pdf, -np.inf, np.inf)[0] - 1) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_derivatives(name):
    y = torch.tensor(COUNTS.get(name, [0.0, 1.0, 5.0]), dtype=torch.float64)
    family, aux, eta, trials = pieces(name, y)
    by_eta, by_aux = family.kernel_score(y, trials, eta, aux)
    kernel = family.kernel(y, trials, eta, aux).sum()
    found = torch.autograd.grad(kernel, [eta, *aux.values()], retain_graph=True)
    torch.testing.assert_close(by_eta, found[0])
    for key, expected in zip(aux, found[1:], strict=True):
        torch.testing.assert_close(by_aux[key].sum(1), expected)
    score = family.auxiliary_score(y, aux)
    for key in aux:
        total = family.auxiliary(y, aux).expand(1, len(y)).sum()
        (expected,) = torch.autograd.grad(total, aux[key])
        torch.testing.assert_close(score[key].expand(1, len(y)).sum(1), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_simulation_has_the_laws_moments(name):
    rows = 40_000
    family, aux, eta, trials = pieces(name, torch.zeros(rows))
    aux = {key: value.detach() for key, value in aux.items()}
    draws = family.simulate(trials, eta.detach(), aux, torch.Generator().manual_seed(5))[0].numpy()
    law = LAWS[name]
    assert abs(draws.mean() - law.mean()) < 5 * law.std() / rows**0.5
    below = (draws <= law.ppf(0.8)).mean()
    exact = law.cdf(law.ppf(0.8))
    assert abs(below - exact) < 5 * (exact * (1 - exact) / rows) ** 0.5 + 1e-12


def check(name, y, trials=None, two_levels=False):
    check_response(family_named(name), np.array(y, float), trials, "y", two_levels)


@pytest.mark.parametrize(
    ("name", "y", "words"),
    [
        ("gaussian", [1, np.inf], "must be finite, but is inf in row 2"),
        ("bernoulli", [0, 1, 2], "0 or 1, or text of two categories, not 2 in row 3"),
        ("poisson", [1, -1], "0 or more, not -1 in row 2"),
        ("negative-binomial", [0.5, 1], "whole numbers, not 0.5 in row 1"),
        ("binomial", [1, 0], "wants the trials"),
    ],
)
def test_wrong_responses_are_refused(name, y, words):
    with pytest.raises(InputError, match=words):
        check(name, y)
    check("gaussian", [1.5, 2])
    check("normal", [1.5, 2])


def test_trials_and_text():
    trials = np.array([3.0, 4.0])
    check("binomial", [3, 0], trials)
    with pytest.raises(InputError, match="5 in row 2 exceeds its 4 trials"):
        check("binomial", [3, 5], trials)
    with pytest.raises(InputError, match="use --family binomial"):
        check("poisson", [3, 4], trials)
    with pytest.raises(InputError, match="use --family bernoulli"):
        check("gaussian", [0, 1], None, True)
    with pytest.raises(InputError, match="--family foo is unknown"):
        family_named("foo")


def test_guesses():
    rng = np.random.default_rng(0)
    assert guess_family(rng.normal(size=50), None, False)[0].name == "gaussian"
    assert guess_family(rng.integers(0, 2, 50) * 1.0, None, False)[0].name == "bernoulli"
    assert guess_family(rng.poisson(2, 500) * 1.0, None, False)[0].name == "poisson"
    assert guess_family(rng.negative_binomial(1, 0.1, 500) * 1.0, None, False)[0].name == "negative-binomial"
    assert guess_family(rng.integers(20, 140, 50) * 1.0, None, False)[0].name == "gaussian"  # scores, not counts
    assert guess_family(np.array([1.0, 2]), np.array([3.0, 3]), False)[0].name == "binomial"


def test_a_negative_binomial_of_huge_shape_is_poisson_and_level():
    y, eta = torch.tensor([[0.0, 3.0, 12.0]], dtype=torch.float64), torch.tensor([[0.1, 1.2, 2.0]], dtype=torch.float64)
    family = FAMILIES["negative-binomial"]
    exact = torch.distributions.Poisson(eta.exp()).log_prob(y)
    for shape in (1e7, 1e10, 3e16):
        aux = {"shape": torch.tensor([shape], dtype=torch.float64)}
        found = family.constant(y, None) + family.auxiliary(y, aux) + family.kernel(y, None, eta, aux)
        torch.testing.assert_close(found, exact, atol=2e-5, rtol=0)
        score = family.auxiliary_score(y, aux)["shape"] + family.kernel_score(y, None, eta, aux)[1]["shape"]
        assert float((shape * score).abs().max()) < 1e-4  # level in log shape

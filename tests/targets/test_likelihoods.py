"""Likelihoods: constants, samplers, gaps, and one clear line for rows they cannot have."""

import itertools
import math

import pytest
import torch
from torch import distributions

from hsivi_cli.errors import InputError
from hsivi_cli.targets.likelihoods import LIKELIHOODS, Likelihood, likelihood_for

LEVELS = (2, 4, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(name: str) -> tuple[Likelihood, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A likelihood of three columns, outputs (2, 5, P), rows (5, 3), and log_sd."""
    likelihood = Likelihood(name, LEVELS if name == "categorical" else ())
    outputs = torch.randn(2, 5, likelihood.outputs(3), generator=generator(), dtype=torch.float64)
    log_sd = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64) if name == "gaussian" else None
    x = likelihood.sample(outputs[0], generator(1), log_sd)
    return likelihood, outputs, x, log_sd


@pytest.mark.parametrize(("name", "most"), [("bernoulli", (2, 2, 2)), ("binomial", (3, 3, 3)), ("categorical", LEVELS)])
def test_probabilities_of_all_rows_sum_to_one(name, most):
    likelihood, outputs, _, _ = example(name)
    every = torch.tensor(list(itertools.product(*(range(n) for n in most))), dtype=torch.float64)
    one = outputs[0, :1].expand(len(every), -1)
    assert float(likelihood.log_prob(one, every).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_against_torch_distributions():
    likelihood, outputs, x, log_sd = example("gaussian")
    wanted = distributions.Normal(outputs, log_sd.exp()).log_prob(x).sum(-1)
    assert torch.allclose(likelihood.log_prob(outputs, x, log_sd), wanted, atol=1e-12)
    likelihood, outputs, x, _ = example("binomial")
    wanted = distributions.Binomial(2, logits=outputs).log_prob(x.expand_as(outputs)).sum(-1)
    assert torch.allclose(likelihood.log_prob(outputs, x), wanted, atol=1e-12)
    likelihood, outputs, x, _ = example("bernoulli")
    wanted = distributions.Bernoulli(logits=outputs).log_prob(x.expand_as(outputs)).sum(-1)
    assert torch.allclose(likelihood.log_prob(outputs, x), wanted, atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_missing_entries_contribute_nothing_in_value_or_gradient(name):
    likelihood, outputs, x, log_sd = example(name)
    each = likelihood.outputs(3) // 3
    x = x.clone()
    x[1, 2] = x[3, 0] = math.nan
    outputs = outputs.requires_grad_()
    found = likelihood.log_prob(outputs, x, log_sd)
    assert torch.isfinite(found).all()
    # what is left is the sum over the columns that are there, each on its own
    if name == "categorical":
        parts = Likelihood(name, LEVELS[:2])
        alone = parts.log_prob(outputs[:, 1:2, : 2 * each], x[1:2, :2])
    else:
        alone = likelihood.log_prob(outputs[:, 1:2, :2], x[1:2, :2], None if log_sd is None else log_sd[:2])
    assert torch.allclose(found[:, 1], alone[:, 0], atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), outputs)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 1, 2 * each :] == 0).all()
    assert (gradient[:, 3, :each] == 0).all()
    assert (gradient[:, 0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_have_the_mean_and_pass_the_check(name):
    likelihood, outputs, _, log_sd = example(name)
    many = outputs[0, :1].expand(40_000, -1)
    x = likelihood.sample(many, generator(2), log_sd)
    assert x.shape == (40_000, 3)
    likelihood.check(x)
    error = 5 * x.std(0) / 200
    assert ((x.mean(0) - likelihood.mean(outputs[0, 0])).abs() < error).all()
    assert torch.equal(x, likelihood.sample(many, generator(2), log_sd))


def test_the_shares_of_categories_are_those_of_the_softmax():
    likelihood, outputs, _, _ = example("categorical")
    x = likelihood.sample(outputs[0, :1].expand(40_000, -1), generator(4))
    for column, levels in enumerate(LEVELS):
        share = outputs[0, 0, 4 * column : 4 * column + levels].softmax(-1)
        found = torch.stack([(x[:, column] == level).double().mean() for level in range(levels)])
        assert ((found - share).abs() < 5 * (share * (1 - share) / 40_000).sqrt()).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_base_outputs_are_the_best_without_latents(name):
    likelihood, outputs, _, log_sd = example(name)
    x = likelihood.sample(outputs[0, :1].expand(4000, -1), generator(5), log_sd)
    x[::7, 1] = math.nan
    base = likelihood.base(x).requires_grad_()
    total = likelihood.log_prob(base.expand(len(x), -1), x, log_sd).sum()
    (gradient,) = torch.autograd.grad(total, base)
    assert gradient.abs().max() < 3  # half a row's worth, of 4000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("bernoulli", 0.5, "column 2, row 3 is 0.5.*binarise"), ("binomial", 3, "column 2, row 3 is 3.*0, 1 or 2"),
     ("categorical", 1.5, "whole numbers"), ("categorical", -1, "whole numbers"), ("categorical", 4000, "0..255"),
     ("gaussian", math.inf, "not finite")],
)  # fmt: skip
def test_impossible_entries_are_named(name, value, words):
    x = torch.zeros(4, 3)
    x[2, 1] = value
    x[0, 0] = math.nan
    with pytest.raises(InputError, match=words) as caught:
        likelihood_for(name, x)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match='column "b", row 3'):
        likelihood_for(name, x, ("a", "b", "c"))


def test_levels_are_found_column_by_column():
    x = torch.tensor([[0.0, 3.0], [1.0, math.nan], [0.0, 0.0]])
    assert likelihood_for("categorical", x).levels == (2, 4)
    with pytest.raises(InputError, match=r"0\.\.1"):
        likelihood_for("categorical", x).check(torch.tensor([[2.0, 0.0]]))
    with pytest.raises(InputError, match="there is no likelihood"):
        likelihood_for("poisson", x)

"""z ~ N(0, I), x ~ N(z, I): the posterior is N(x / 2, I / 2)."""

import math

import numpy as np
import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.amortised_calibration import (
    calibrate_draws,
    coverage_curve,
    density_ranks,
    ranks_of_truths,
)
from hsivi_cli.evaluation.calibration import rank_of_first

R, L = 300, 99


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, g):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def log_normal(z, mean, sd):
    return torch.distributions.Normal(mean, sd).log_prob(z).sum(-1)


def pairs(seed=0, scale=1.0, shift=0.0, ignore=False):
    """Truths, observations, draws of an encoder (wrong by `scale` and `shift`, or the prior), its log densities."""
    g = generator(seed)
    truths = normal(R, 2, g=g)
    x = truths + normal(R, 2, g=g)
    mean, sd = (torch.zeros_like(x), 1.0) if ignore else (x / 2 + shift, scale * math.sqrt(0.5))
    samples = mean[:, None] + sd * normal(R, L, 2, g=g)
    return truths, x, samples, (log_normal(truths, mean, sd), log_normal(samples, mean[:, None], sd))


def calibrate(quantity=False, **options):
    truths, x, samples, log_q = pairs(**options)
    likelihood = {"log_likelihood": (log_normal(x, truths, 1.0), log_normal(x[:, None], samples, 1.0))}
    return calibrate_draws(["a", "b"], truths, samples, log_q, generator(1), likelihood if quantity else None)


def test_the_exact_posterior_passes_in_every_column():
    for seed in range(3):
        result = calibrate(quantity=True, seed=seed)
        assert result.passed
        assert result.columns == ("a", "b", "log_likelihood", "(density)", "(joint)")
        assert result.replications == R


@pytest.mark.parametrize(
    ("options", "column", "word"),
    [
        ({"scale": 0.6}, "a", "overconfident"),
        ({"scale": 1.6}, "a", "too wide"),
        ({"shift": 0.4}, "b", "biased high"),
        ({"shift": -0.4}, "b", "biased low"),
    ],
)
def test_narrow_wide_and_shifted_posteriors_fail(options, column, word):
    result = calibrate(**options)
    assert not result.passed
    assert {"a", "b"} <= set(result.failing)
    assert f"{column} ({word})" in result.verdict


def test_width_shows_in_density_and_joint_ranks():
    for scale in (0.6, 1.6):
        assert {"(density)", "(joint)"} <= set(calibrate(scale=scale).failing)


def test_an_encoder_that_ignores_the_data_needs_a_quantity_of_the_data():
    assert calibrate(ignore=True).passed
    assert "log_likelihood" in calibrate(ignore=True, quantity=True).failing


def test_ranks_in_one_pass_are_those_one_by_one():
    g = generator()
    truths, samples = normal(20, 3, g=g), normal(20, 9, 3, g=g)
    found = ranks_of_truths(truths, samples, g)
    for row in range(20):
        assert torch.equal(found[row], rank_of_first(torch.cat([truths[row : row + 1], samples[row]]), g))


def test_ties_are_split_at_random():
    counts = torch.bincount(ranks_of_truths(torch.zeros(5000, 1), torch.zeros(5000, 9, 1), generator())[:, 0])
    assert len(counts) == 10
    assert float(((counts - 500) ** 2 / 500).sum()) < 30  # chi-square of 9


def test_density_ranks_start_at_the_mode():
    at_samples = torch.tensor([[-1.0, -2.0, -torch.inf]] * 3)
    at_truths = torch.tensor([0.0, -1.5, -torch.inf])
    assert density_ranks(at_truths[:2], at_samples[:2], generator()).tolist() == [0, 1]
    assert set(density_ranks(at_truths[2:].expand(50), at_samples[:1].expand(50, 3), generator()).tolist()) == {2, 3}


def test_coverage_is_on_the_diagonal_below_it_or_above_it():
    curves = {}
    for scale in (1.0, 0.6, 1.6):
        log_q = pairs(scale=scale)[3]
        curves[scale] = coverage_curve(density_ranks(*log_q, generator(2)), L)
    assert curves[1.0].inside
    assert abs(curves[1.0].deviation) < 0.1
    assert not curves[0.6].inside
    assert not curves[1.6].inside
    assert curves[0.6].deviation < -0.2 < 0.2 < curves[1.6].deviation
    # truth and draws differ by N(0, sd^2): inside the region of level c with probability P(chi2_2 < s^2 q_c)
    levels = curves[0.6].levels
    expected = 1 - (1 - levels) ** (0.6**2)
    assert np.abs(curves[0.6].observed - expected).max() < 4 * 0.5 / math.sqrt(R)


def test_bad_shapes_are_one_clear_line():
    with pytest.raises(InputError, match="do not go with truths"):
        ranks_of_truths(torch.zeros(3, 2), torch.zeros(3, 5, 1), generator())
    with pytest.raises(InputError, match="not finite"):
        ranks_of_truths(torch.zeros(3, 1), torch.full((3, 5, 1), torch.nan), generator())
    with pytest.raises(InputError, match="1 names for 2 columns"):
        calibrate_draws(
            ["a"], torch.zeros(3, 2), torch.zeros(3, 5, 2), (torch.zeros(3), torch.zeros(3, 5)), generator()
        )

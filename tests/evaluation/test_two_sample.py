import math

import numpy as np
import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.two_sample import classifier_accuracy


def draws(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d))


def test_one_law_cannot_be_told_apart():
    found = classifier_accuracy(draws(300, 2, 0), draws(300, 2, 1))
    assert abs(found.accuracy - 0.5) < 4 * found.se
    assert len(found.folds) == 5
    assert found.accuracy == pytest.approx(np.mean(found.folds))


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_shifted_gaussians_are_told_apart_as_well_as_bayes_can(shift):
    """The best classifier of N(0, I) and N(shift e_1, I) is right with probability Phi(shift / 2)."""
    best = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))
    # scales that differ by 10^6 must not matter: the reference is standardised
    scale = np.array([1e-3, 1e3])
    found = classifier_accuracy(draws(500, 2, 0) * scale, (draws(500, 2, 1) + np.array([shift, 0.0])) * scale)
    assert best - 0.04 < found.accuracy < best + 4 * found.se


def test_no_overlap_and_a_column_that_does_not_move():
    one, other = draws(100, 2, 0), draws(100, 2, 1)
    one[:, 0] = other[:, 0] = 3.0
    assert classifier_accuracy(one, other + np.array([0.0, 8.0])).accuracy > 0.98


def test_the_seed_decides():
    one, other = draws(60, 1, 0), draws(60, 1, 1) + 0.5
    assert classifier_accuracy(one, other, seed=3) == classifier_accuracy(one, other, seed=3)


def test_what_cannot_be_compared_is_one_line():
    with pytest.raises(InputError, match=r"shapes \(10, 2\) and \(10, 3\)"):
        classifier_accuracy(draws(10, 2, 0), draws(10, 3, 0))
    with pytest.raises(InputError, match="10 and 4 draws: 5 each"):
        classifier_accuracy(draws(10, 2, 0), draws(4, 2, 0))
    with pytest.raises(InputError, match="not finite"):
        classifier_accuracy(draws(10, 1, 0), np.full((10, 1), np.nan))

import numpy as np
import pytest

from hsivi_cli.evaluation.uniformity import _inside_probability, holm, simultaneous_band, uniformity


def ranks(n, draws, seed=0, skew=1.0):
    uniform = np.random.default_rng(seed).random(n) ** skew
    return np.floor(uniform * (draws + 1)).astype(np.int64)


def test_the_walk_is_the_multinomial_law():
    # three points, four ranks: all 4^4 equally likely outcomes, by hand
    lower, upper = np.array([0, 1, 1]), np.array([2, 3, 4])
    grid = np.array(np.meshgrid(*[np.arange(4)] * 4)).reshape(4, -1)
    counts = np.stack([(grid <= i).sum(0) for i in range(3)])
    share = ((counts >= lower[:, None]) & (counts <= upper[:, None])).all(0).mean()
    assert _inside_probability(lower, upper, 4) == pytest.approx(share, abs=1e-13)
    assert _inside_probability(np.zeros(3, int), np.full(3, 4), 4) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(("n", "draws"), [(50, 19), (100, 99), (40, 200)])
def test_p_values_are_valid_and_not_wasteful(n, draws):
    tests = [uniformity(ranks(n, draws, seed), draws) for seed in range(500)]
    for level in (0.05, 0.2):
        slack = 4 * np.sqrt(level * (1 - level) / 500)
        # the test is exact but discrete, so a little below its level
        assert level / 2 < np.mean([test.p_ecdf <= level for test in tests]) < level + slack
        assert np.mean([test.p <= level for test in tests]) < level + slack
        assert np.mean([test.p_histogram <= level for test in tests]) < level + slack


def test_the_band_holds_together_as_often_as_it_says():
    points, lower, upper = simultaneous_band(100, 50, 0.9)
    held = [
        ((found >= lower - 1e-12) & (found <= upper + 1e-12)).all()
        for found in (np.bincount(ranks(100, 50, seed), minlength=51).cumsum()[:-1] / 100 for seed in range(2000))
    ]
    assert 0.9 - 4 * np.sqrt(0.09 / 2000) < np.mean(held) < 0.94
    assert len(points) == 50
    assert (lower < points).all()
    assert (upper > points).all()
    np.testing.assert_allclose(lower + upper[::-1], 1, atol=1e-12)  # as the diagonal, the same from either end


@pytest.mark.parametrize("skew", [0.6, 1.6])
def test_skewed_ranks_are_found_and_mirror_images_alike(skew):
    skewed = ranks(200, 99, skew=skew)
    found, mirrored = uniformity(skewed, 99), uniformity(99 - skewed, 99)
    assert found.p < 1e-3
    assert mirrored.p_ecdf == pytest.approx(found.p_ecdf, rel=1e-6, abs=1e-12)
    assert mirrored.deviation == pytest.approx(found.deviation)


def test_extremes():
    assert uniformity(np.zeros(50, np.int64), 99).p < 1e-10
    assert uniformity(np.zeros(1, np.int64), 99).p > 0.01  # one rank is no proof
    assert uniformity(np.arange(100), 99).p == 1


def test_holm_is_bonferroni_for_the_smallest_and_monotone():
    p = np.array([0.04, 0.001, 0.5, 0.02])
    adjusted = holm(p)
    np.testing.assert_allclose(adjusted, [0.08, 0.004, 0.5, 0.06])
    assert (holm(np.array([0.9, 0.8])) <= 1).all()

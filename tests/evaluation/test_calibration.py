import math

import numpy as np
import pytest
import torch

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.evaluation.calibration import coverage_of_ranks, judge_ranks, rank_of_first, run_sbc, tarp_ranks

DRAWS, N = 99, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_prior(n, g):
    return torch.randn(n, 2, generator=g, dtype=torch.float64)


def simulate(z, g):
    """N observations a parameter with unit noise: the posterior of each is N(sum y / (N + 1), 1 / (N + 1))."""
    noise = torch.randn(len(z), 2, N, generator=g, dtype=torch.float64)
    return (z[:, :, None] + noise).flatten(1)


def refit(shift=0.0, scale=1.0, correlation=0.0, ignore=False):
    def draws(response, count, r):
        mean = response.reshape(2, N).sum(1) / (N + 1)
        e = torch.randn(count, 2, generator=generator(r + 1), dtype=torch.float64)
        e[:, 1] = correlation * e[:, 0] + math.sqrt(1 - correlation**2) * e[:, 1]
        if ignore:
            return e
        sd = 1 / math.sqrt(N + 1)
        # the second parameter alone is off
        return mean + sd * (e * torch.tensor([1.0, scale]) + torch.tensor([0.0, shift]))

    return draws


def calibrate(replications=200, seed=0, quantities=None, columns=("right", "wrong"), **options):
    return run_sbc(draw_prior, simulate, refit(**options), replications, DRAWS, generator(seed), columns, quantities)


def test_the_exact_posterior_passes():
    results = [calibrate(seed=seed) for seed in range(5)]
    assert all(result.passed for result in results)
    assert all(result.failing == () for result in results)
    result = results[0]
    assert result.verdict.startswith("calibrated in 200 refits")
    assert result.columns == ("right", "wrong", "(joint)")
    for row in result.coverage:
        assert (np.abs(row.observed - row.expected) < 4.5 * row.se).all()
        assert row.expected == pytest.approx(row.level, abs=0.011)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shift": -0.6}, "biased low"),
        ({"shift": 0.6}, "biased high"),
        ({"scale": 0.6}, "overconfident"),
        ({"scale": 1.6}, "too wide"),
    ],
)
def test_a_wrong_posterior_fails_in_the_parameter_that_is_wrong(options, word):
    result = calibrate(**options)
    assert not result.passed
    assert result.failing[0] == "wrong"
    assert "right" not in result.failing
    assert f"wrong ({word})" in result.verdict
    assert result.max_deviation > 0.1


def test_coverage_shows_overconfidence():
    row = next(row for row in calibrate(scale=0.5).coverage if row.level == 0.9)
    assert row.observed[0] > 0.83
    # +-1.645 halved: 2 Phi(0.82) - 1
    assert row.observed[1] == pytest.approx(0.589, abs=4 * math.sqrt(0.24 / 200))


def test_draws_that_ignore_the_data_need_a_quantity_of_the_data():
    """The prior itself has uniform ranks; the log likelihood's are not (Modrak et al.)."""

    def with_likelihood(z, response):
        y = response.reshape(2, N)
        return torch.cat([z, -0.5 * ((y[None] - z[:, :, None]) ** 2).sum((1, 2))[:, None]], 1)

    assert not {"right", "wrong"} & set(calibrate(ignore=True).failing)
    columns = ("right", "wrong", "log_likelihood")
    found = calibrate(ignore=True, quantities=with_likelihood, columns=columns)
    assert found.failing[0] == "log_likelihood"
    assert calibrate(quantities=with_likelihood, columns=columns).passed


def test_a_wrong_correlation_shows_only_jointly():
    # marginals are exact; TARP's distance sees the correlation as overconfidence along a diagonal
    result = calibrate(replications=800, correlation=0.95)
    assert not {"right", "wrong"} & set(result.failing)
    assert result.failing == ("(joint)",)


def test_many_right_parameters_raise_no_false_alarm():
    rng = np.random.default_rng(0)
    false = sum(
        bool(judge_ranks([str(j) for j in range(40)], rng.integers(0, DRAWS + 1, (100, 40)), DRAWS).failing)
        for _ in range(15)
    )
    assert false <= 2  # 1 % each would be 0.15


def test_failed_refits_are_counted_and_never_left_out_silently():
    inner = refit()

    def sometimes(response, count, r):
        if r % 10 == 0:
            raise RunError("diverged")
        z = inner(response, count, r)
        if r % 10 == 1:
            z[0, 0] = math.nan
        return z

    result = run_sbc(draw_prior, simulate, sometimes, 100, DRAWS, generator())
    assert (result.replications, result.failed_refits) == (80, 20)
    assert not result.passed
    assert "20 of 100 refits gave no draws" in result.verdict
    assert set(result.errors) == {"diverged", "a refit gave draws that are not finite"}
    assert result.columns == ("z[1]", "z[2]", "(joint)")

    def never(response, count, r):
        raise RunError("diverged")

    with pytest.raises(InputError, match="none of 5 refits gave draws, the first because: diverged"):
        run_sbc(draw_prior, simulate, never, 5, DRAWS, generator())


def test_the_same_seed_gives_the_same_ranks_and_progress_is_told():
    told = []
    one = run_sbc(draw_prior, simulate, refit(), 10, DRAWS, generator(), on_refit=told.append)
    np.testing.assert_array_equal(one.ranks, calibrate(10).ranks)
    assert told == list(range(1, 11))


def test_ties_are_split_at_random():
    values = torch.zeros(10, 5000, dtype=torch.float64)
    counts = torch.bincount(rank_of_first(values, generator()), minlength=10)
    assert len(counts) == 10
    assert float(((counts - 500) ** 2 / 500).sum()) < 30  # chi-square of 9
    distinct = torch.tensor([[2.0], [1.0], [3.0], [0.0]])
    assert rank_of_first(distinct, generator()).tolist() == [2]


def test_tarp_is_uniform_for_exact_draws_and_not_for_narrow_ones():
    g = generator()
    mean, references = draw_prior(400, g), draw_prior(400, g)
    truths = mean + 0.5 * draw_prior(400, g)
    noise = torch.randn(400, DRAWS, 2, generator=g, dtype=torch.float64)
    for scale, passes in ((0.5, True), (0.25, False)):
        ranks = tarp_ranks(truths, mean[:, None] + scale * noise, references, g).numpy()
        assert judge_ranks(["tarp"], ranks[:, None], DRAWS).passed is passes


def test_coverage_of_uniform_ranks_is_exact():
    ranks = np.arange(100)[:, None]
    for level, expected in ((0.5, 0.5), (0.8, 0.8), (0.9, 0.9)):
        row = coverage_of_ranks(ranks, 99, level)
        assert row.observed[0] == row.expected == pytest.approx(expected)


def test_bad_shapes_are_one_clear_line():
    with pytest.raises(InputError, match="a replication and a draw"):
        calibrate(0)
    with pytest.raises(InputError, match="1 names for 2 quantities"):
        calibrate(3, columns=("only",))
    with pytest.raises(InputError, match="3 draws instead of 99"):
        run_sbc(draw_prior, simulate, lambda response, count, r: torch.zeros(3, 2), 2, DRAWS, generator())

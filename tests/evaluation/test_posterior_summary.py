import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.posterior_summary import summarise, weighted_quantiles


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(n, p=3, seed=0):
    return torch.randn(n, p, generator=generator(seed), dtype=torch.float64)


@given(n=st.integers(2, 60), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_independent_draws_are_numpys(n, seed):
    values = normals(n, 2, seed)
    x = values.numpy()
    for j, row in enumerate(summarise(["a", "b[1]"], values)):
        assert row.name == ["a", "b[1]"][j]
        assert row.mean == pytest.approx(x[:, j].mean(), abs=1e-12)
        assert row.sd == pytest.approx(x[:, j].std(ddof=1), abs=1e-12)
        assert [row.q5, row.q50, row.q95] == pytest.approx(np.quantile(x[:, j], [0.05, 0.5, 0.95]), abs=1e-12)
        assert row.ess == n
        assert row.mcse == pytest.approx(row.sd / math.sqrt(n))
        assert row.khat is None
        assert row.rhat is None


@given(n=st.integers(2, 60), shift=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_equal_weights_are_no_weights(n, shift):
    values = normals(n)
    plain = summarise("abc", values)
    equal = summarise("abc", values, torch.full((n,), shift, dtype=torch.float64))
    for one, other in zip(plain, equal, strict=True):
        for field in ("mean", "sd", "q5", "q50", "q95", "mcse"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), abs=1e-10)
        assert other.ess == pytest.approx(n)


def test_weights_correct_the_wrong_distribution():
    # N(0.5, 1.5^2) weighted to N(0, 1); 5 s.e. of what is reported
    x = 0.5 + 1.5 * normals(20_000, 2)
    log_weight = -0.5 * x[:, 0] ** 2 + 0.5 * ((x[:, 0] - 0.5) / 1.5) ** 2
    right, left_alone = summarise(["x", "y"], x, log_weight)
    assert abs(right.mean) < 5 * right.mcse
    assert right.sd == pytest.approx(1, abs=0.03)
    assert [right.q5, right.q50, right.q95] == pytest.approx([-1.645, 0, 1.645], abs=0.06)
    assert right.khat < 0.3
    assert abs(left_alone.mean - 0.5) < 5 * left_alone.mcse
    assert left_alone.sd == pytest.approx(1.5, abs=0.05)


def test_the_standard_error_of_weighted_means_is_right():
    means, errors = [], []
    for seed in range(300):
        x = 1.5 * normals(400, 1, seed)
        (row,) = summarise(["x"], x, -0.5 * x[:, 0] ** 2 + 0.5 * (x[:, 0] / 1.5) ** 2)
        means.append(row.mean)
        errors.append(row.mcse)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=4 / math.sqrt(600))


def test_zero_weights_change_nothing_and_may_belong_to_infinite_draws():
    values, log_weight = normals(100), 0.5 * normals(100, 1, 1)[:, 0]
    padded = torch.cat([values, torch.tensor([[math.inf, math.nan, 1e300]], dtype=torch.float64)])
    zero = torch.cat([log_weight, torch.tensor([-math.inf], dtype=torch.float64)])
    for one, other in zip(summarise("abc", values, log_weight), summarise("abc", padded, zero), strict=True):
        for field in ("mean", "sd", "q5", "q50", "q95", "mcse", "ess"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), abs=1e-12), field


@given(seed=st.integers(0, 200), n=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_weighted_quantiles_are_monotone_symmetric_and_within_range(seed, n):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=n), rng.gamma(0.5, size=n)
    grid = np.linspace(0, 1, 21)
    found = weighted_quantiles(x, weight, grid)
    assert (np.diff(found) >= 0).all()
    assert found[0] == x.min()
    assert found[-1] == x.max()
    np.testing.assert_allclose(weighted_quantiles(-x, weight, 1 - grid), -found, atol=1e-12)


def test_draws_of_no_weight_do_not_stretch_the_quantiles():
    x, weight = np.array([1.0, 2.0, 3.0]), np.array([0.2, 0.5, 0.3])
    grid = np.linspace(0, 1, 11)
    far = weighted_quantiles(np.array([-99.0, 1.0, 2.0, 2.5, 3.0, 99.0]), np.array([0, 0.2, 0.5, 0, 0.3, 0]), grid)
    np.testing.assert_allclose(far, weighted_quantiles(x, weight, grid), atol=1e-12)


def test_heavy_tailed_parameters_have_their_own_khat():
    # the weights are harmless; the second parameter's tail is not
    log_weight = 0.1 * normals(4000, 1)[:, 0]
    uniform = torch.rand(4000, generator=generator(1), dtype=torch.float64)
    cauchy = torch.tan(math.pi * (uniform - 0.5))
    light, heavy = summarise(["light", "heavy"], torch.stack([normals(4000, 1, 2)[:, 0], cauchy], 1), log_weight)
    assert light.khat < 0.3
    assert heavy.khat > 0.7


def test_resampled_draws_are_worth_what_the_weights_were():
    (row,) = summarise(["x"], normals(100, 1), ess=25.0)
    assert row.ess == 25
    assert row.mcse == pytest.approx(row.sd / 5)


def test_chains_that_disagree_show():
    values = normals(4000, 2)
    values[:1000, 1] += 1.0  # the first of four chains sits elsewhere
    fine, stuck = summarise(["fine", "stuck"], values, chains=4)
    assert fine.rhat < 1.01
    assert 2500 < fine.ess < 6000
    assert stuck.rhat > 1.05
    assert stuck.ess < 100
    slow = torch.cumsum(normals(4000, 1), 0)  # a random walk
    assert summarise(["walk"], slow, chains=2)[0].ess < 50


def test_constant_and_infinite_columns():
    values = torch.stack([torch.full((50,), 2.0), torch.arange(50.0)], 1).double()
    values[7, 1] = math.inf
    constant, infinite = summarise(["c", "i"], values)
    assert (constant.mean, constant.sd, constant.q5) == (2, 0, 2)
    assert infinite.mean == math.inf
    assert math.isnan(infinite.sd)
    weighted = summarise(["c"], values[:, :1], torch.randn(50, generator=generator(), dtype=torch.float64))[0]
    assert weighted.sd == pytest.approx(0, abs=1e-12)


def test_bad_shapes_are_one_clear_line():
    with pytest.raises(InputError, match="2 names"):
        summarise(["a", "b"], normals(10))
    with pytest.raises(InputError, match="3 chains"):
        summarise("abc", normals(10), chains=3)
    with pytest.raises(InputError, match="no draws"):
        summarise("abc", normals(0))

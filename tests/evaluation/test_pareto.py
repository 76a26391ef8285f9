import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_cli.errors import RunError
from hsivi_cli.evaluation.pareto import fit_generalised_pareto, resample, smooth_weights, tail_shape


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pareto_log_weights(shape, n=20_000, seed=0):
    """Logs of generalised Pareto draws by inverting the distribution function."""
    uniform = torch.rand(n, generator=generator(seed), dtype=torch.float64)
    return (((1 - uniform) ** -shape - 1) / shape).log()


def psis_of_arviz(log_weight):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        smoothed, khat = arviz.psislw(log_weight.numpy())
    return torch.from_numpy(smoothed), float(khat)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_known_tails(shape):
    found = np.array([smooth_weights(pareto_log_weights(shape, seed=seed)).khat for seed in range(20)])
    # 424 weights in the tail: k-hat has a standard deviation of about (1 + k) / sqrt(424), its mean of a 20th of that
    assert abs(found.mean() - shape) < 4 * (1 + shape) / math.sqrt(424 * 20)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("n", [30, 400, 4000])
def test_the_same_as_arviz(scale, n):
    log_weight = scale * torch.randn(n, generator=generator(n), dtype=torch.float64)
    ours = smooth_weights(log_weight)
    theirs, khat = psis_of_arviz(log_weight)
    torch.testing.assert_close(ours.log_weight, theirs, rtol=0, atol=1e-10)
    assert ours.khat == pytest.approx(khat, abs=1e-10)


@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_shift_moves_log_z_and_elbo_and_nothing_else(shift, seed):
    log_weight = torch.randn(500, generator=generator(seed), dtype=torch.float64)
    plain, shifted = smooth_weights(log_weight), smooth_weights(log_weight + shift)
    torch.testing.assert_close(plain.log_weight, shifted.log_weight, rtol=0, atol=1e-8)
    assert shifted.khat == pytest.approx(plain.khat, abs=1e-7)
    assert shifted.ess == pytest.approx(plain.ess, rel=1e-8)
    assert shifted.log_z == pytest.approx(plain.log_z + shift, abs=1e-8)
    assert shifted.elbo == pytest.approx(plain.elbo + shift, abs=1e-8)
    assert shifted.log_z_se == pytest.approx(plain.log_z_se, abs=1e-8)


def test_weights_sum_to_one_keep_their_order_and_never_pass_the_largest():
    log_weight = pareto_log_weights(0.8, 2000)
    found = smooth_weights(log_weight).log_weight
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)
    order = log_weight.argsort()
    assert bool((found[order].diff() >= -1e-12).all())
    body = order[:1500]  # what is not smoothed keeps its ratios
    torch.testing.assert_close(found[body].diff(), log_weight[body].diff(), rtol=0, atol=1e-10)


def test_smoothing_lowers_the_error_of_heavy_tails():
    # E[x] under N(0,1) by weights from N(0, 0.6^2), for which the raw weights have no variance
    raw, smooth = [], []
    for seed in range(200):
        x = 0.6 * torch.randn(1000, generator=generator(seed), dtype=torch.float64)
        log_weight = -0.5 * x**2 + 0.5 * (x / 0.6) ** 2
        raw.append(float((log_weight.softmax(0) * x**2).sum()) - 1)
        smooth.append(float((smooth_weights(log_weight).log_weight.exp() * x**2).sum()) - 1)
    assert np.mean(np.square(smooth)) < 0.9 * np.mean(np.square(raw))


def test_log_z_is_covered_by_its_standard_error():
    # w = exp(s e - s^2/2) has Z = 1 and ELBO -s^2/2
    s, hits, elbo_hits = 0.5, 0, 0
    for seed in range(200):
        log_weight = s * torch.randn(500, generator=generator(seed), dtype=torch.float64) - s**2 / 2
        found = smooth_weights(log_weight)
        hits += abs(found.log_z) < 1.96 * found.log_z_se
        elbo_hits += abs(found.elbo + s**2 / 2) < 1.96 * found.elbo_se
    assert 176 <= hits <= 200  # 190 +- 4.5 s.e. of 3.1
    assert 176 <= elbo_hits <= 200


def test_constant_weights_need_no_correction():
    for noise in (0.0, 1e-13):
        log_weight = 7 + noise * torch.randn(1000, generator=generator(), dtype=torch.float64)
        found = smooth_weights(log_weight)
        assert found.khat == 0
        assert found.ess == pytest.approx(1000)
        assert found.log_z == pytest.approx(7)
        assert found.log_z_se < 1e-12


def test_zero_weights_are_draws_that_do_not_count():
    log_weight = torch.zeros(1000, dtype=torch.float64)
    log_weight[:400] = -math.inf  # a truncated target: weights 0 or 1, bounded
    found = smooth_weights(log_weight)
    assert found.khat == 0
    assert found.ess == pytest.approx(600)
    assert found.log_z == pytest.approx(math.log(0.6))
    assert found.log_z_se == pytest.approx(math.sqrt(0.24 / 999) / 0.6, rel=1e-3)
    assert found.elbo == -math.inf
    assert found.non_finite == 0


def test_not_a_number_is_zero_and_counted():
    log_weight = torch.randn(1000, generator=generator(), dtype=torch.float64)
    log_weight[3], log_weight[5] = math.nan, math.inf
    found = smooth_weights(log_weight)
    assert found.non_finite == 2
    assert bool((found.log_weight[[3, 5]] == -math.inf).all())
    assert math.isfinite(found.log_z)


def test_one_huge_weight_few_draws_and_few_that_count_are_infinite_khat():
    lone = torch.zeros(1000, dtype=torch.float64)
    lone[0] = 50.0
    assert smooth_weights(lone).khat == math.inf
    assert smooth_weights(lone).ess == pytest.approx(1)
    assert smooth_weights(torch.randn(24, generator=generator(), dtype=torch.float64)).khat == math.inf
    few = torch.full((1000,), -math.inf, dtype=torch.float64)
    few[:3] = 0.0
    assert smooth_weights(few).khat == math.inf
    assert smooth_weights(torch.zeros(1, dtype=torch.float64)).ess == 1


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_no_weight_at_all_is_one_clear_line(value):
    with pytest.raises(RunError, match="no draw lies where the target has mass"):
        smooth_weights(torch.full((100,), value, dtype=torch.float64))
    with pytest.raises(RunError, match="nothing can be resampled"):
        resample(torch.full((100,), value, dtype=torch.float64), 10, generator())


def test_a_function_can_have_a_heavier_tail_than_the_weights():
    log_weight = pareto_log_weights(0.3)
    heavier = log_weight + pareto_log_weights(0.8, seed=1)
    assert tail_shape(heavier) > tail_shape(log_weight) + 0.2


def test_generalised_pareto_scale_is_equivariant():
    excess = pareto_log_weights(0.4, 500).exp().sort().values
    shape, scale = fit_generalised_pareto(excess)
    shape_scaled, scale_scaled = fit_generalised_pareto(1e6 * excess)
    assert shape_scaled == pytest.approx(shape, abs=1e-9)
    assert scale_scaled == pytest.approx(1e6 * scale, rel=1e-9)


@pytest.mark.parametrize("systematic", [True, False])
def test_resampling_takes_each_draw_as_often_as_its_weight_says(systematic):
    log_weight = torch.randn(50, generator=generator(1), dtype=torch.float64)
    weight = log_weight.softmax(0)
    index = resample(log_weight + 123.0, 10_000, generator(), systematic)
    counts = torch.bincount(index, minlength=50)
    assert int(counts.sum()) == 10_000
    slack = 1 if systematic else 2
    assert float((counts - 10_000 * weight).abs().max()) < slack


def test_resampling_is_in_random_order_and_skips_zero_weights():
    log_weight = torch.zeros(100, dtype=torch.float64)
    log_weight[[0, 50, 99]] = -math.inf
    index = resample(log_weight, 1000, generator())
    assert not {0, 50, 99} & set(index.tolist())
    rank = index.double()
    lag = float(torch.corrcoef(torch.stack([rank[1:], rank[:-1]]))[0, 1])
    assert abs(lag) < 4 / math.sqrt(1000)
    assert torch.equal(index, resample(log_weight, 1000, generator()))


def test_rounding_at_the_very_end_never_takes_a_draw_of_no_weight(monkeypatch):
    log_weight = torch.zeros(100, dtype=torch.float64)
    log_weight[97:] = -math.inf
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(*size, dtype=torch.float64))
    assert int(resample(log_weight, 7, generator()).max()) == 96


def test_weights_of_which_none_stands_out_have_no_tail():
    heavy = torch.distributions.StudentT(torch.tensor(2.0, dtype=torch.float64))
    torch.manual_seed(0)
    tail = heavy.sample((2000,)).abs()
    even = smooth_weights((1 + 0.01 * tail).clamp_max(1.9).log())  # the shape of its tail is a t's, its size nothing
    assert (even.khat, even.ess > 1990) == (0.0, True)
    assert smooth_weights((1 + tail).log()).khat > 0.3

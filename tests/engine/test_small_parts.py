"""Seeds, learning rates, averages and the diagnosis."""

import math

import numpy as np
import pytest
import torch

from hsivi_cli.engine.checkpoint import pack
from hsivi_cli.engine.diagnosis import diagnose
from hsivi_cli.engine.optimisation import LearningRate, apply_update, update_ema
from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator


def test_generators_differ_by_every_part_of_their_name():
    names = [(0, Stream.TRAIN, 1), (1, Stream.TRAIN, 1), (0, Stream.INIT, 1), (0, Stream.TRAIN, 2), (0, Stream.TRAIN)]
    first = [float(torch.rand((), generator=generator(*name))) for name in names]
    assert len(set(first)) == len(first)
    assert first[0] == float(torch.rand((), generator=generator(0, Stream.TRAIN, 1)))


def test_noise_streams_do_not_depend_on_the_batch():
    whole = NoiseStreams(5, range(6))
    parts = [NoiseStreams(5, range(i, i + 2)) for i in (0, 2, 4)]
    for _ in range(3):
        assert torch.equal(whole.draw((2, 3)), torch.cat([part.draw((2, 3)) for part in parts]))


def test_noise_is_standard_normal_and_streams_are_independent():
    noise = NoiseStreams(0, range(200)).draw((500,)).double()
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    correlation = np.corrcoef(noise.numpy())[np.triu_indices(200, 1)]
    assert abs(correlation).max() < 6 / 500**0.5
    assert not torch.equal(noise[:1], NoiseStreams(1, [0]).draw((500,)).double())


def test_learning_rates():
    cosine = LearningRate(1.0, 10, "cosine")
    assert cosine.at(1, 100) < 0.11
    assert cosine.at(50, 100) == pytest.approx(0.5)
    assert cosine.at(100, 100) == pytest.approx(0.0, abs=1e-12)
    assert LearningRate(1.0, 1, "exponential").at(6000, 10000) == pytest.approx(0.81)
    assert LearningRate(1.0, 1, "constant").at(6000, 10000) == 1.0


def test_ema_of_a_constant_is_the_constant_and_starts_fast():
    average = torch.zeros(1)
    for step in range(1, 200):
        update_ema([average], [torch.ones(1)], step, 0.99)
    assert average.item() > 0.8
    for step in range(200, 3000):
        update_ema([average], [torch.ones(1)], step, 0.99)
    assert average.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("step", "moved"), [(1, 9 / 11), (8, 1 / 2), (10_000, 0.01)])
def test_how_far_an_ema_moves_in_a_step(step, moved):
    average = torch.zeros(1, dtype=torch.float64)
    update_ema([average], [torch.ones(1, dtype=torch.float64)], step, 0.99)
    assert average.item() == pytest.approx(moved, rel=1e-12)


def apply_loss(loss, optimiser, parameters, clip=1.0):
    return apply_update(lambda part: (loss, {}), [(slice(0, 1), 1.0)], optimiser, parameters, 0.1, clip)


def test_clipping_bounds_the_step():
    w = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([w], lr=1.0)
    update = apply_loss((w * torch.tensor([30.0, 40.0])).sum(), optimiser, [w])
    assert update.norm == pytest.approx(50.0)
    assert update.stepped
    assert w.detach().norm().item() == pytest.approx(0.1, rel=1e-4)


def losses_that_are_not_finite():
    yield lambda w: (w * float("nan")).sum()
    yield lambda w: w.sum() / 0  # infinite, and its gradient with it
    yield lambda w: w.sum() + float("inf")  # infinite, with a gradient that is finite
    yield lambda w: w.sqrt().sum()  # finite, with a gradient that is not


@pytest.mark.parametrize("loss", losses_that_are_not_finite())
def test_a_step_that_is_not_finite_touches_nothing(loss):
    w = torch.nn.Parameter(torch.zeros(2))
    v = torch.nn.Parameter(torch.ones(3))  # another parameter, whose own gradient is finite
    optimiser = torch.optim.Adam([w, v], amsgrad=True)
    apply_loss(w.sum() + v.sum(), optimiser, [w, v])
    with torch.no_grad():
        w.zero_()
    before, _ = pack([w, v, optimiser.state_dict()])
    update = apply_loss(loss(w) + v.sum(), optimiser, [w, v])
    assert not update.stepped
    assert not math.isfinite(update.norm)
    after, _ = pack([w, v, optimiser.state_dict()])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert apply_loss(w.sum() + v.sum(), optimiser, [w, v]).stepped
    assert not torch.equal(w, before["/0"])


def judge(mismatch, error):
    """A noisy critic: claim = mismatch + error, Fisher value = mismatch - error."""
    pairs = list(zip(mismatch, error, strict=True))
    return diagnose([m - e for m, e in pairs], [m + e for m, e in pairs])


def judge_lag(mismatch, a):
    """A critic that sees only the share `a` of the true gap."""
    return diagnose([(2 * a - a**2) * m for m in mismatch], [a**2 * m for m in mismatch])


def test_diagnosis_tells_the_two_failures_apart():
    steady = judge([2.0] * 30, [0.5] * 30)
    assert (steady.mismatch, steady.critic_error) == pytest.approx((2.0, 0.5))
    assert steady.advice == "healthy"
    assert judge([2.0] * 5, [2.0] * 5).advice == "too early to tell"
    assert "critic not tracking" in judge([1.0] * 40, [1.0] * 20 + [5.0] * 20).advice
    assert "student diverging" in judge([1.0] * 20 + [5.0] * 20, [1.0] * 40).advice
    assert "student diverging" in judge([0.0] * 15 + [100.0] * 30, [0.1] * 45).advice
    assert judge([1.0 / (i + 1) for i in range(40)], [1.0] * 40).advice == "healthy"  # noise outlasts the mismatch


@pytest.mark.parametrize("a", [0.0, 0.2, 0.5])
def test_a_lagging_critic_is_not_taken_for_a_diverging_student(a):
    growing = [1.1**i for i in range(50)]
    assert "critic not tracking" in judge_lag(growing, a).advice
    assert "student diverging" in judge_lag(growing, 0.95).advice


def test_diagnosis_on_a_linear_gaussian_problem():
    # target = f* + noise; a critic with a known independent error: both averages are recovered
    draws = torch.Generator().manual_seed(0)
    gap, error, noise = (torch.randn(400_000, generator=draws).double() * s for s in (0.5, 0.3, 2.0))
    claimed = gap + error
    fisher = (2 * claimed * (gap + noise) - claimed**2).mean().item()
    found = diagnose([fisher], [(claimed**2).mean().item()])
    assert found.mismatch == pytest.approx(0.25, abs=0.01)
    assert found.critic_error == pytest.approx(0.09, abs=0.01)

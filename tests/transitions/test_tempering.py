"""Tempering: effective sizes, temperatures, unbiased resampling and an unbiased evidence."""

import math

import pytest
import torch

from hsivi_cli.transitions.hmc import Trajectory, hmc_move, start_chains
from hsivi_cli.transitions.tempering import (
    GeometricPath,
    bridge_sampling,
    effective_sample_size,
    log_mean_exp,
    multinomial_resample,
    next_temperature,
    next_temperatures,
    stratified_resample,
    systematic_resample,
)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_sample_size_bounds_and_invariance():
    weights = 3 * normals(50)
    ess = float(effective_sample_size(weights))
    assert 1 < ess < 50
    share = weights.softmax(0)
    assert abs(ess - 1 / float((share**2).sum())) < 1e-9
    assert abs(float(effective_sample_size(weights - 900)) - ess) < 1e-9
    assert abs(float(effective_sample_size(torch.zeros(7, dtype=torch.float64))) - 7) < 1e-12
    assert float(effective_sample_size(torch.full((7,), -torch.inf, dtype=torch.float64))) == 0
    torch.testing.assert_close(
        effective_sample_size(torch.stack([weights, 0 * weights]))[0], torch.tensor(ess).double()
    )


@pytest.mark.parametrize("spread", [0.1, 3.0, 1e3, 1e9])
@pytest.mark.parametrize("t", [0.0, 0.37])
def test_next_temperature_keeps_the_share(spread, t):
    log_ratio = spread * normals(2000)
    log_ratio[:5] = -torch.inf
    to = next_temperature(log_ratio, t, 0.5)
    assert t < to <= 1
    if spread == 0.1:
        assert to == 1.0
        return
    kept = float(effective_sample_size((to - t) * log_ratio)) / 1995  # five die at any step
    assert 0.5 <= kept < 0.5011


def test_next_temperature_counts_the_weights_carried():
    log_ratio, carried = 3 * normals(2000), normals(2000, seed=1)
    to = next_temperature(log_ratio, 0.0, 0.5, carried)
    kept = float(effective_sample_size(carried + to * log_ratio) / effective_sample_size(carried))
    assert abs(kept - 0.5) < 0.01
    assert to != next_temperature(log_ratio, 0.0, 0.5)


def test_systematic_resampling_copies_each_floor_or_ceil_times_and_on_average_right():
    log_weight = 2 * normals(3, 40)
    expected = 40 * log_weight.softmax(1)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # an exact average over the uniform
    total = torch.zeros_like(expected)
    for u in uniforms:
        rows = systematic_resample(log_weight, u.expand(3))
        counts = torch.stack([row.bincount(minlength=40) for row in rows]).double()
        assert bool((counts >= expected.floor() - 1e-9).all())
        assert bool((counts <= expected.ceil() + 1e-9).all())
        total += counts
    torch.testing.assert_close(total / 4000, expected, rtol=0, atol=2e-3)


def test_systematic_resampling_never_picks_a_weight_of_zero():
    log_weight = torch.tensor([-torch.inf, 0.0, -torch.inf, -1.0, -torch.inf], dtype=torch.float64)
    for u in (0.0, 0.5, 1 - 1e-16):
        assert set(systematic_resample(log_weight, torch.tensor(u, dtype=torch.float64), 9).tolist()) == {1, 3}


def toy_path():
    """From N(0, 1) to 1.3 + log N(1, 0.5): log Z = 1.3."""

    def log_target(z):
        return 1.3 - 0.5 * ((z[:, 0] - 1) / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)

    def log_base(z):
        return -0.5 * z[:, 0] ** 2 - 0.5 * math.log(2 * math.pi)

    return GeometricPath(log_base, log_target, lambda z: -z, lambda z: -(z - 1) / 0.25)


def evidence(runs, moves, forget_a_weight=False):
    """Z_hat of many runs of 8 particles at once; islands are the runs."""
    path, n = toy_path(), 8
    generator = torch.Generator().manual_seed(4)
    z, log_z, t = normals(runs * n, 1, seed=9), torch.zeros(runs, dtype=torch.float64), 0.0
    for to in (0.2, 0.5, 1.0):
        log_weight = ((to - t) * path.log_ratio(z)).reshape(runs, n)
        if not (forget_a_weight and to == 0.5):
            log_z += log_mean_exp(log_weight)
        rows = systematic_resample(log_weight, torch.rand(runs, generator=generator, dtype=torch.float64))
        chains = start_chains(z, path.log_prob(to), path.gradient(to)).take(
            (rows + n * torch.arange(runs)[:, None]).flatten()
        )
        for _ in range(moves):
            trajectory = Trajectory(0.6, 2)
            chains = hmc_move(chains, path.log_prob(to), path.gradient(to), trajectory, generator).chains
        z, t = chains.z, to
    return log_z.exp()


@pytest.mark.parametrize("moves", [0, 1])
def test_the_evidence_is_unbiased_with_a_few_particles(moves):
    z_hat = evidence(20_000, moves)
    error = float(z_hat.mean()) - math.exp(1.3)
    assert abs(error) < 4 * float(z_hat.std()) / math.sqrt(20_000)
    assert float(z_hat.std()) > 0.3  # the runs do differ: what is unbiased is Z, not log Z
    assert float(z_hat.log().mean()) < 1.3 - 5 * float(z_hat.log().std()) / math.sqrt(20_000)


def test_a_forgotten_weight_is_noticed():
    z_hat = evidence(20_000, 1, forget_a_weight=True)
    assert abs(float(z_hat.mean()) - math.exp(1.3)) > 10 * float(z_hat.std()) / math.sqrt(20_000)


def test_the_path_joins_its_ends():
    path, z = toy_path(), normals(6, 1).requires_grad_(True)
    torch.testing.assert_close(path.log_prob(0.0)(z), path.log_base(z))
    torch.testing.assert_close(path.log_prob(1.0)(z), path.log_target(z))
    (slope,) = torch.autograd.grad(path.log_prob(0.3)(z).sum(), z)
    torch.testing.assert_close(path.gradient(0.3)(z), slope)


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_bridge_sampling_finds_the_evidence_and_its_own_error(sd):
    errors, claimed = [], []
    for seed in range(60):
        p, q = 1 + 0.5 * normals(400, 1, seed=2 * seed), sd * normals(300, 1, seed=2 * seed + 1)

        def ratio(z):
            base = -0.5 * (z[:, 0] / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)
            return toy_path().log_target(z) - base

        found = bridge_sampling(ratio(p), ratio(q))
        errors.append(found.log_z - 1.3)
        claimed.append(found.log_z_se)
    errors, claimed = torch.tensor(errors), torch.tensor(claimed)
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(60)
    assert 0.7 < float(claimed.mean() / errors.std()) < 1.4


def test_temperatures_of_many_samplers_are_those_of_each():
    log_ratio = torch.tensor([0.1, 3.0, 50.0, 1e6, 3.0, 1.0]).double()[:, None] * normals(6, 400)
    log_ratio[4, :390] = -torch.inf  # ten alive
    log_ratio[5] = -torch.inf
    t = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.0, 0.3], dtype=torch.float64)
    carried = 0.3 * normals(6, 400, seed=1)
    found = next_temperatures(log_ratio, t, 0.5, carried)
    alone = [next_temperature(log_ratio[i], float(t[i]), 0.5, carried[i]) for i in range(6)]
    assert found.tolist() == alone
    assert found[0] == 1
    assert found[5] == 1
    alive = carried[4].where(log_ratio[4] > -torch.inf, -torch.inf)
    kept = effective_sample_size(alive + (found[4] - t[4]) * log_ratio[4]) / effective_sample_size(alive)
    assert 0.5 <= float(kept) < 0.502


@pytest.mark.parametrize(("resample", "within"), [(stratified_resample, 1.0), (multinomial_resample, math.inf)])
def test_other_resampling_is_right_on_average(resample, within):
    log_weight = 2 * normals(2, 20)
    log_weight[:, 7] = -torch.inf
    expected = 20 * log_weight.softmax(1)
    uniform = torch.rand(8000, 2, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = resample(log_weight.expand(8000, 2, 20), uniform)
    counts = torch.nn.functional.one_hot(rows, 20).sum(2).double()
    assert float((counts - expected).abs().max()) <= 1 + within
    assert float(counts[..., 7].max()) == 0
    error = (counts.mean(0) - expected) / (counts.std(0) / math.sqrt(8000)).clamp_min(1e-3)
    assert float(error.abs().max()) < 4.5

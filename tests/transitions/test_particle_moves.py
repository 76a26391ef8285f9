"""Moves of clouds: they leave their targets invariant, cloud by cloud, and noise is each sampler's own."""

import math

import pytest
import torch

from hsivi_cli.transitions.particle_moves import (
    Moves,
    SamplerNoise,
    covariance_of,
    evaluate,
    factor_of,
    given_observations,
    move_clouds,
    tempered,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def target(x):
    """z ~ N(0, 1), x | z ~ N(z, 1)."""
    return given_observations(
        1,
        lambda n, g: torch.randn(n, 1, generator=g, dtype=torch.float64),
        lambda z: -0.5 * z.square().sum(-1),
        lambda z, x: -0.5 * (z[..., 0] - x[:, None]).square(),
        x,
    )


X = torch.tensor([0.0, 3.0], dtype=torch.float64)
TEMPERATURE = torch.tensor([1.0, 0.25], dtype=torch.float64)


def moved(kernel, temperature=TEMPERATURE, count=5, k=50_000, step=1.6):
    """Exact draws of the two tempered posteriors, N(tau x, 1) / (1 + tau), after moves; in units of their sds."""
    precision = 1 + TEMPERATURE
    mean, sd = (TEMPERATURE * X / precision)[:, None], precision.rsqrt()[:, None]
    z = (mean + sd * normals(2, k))[..., None]
    particles, equal = evaluate(target(X), z), torch.full((2, k), -math.log(k), dtype=torch.float64)
    factor = torch.full((2, 1, 1), 0.8, dtype=torch.float64)
    moves = Moves(kernel, count, 2, torch.tensor([step, 1.1 * step], dtype=torch.float64), factor, adapt=False)
    found = move_clouds(particles, equal, target(X), temperature, moves, SamplerNoise(torch.tensor([1, 2])))
    again = evaluate(target(X), found.particles.z)
    assert torch.equal(again.log_likelihood, found.particles.log_likelihood)
    assert torch.equal(again.log_prior, found.particles.log_prior)
    assert bool((found.particles.z != z).any(2).double().mean(1).gt(0.5).all())
    return (found.particles.z[..., 0] - mean) / sd, found


@pytest.mark.parametrize("kernel", ["random-walk", "mala", "hmc"])
def test_exact_draws_stay_exact(kernel):
    u, found = moved(kernel)
    assert bool(((found.acceptance > 0.3) & (found.acceptance < 0.95)).all())
    assert float(u.mean(1).abs().max()) < 4 / math.sqrt(50_000)
    assert float((u.square().mean(1) - 1).abs().max()) < 4 * math.sqrt(2 / 50_000)


@pytest.mark.parametrize("kernel", ["random-walk", "mala", "hmc"])
def test_moves_toward_another_temperature_are_noticed(kernel):
    u, _ = moved(kernel, temperature=0.9 * TEMPERATURE)
    assert float(u.square().mean(1)[0] - 1) > 4 * math.sqrt(2 / 50_000)
    assert float(u.mean(1)[1]) < -4 / math.sqrt(50_000)


def test_the_tempered_density_at_impossible_points():
    z = normals(1, 3, 1)
    particles = evaluate(target(X[:1]), z)
    particles.log_likelihood[0, :2] = -math.inf
    assert torch.equal(tempered(particles, torch.zeros(1).double()), particles.log_prior)
    assert tempered(particles, torch.full((1,), 1e-9).double())[0, :2].tolist() == [-math.inf] * 2


def test_a_broken_log_density_counts_as_impossible():
    def broken(z, x):
        return torch.where(z[..., 0] > 1, math.nan, torch.where(z[..., 0] < -1, math.inf, z[..., 0]))

    model = given_observations(1, lambda n, g: normals(n, 1), lambda z: 0 * z[..., 0], broken, X[:1])
    found = evaluate(model, torch.tensor([[[2.0], [-2.0], [0.5]]]).double())
    assert found.log_likelihood.tolist() == [[-math.inf, -math.inf, 0.5]]


def test_noise_is_each_samplers_own():
    many, few = SamplerNoise(torch.tensor([5, 6, 7])), SamplerNoise(torch.tensor([6]))
    assert torch.equal(many.normal(4, 2)[1], few.normal(4, 2)[0])
    many.take(torch.tensor([1, 2]))
    assert torch.equal(many.uniform(5)[0], few.uniform(5)[0])
    assert torch.equal(many.uniform()[:1], few.uniform())
    assert torch.equal(torch.rand(3, generator=many.generators()[0]), torch.rand(3, generator=few.generators()[0]))
    u = SamplerNoise(torch.arange(400)).uniform(50)
    assert 0 <= float(u.min()) < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * 20_000)
    assert float(torch.corrcoef(u[:2])[0, 1].abs()) < 0.5


def test_covariances_are_the_clouds_own_shrunk_a_little():
    shape = torch.tensor([[1.0, 0.0], [3.0, 0.1]], dtype=torch.float64)
    z = torch.stack([normals(4000, 2) @ shape.T, normals(4000, 2, seed=1)])
    weight = torch.stack([torch.zeros(4000), -z[1, :, 0].float()]).double().log_softmax(1)  # moves the mean to -1
    found = covariance_of(z, weight)
    torch.testing.assert_close(found[0], shape @ shape.T, rtol=0.1, atol=0.02)
    torch.testing.assert_close(found[1], torch.eye(2).double(), rtol=0.15, atol=0.15)
    factor = factor_of(found)
    torch.testing.assert_close(factor @ factor.mT, found)
    # one survivor: mostly what was before
    single = torch.full((2, 4000), -math.inf, dtype=torch.float64)
    single[:, 3] = 0.0
    z[:, 5] = math.inf  # a dead one at infinity is not heard
    torch.testing.assert_close(covariance_of(z, single, found), found * 2 / 3)
    assert bool(factor_of(torch.zeros(1, 2, 2).double()).isfinite().all())

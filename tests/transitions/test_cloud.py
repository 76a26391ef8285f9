"""A cloud forgets its start, stands still, and its islands' disagreement is seen."""

import math

import torch

from hsivi_cli.transitions.cloud import (
    agreement,
    correlation,
    drift,
    features,
    harvest,
    make_cloud,
    settle,
    shrunk_factor,
)

CORRELATED = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [-2.0, 1.0, 3.0]], dtype=torch.float64)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_prob(z):
    return -0.5 * (torch.linalg.solve_triangular(CORRELATED, z.T, upper=False) ** 2).sum(0)


def gradient(z):
    precision = torch.cholesky_inverse(CORRELATED)
    return -z @ precision


def start(z, islands=16):
    return make_cloud(z, islands, torch.Generator().manual_seed(1))


def test_a_displaced_cloud_settles_on_its_target():
    cloud = start(0.3 * normals(2000, 3) + 4)
    assert settle(cloud, log_prob, gradient, 0.1, 2000)
    assert cloud.memory < 0.1
    # the start's shape was a poor one to move in; it has been learnt on the way
    shape = torch.linalg.solve_triangular(CORRELATED, cloud.scale @ cloud.scale.T, upper=False)
    shape = torch.linalg.solve_triangular(CORRELATED, shape.T, upper=False)
    assert float((shape - torch.eye(3)).abs().max()) < 0.25
    assert 0.6 < cloud.acceptance < 0.99
    states = harvest(cloud, log_prob, gradient, 3, 0.1, 1000)
    assert len(states) == 3
    z = torch.cat([state.z for state in states])
    u = torch.linalg.solve_triangular(CORRELATED, z.T, upper=False).T
    assert float(u.mean(0).abs().max()) < 4 / math.sqrt(6000) * 1.2
    assert float((u.T.cov() - torch.eye(3)).abs().max()) < 4 * math.sqrt(2 / 6000) * 1.2
    found = agreement([features(cloud)], 16)
    assert found.r_hat < 1.02
    assert found.ess > 400


def test_two_modes_that_do_not_mix_are_remembered():
    def two(z):
        return torch.logaddexp(-0.5 * (z[:, 0] - 12) ** 2, -0.5 * (z[:, 0] + 12) ** 2)

    def slope(z):
        return torch.func.vmap(torch.func.grad(lambda z: two(z[None])[0]))(z)

    signs = torch.where(torch.arange(800) % 2 == 0, 12.0, -12.0).double()[:, None]
    cloud = start(signs + normals(800, 1))
    assert not settle(cloud, two, slope, 0.1, 500)
    assert cloud.memory > 0.8
    # each island on one side: no agreement
    cloud.chains = cloud.chains.take(cloud.chains.z[:, 0].argsort())
    assert agreement([features(cloud)], 16).r_hat > 2


def test_a_budget_is_kept_and_so_many_moves():
    cloud = start(0.01 * normals(500, 3) + 50)
    assert not settle(cloud, log_prob, gradient, 0.1, 20)
    assert 20 <= cloud.gradients < 20 + 128
    cloud = start(normals(500, 3))
    cloud.step = 1e-6
    assert not settle(cloud, log_prob, gradient, 0.1, 10_000, moves=2)
    assert cloud.moves == 2


def test_correlation_and_drift_are_those_of_independent_clouds():
    a, b = normals(5000, 4), normals(5000, 4, seed=1)
    assert correlation(a, b) < 4 / math.sqrt(5000)
    assert abs(correlation(a, 0.6 * a + 0.8 * b) - 0.6) < 0.04
    assert drift(a, b) < 4
    assert drift(a, b + torch.tensor([0, 0, 0.2, 0])) > 6


def test_agreement_counts_independent_draws():
    independent = [normals(4000, 5, seed=i) for i in range(2)]
    found = agreement(independent, 16)
    assert found.r_hat < 1.01
    assert 2000 < found.ess <= 8000
    # by hand: four islands with means 1, 2, 3, 4 and variances 2 in each
    means = torch.arange(1.0, 5.0, dtype=torch.float64)
    by_hand = agreement([(means[:, None] + torch.tensor([-1.0, 1.0])).reshape(8, 1)], 4)
    assert abs(by_hand.r_hat - math.sqrt(1 + (5 / 3) / 2)) < 1e-12
    assert abs(by_hand.ess - 4 / ((5 / 3) / 2)) < 1e-12
    duplicated = agreement([normals(200, 5).repeat_interleave(20, 0)], 16)
    assert duplicated.ess < 400
    shifted = normals(4000, 5) + torch.arange(16.0).repeat_interleave(250)[:, None] / 10
    assert agreement([shifted], 16).r_hat > 1.05


def test_the_factor_is_the_covariances_shrunk_as_far_as_noise_goes():
    z = normals(6000, 3) @ CORRELATED.T
    factor = shrunk_factor(z)
    torch.testing.assert_close(factor @ factor.T, CORRELATED @ CORRELATED.T, rtol=0.1, atol=0.1)
    few = shrunk_factor(normals(5, 40))  # fewer particles than dimensions
    assert bool((few.diagonal() > 0.5).all())
    # a cloud that is N(0, I) already keeps the identity, where its covariance has eigenvalues from 0.1 to 3
    white = normals(400, 200)
    factor = shrunk_factor(white)
    values = torch.linalg.eigvalsh(factor @ factor.T)
    assert 0.8 < float(values.min()) <= float(values.max()) < 1.2
    raw = torch.linalg.eigvalsh(white.T.cov())
    assert float(raw.min()) < 0.2
    assert float(raw.max()) > 2
    # one direction 10 times as wide is still seen there
    white[:, 0] *= 10
    assert float((shrunk_factor(white) @ shrunk_factor(white).T)[0, 0]) > 50


def test_the_clouds_unit_changes_coordinates_and_nothing_else():
    unit = torch.tensor([[100.0, 0.0], [3.0, 0.01]], dtype=torch.float64)
    clouds = []
    for factor in (None, unit):
        matrix = torch.eye(2, dtype=torch.float64) if factor is None else factor
        inverse = matrix.inverse()
        cloud = make_cloud(normals(300, 2) @ matrix.T, 4, torch.Generator().manual_seed(0), factor)
        heights = lambda z, inverse=inverse: -((z @ inverse.T) ** 4).sum(1)  # noqa: E731
        slopes = lambda z, inverse=inverse: -4 * (z @ inverse.T) ** 3 @ inverse  # noqa: E731
        moves = []
        cloud.on_move = lambda cloud, moves=moves: moves.append(cloud.moves)
        settle(cloud, heights, slopes, 0.2, 200)
        assert moves == list(range(1, cloud.moves + 1))
        clouds.append(cloud.chains.z @ inverse.T)
    torch.testing.assert_close(clouds[0], clouds[1], rtol=1e-6, atol=1e-6)


def test_one_feature_on_which_islands_disagree_is_not_averaged_away():
    features_of = torch.randn(1600, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fine = agreement([features_of], 16).r_hat
    features_of[:, 7] += torch.arange(16).repeat_interleave(100) * 0.2
    assert agreement([features_of], 16).r_hat > 1 + 5 * (fine - 1)

"""Refined draws are draws of the target: banana, skewed, two modes; the evidence; what cannot be had is told."""

import math

import pytest
import torch
from scipy import stats

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.gaussian_vi import GaussianFit, fit_gaussian, gaussian_log_prob
from hsivi_cli.methods.refine import Budget, affordable_particles, evidence_of, refine, tempered_smc
from hsivi_cli.targets.density import Density, Predictive
from hsivi_cli.targets.whiten import Affine


def banana_log_prob(z):
    first = -0.5 * (z[:, 0] / 2) ** 2 - math.log(2)
    return first - 0.5 * ((z[:, 1] - z[:, 0] ** 2) / 0.5) ** 2 - math.log(0.5) - math.log(2 * math.pi) - 0.8


BANANA = Density("banana", 2, banana_log_prob)  # x ~ N(0, 2), y | x ~ N(x^2, 0.5), log Z = -0.8


def skewed_log_prob(z):
    return (2 * z - z.exp()).sum(1) + 1.5  # logs of independent Gamma(2) variables, log Z = 1.5


SKEWED = Density("skewed", 3, skewed_log_prob, analytic_gradient=lambda z: 2 - z.exp())


def two_modes(z):
    right = math.log(0.3) - 0.5 * ((z - 2.5) ** 2).sum(1)
    left = math.log(0.7) - 0.5 * (((z + 2.5) / 0.5) ** 2).sum(1) - z.shape[1] * math.log(0.5)
    return torch.logaddexp(right, left) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def wide(dim, sd):
    zero = torch.zeros(dim, dtype=torch.float64)
    return GaussianFit(zero, sd * torch.eye(dim, dtype=torch.float64), 0.0, 0.0, "full-rank")


def test_the_banana_from_a_gaussian_that_covers_a_fraction_of_it():
    fit = fit_gaussian(BANANA)
    found = tempered_smc(BANANA, fit, particles=2000, seed=1)
    z = found.draws.z
    assert z.shape == (2000, 2)
    assert found.converged, found
    assert stats.kstest(z[:, 0].numpy() / 2, "norm").pvalue > 1e-4
    assert stats.kstest((z[:, 1] - z[:, 0] ** 2).numpy() / 0.5, "norm").pvalue > 1e-4
    torch.testing.assert_close(found.draws.log_prob, BANANA.log_prob(z))
    assert abs(found.log_z + 0.8) < 3 * found.log_z_se
    assert found.log_z_se < 0.15
    # the fit itself is nowhere near
    plain = fit.draw(torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert stats.kstest(plain[:, 0].numpy() / 2, "norm").pvalue < 1e-4


def test_evidence_and_draws_of_a_skewed_target_with_more_draws_than_particles():
    found = tempered_smc(SKEWED, fit_gaussian(SKEWED), particles=800, seed=0, draws=3000)
    assert found.converged
    assert found.draws.z.shape == (3000, 3)
    assert len(found.draws.z.unique(dim=0)) > 2700  # moved, not copied
    for column in found.draws.z.T:
        assert stats.kstest(column.exp().numpy(), stats.gamma(2).cdf).pvalue > 1e-3
    assert abs(found.log_z - 1.5) < 3 * found.log_z_se < 0.15
    assert found.smc_log_z is not None
    assert abs(found.smc_log_z - 1.5) < 4 * found.smc_log_z_se < 0.1
    assert found.ess > 1000


def test_two_modes_are_found_where_the_gaussian_covers_them_and_the_memory_is_told():
    density = Density("two", 3, two_modes)
    found = tempered_smc(density, wide(3, 3.0), particles=4000, seed=3, budget=Budget(gradients=300))
    share = float((found.draws.z.mean(1) > 0).double().mean())
    assert abs(share - 0.3) < 0.06
    assert abs(found.smc_log_z) < 4 * found.smc_log_z_se + 0.02
    assert abs(found.log_z) < 0.2
    assert not found.converged
    assert "remember" in found.note


def test_weighted_draws_are_refined_to_the_target():
    generator = torch.Generator().manual_seed(0)
    location, scale_tril = torch.full((3,), 0.3, dtype=torch.float64), 1.3 * torch.eye(3, dtype=torch.float64)
    z = location + torch.randn(2000, 3, generator=generator, dtype=torch.float64) @ scale_tril.T
    log_prob, log_approx = SKEWED.log_prob(z), gaussian_log_prob(z, location, scale_tril)
    weighted = Draws(z, log_prob, log_prob - log_approx, log_approx)
    found = refine(SKEWED, weighted, seed=1)
    assert found.converged
    for column in found.draws.z.T:
        assert stats.kstest(column.exp().numpy(), stats.gamma(2).cdf).pvalue > 1e-3
    assert abs(found.log_z - 1.5) < 3 * found.log_z_se
    assert abs(found.smc_log_z - 1.5) < 3.5 * found.smc_log_z_se
    # draws without weights, and far away, arrive as well; they have no evidence of their own
    far = Draws(z + 3, SKEWED.log_prob(z + 3))
    moved = refine(SKEWED, far, seed=1)
    assert moved.smc_log_z is None
    assert stats.kstest(moved.draws.z[:, 0].exp().numpy(), stats.gamma(2).cdf).pvalue > 1e-3
    same = refine(SKEWED, weighted, seed=1)
    torch.testing.assert_close(same.draws.z, found.draws.z, rtol=0, atol=0)
    other = refine(SKEWED, weighted, seed=2)
    assert not torch.equal(other.draws.z, found.draws.z)


def test_without_moves_the_draws_would_be_wrong():
    z = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = refine(SKEWED, Draws(z, SKEWED.log_prob(z)), budget=Budget(gradients=0))
    assert not found.converged
    assert stats.kstest(found.draws.z[:, 0].exp().numpy(), stats.gamma(2).cdf).pvalue < 1e-6


def test_unusable_draws_are_dropped_and_too_few_refused():
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:50] = math.nan
    found = refine(SKEWED, Draws(z, SKEWED.log_prob(z)), seed=0)
    assert bool(found.draws.z.isfinite().all())
    assert found.draws.z.shape == (200, 3)
    with pytest.raises(InputError, match="32 draws"):
        refine(SKEWED, Draws(z[:20], SKEWED.log_prob(z[:20])))
    with pytest.raises(RunError, match="finite weight"):
        refine(SKEWED, Draws(z[:50].contiguous(), SKEWED.log_prob(z[:50])))
    nowhere = Density("nowhere", 2, lambda z: z[:, 0] * math.nan)
    with pytest.raises(RunError, match="finite nowhere"):
        tempered_smc(nowhere, wide(2, 1.0), 100)


def test_batches_over_particles_change_nothing():
    observed = torch.zeros(20_000, dtype=torch.float64)  # so many that few particles fit a batch
    predictive = Predictive(observed, lambda z, generator: z)
    batched = Density("skewed", 3, skewed_log_prob, analytic_gradient=SKEWED.analytic_gradient, predictive=predictive)
    a = tempered_smc(SKEWED, wide(3, 1.0), 300, seed=4)
    b = tempered_smc(batched, wide(3, 1.0), 300, seed=4)
    torch.testing.assert_close(a.draws.z, b.draws.z, rtol=1e-9, atol=1e-9)


def test_progress_is_told_move_by_move_and_only_grows():
    heard = []
    found = tempered_smc(SKEWED, wide(3, 1.0), particles=400, seed=0, draws=1500, on_progress=heard.append)
    assert len(heard) == found.moves
    assert found.particles == 400
    assert found.r_hat_noise == 2 * 16 / 400
    shares = [one.share for one in heard]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    assert heard[-1].temperature == 1.0
    assert heard[-1].gradients == found.gradients
    assert heard[-1].wanted == 1500
    assert "draws" in heard[-1].line
    moved = []
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    refined = refine(SKEWED, Draws(z, SKEWED.log_prob(z)), on_progress=moved.append)
    assert len(moved) == refined.moves
    assert all(one.temperature == 1.0 for one in moved)
    assert refined.particles == 512  # a multiple of the islands
    # nothing but hearing: the same draws without it
    silent = tempered_smc(SKEWED, wide(3, 1.0), particles=400, seed=0, draws=1500)
    torch.testing.assert_close(silent.draws.z, found.draws.z, rtol=0, atol=0)


def test_units_of_the_density_do_not_matter():
    """The cloud lives in the density's own coordinates."""
    unit = torch.tensor([1e4, 1.0, 1e-5], dtype=torch.float64)
    log_det = float(unit.log().sum())
    scaled = Density("scaled", 3, lambda z: skewed_log_prob(z / unit) - log_det)
    start = GaussianFit(torch.zeros(3, dtype=torch.float64), unit.diag(), 0.0, 0.0, "full-rank")
    a = tempered_smc(SKEWED, wide(3, 1.0), 400, seed=4)
    b = tempered_smc(scaled, start, 400, seed=4)
    torch.testing.assert_close(b.draws.z / unit, a.draws.z, rtol=1e-6, atol=1e-6)
    assert abs(a.log_z - b.log_z) < 1e-6
    assert abs(b.log_z - 1.5) < 0.2


def test_fewer_particles_where_a_gradient_is_dear():
    assert affordable_particles(SKEWED) == 4000
    large = Predictive(torch.zeros(100_000, dtype=torch.float64), lambda z, generator: z)
    assert affordable_particles(Density("large", 3, skewed_log_prob, predictive=large)) == 1000
    assert affordable_particles(Density("wide", 400, skewed_log_prob)) == 1000


def test_bridged_evidence_pairs_draws_with_their_densities_and_knows_its_error():
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.1, -0.2, 3.0]], dtype=torch.float64)
    target = torch.distributions.MultivariateNormal(torch.tensor([1.0, -2.0, 0.0]).double(), scale_tril=factor)
    density = Density("gaussian", 3, lambda z: target.log_prob(z) + 1.7)
    z = target.loc + torch.randn(4000, 3, generator=generator, dtype=torch.float64) @ factor.T
    base = Affine(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    found = evidence_of(z, density.log_prob(z), 4000.0, base, density, generator)
    assert abs(found.log_z - 1.7) < 0.005
    assert found.log_z_se < 0.003


def test_the_error_of_bridged_evidence_counts_the_effective_draws_that_are_bridged():
    generator = torch.Generator().manual_seed(0)
    base = Affine(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    heavy = torch.distributions.StudentT(torch.tensor(5.0, dtype=torch.float64))
    density = Density("student", 2, lambda z: heavy.log_prob(z).sum(1))
    z = torch.from_numpy(stats.t(5).rvs((4000, 2), random_state=0))
    once, thrice = z, torch.cat([z, z, z])  # of which as many are bridged
    same = [
        evidence_of(draws, density.log_prob(draws), float(len(draws)), base, density, generator)
        for draws in (once, thrice)
    ]
    assert abs(same[0].log_z) < 4 * same[0].log_z_se
    assert same[1].log_z_se == pytest.approx(same[0].log_z_se, rel=0.1)
    fewer = evidence_of(once, density.log_prob(once), 100.0, base, density, generator)
    assert fewer.log_z_se > 2 * same[0].log_z_se

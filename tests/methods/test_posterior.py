"""From a density to draws: conjugate answers, routes, persistence, and the ways a fit can mislead."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.pareto import smooth_weights
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods import heavy_tails, posterior_report
from hsivi_cli.methods import posterior as posterior_module
from hsivi_cli.methods.gaussian_start import find_start
from hsivi_cli.methods.gaussian_vi import GaussianFit
from hsivi_cli.methods.heavy_tails import (
    Pilot,
    best_degrees,
    contradiction,
    heavy_axis,
    infinite_variance,
    run_pilots,
    student_t_draws,
    student_t_log_prob,
)
from hsivi_cli.methods.posterior import draw_posterior, fit_posterior, restore, state_tree
from hsivi_cli.methods.posterior_registry import POSTERIOR_METHODS, FitOptions, check_options
from hsivi_cli.methods.posterior_report import report_on
from hsivi_cli.targets.density import Density

LOG_Z = 0.7


def gaussian():
    """N(m, S) times exp(LOG_Z), S far from a multiple of the identity."""
    scale = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.1, -0.2, 3.0]], dtype=torch.float64)
    mean = torch.tensor([5.0, -40.0, 0.3], dtype=torch.float64)
    target = torch.distributions.MultivariateNormal(mean, scale_tril=scale)
    return Density("gaussian", 3, lambda z: target.log_prob(z) + LOG_Z), mean, scale @ scale.T


def two_bumps(apart=5.0):
    def log_prob(z):
        bumps = [torch.distributions.Normal(sign * apart, 1.0).log_prob(z[:, 0]) for sign in (-1, 1)]
        other = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 1])
        return torch.logaddexp(*bumps) - math.log(2) + other

    return Density("two bumps", 2, log_prob)


def student():
    target = torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64))
    return Density("student", 2, lambda z: target.log_prob(z).sum(1))


def test_auto_is_exact_for_a_gaussian(tmp_path):
    density, mean, covariance = gaussian()
    fit = fit_posterior(density, FitOptions(), tmp_path)
    posterior = draw_posterior(fit, 4000, 1)
    assert (fit.method, fit.route) == ("gaussian", "weights")
    assert posterior.weights.log_z == pytest.approx(LOG_Z, abs=4 * posterior.weights.log_z_se + 1e-9)
    error = (posterior.values.mean(0) - mean) / (covariance.diagonal() / 4000).sqrt()
    assert float(error.abs().max()) < 4
    assert torch.allclose(posterior.values.T.cov(), covariance, rtol=0.12, atol=0.3)
    report = report_on(fit, posterior, None, 0)
    assert report.verdict.level == "trust"
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("method", sorted(set(POSTERIOR_METHODS) - {"smc-wake"}))  # which needs a prior
def test_every_method_runs_through_weights_and_comes_back_from_disk(method, tmp_path):
    density, _, _ = gaussian()
    extra = {"bridges": 2} if "bridges" in POSTERIOR_METHODS[method].takes else {}
    extra |= {"layers": 2} if "layers" in POSTERIOR_METHODS[method].takes else {}
    options = FitOptions(method=method, steps=4, refine="none", seed=3, **extra)
    fit = fit_posterior(density, options, tmp_path)
    assert fit.trace[-1][0] == 4
    save_checkpoint(tmp_path / "fit.safetensors", state_tree(fit))
    again = restore(density, options, load_checkpoint(tmp_path / "fit.safetensors"))
    first, second = draw_posterior(fit, 64, 5), draw_posterior(again, 64, 5)
    assert torch.equal(first.values, second.values)
    # densities are those of the user's coordinates, not of the whitened ones
    assert torch.allclose(first.log_prob, density.log_prob(first.z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["ula", "uha", "cmcd"])
def test_whitened_paths_keep_the_evidence(method, tmp_path):
    density, _, _ = gaussian()
    fit = fit_posterior(density, FitOptions(method=method, steps=2, bridges=4, refine="none"), tmp_path)
    weights = draw_posterior(fit, 4000, 0).weights
    assert weights.log_z == pytest.approx(LOG_Z, abs=5 * weights.log_z_se + 1e-6)
    assert weights.elbo <= LOG_Z + 4 * weights.elbo_se


def test_both_modes_are_found_and_tempered_between(tmp_path):
    density = two_bumps()
    fit = fit_posterior(density, FitOptions(), tmp_path)
    posterior = draw_posterior(fit, 2000, 0)
    assert fit.modes >= 2
    assert posterior.route == "smc"
    right = float((posterior.values[:, 0] > 0).double().mean())
    assert 0.35 < right < 0.65
    assert posterior.refined.log_z == pytest.approx(0.0, abs=5 * posterior.refined.log_z_se + 0.02)


def test_a_fit_that_cannot_be_corrected_is_not_trusted(tmp_path):
    density = two_bumps(apart=6.0)
    # raw coordinates, a few steps: mass on neither bump
    options = FitOptions(method="vi", paper=True, steps=3, refine="none")
    fit = fit_posterior(density, options, tmp_path)
    assert report_on(fit, draw_posterior(fit, 1000, 0), None, 0).verdict.level == "no"


@pytest.mark.parametrize("method", ["ula", "hsivi-lb", "vi"])
def test_published_protocols_run(method, tmp_path):
    extra = {"bridges": 2} if method == "ula" else {}
    options = FitOptions(method=method, paper=True, steps=400, refine="none", **extra)
    density = Density("one", 2, lambda z: -0.5 * ((z - 2) ** 2).sum(1))
    fit = fit_posterior(density, options, tmp_path)
    # stage 1 has carried q towards the target before the first step of the path: at 0 the ELBO would be about -2.2
    assert fit.trace[0][1] > -1.0 or method != "ula"
    assert bool(draw_posterior(fit, 50, 0).values.isfinite().all())


def test_draws_of_other_seeds_differ_and_of_one_seed_repeat(tmp_path):
    fit = fit_posterior(student(), FitOptions(), tmp_path)
    one, same, other = (draw_posterior(fit, 50, seed).values for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_improper_posteriors_are_refused(tmp_path):
    flat = Density("flat", 2, lambda z: -0.5 * z[:, 0] ** 2 + 0 * z[:, 1])
    with pytest.raises(InputError, match="improper"):
        fit_posterior(flat, FitOptions(), tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (FitOptions(method="nuts"), "unknown"),
        (FitOptions(method="auto", steps=5), "--steps does nothing"),
        (FitOptions(method="vi", bridges=5), "belongs to"),
        (FitOptions(method="ldvi", layers=2), "belongs to"),
        (FitOptions(method="ldvi", covariance="mean-field"), "belongs to vi"),
        (FitOptions(paper=True), "--paper"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        check_options(options)


START = GaussianFit(
    torch.tensor([1.0, -2.0], dtype=torch.float64),
    torch.tensor([[2.0, 0.0], [-0.5, 0.7]], dtype=torch.float64),
    0.0,
    0.0,
    "full-rank",
)


@pytest.mark.parametrize("degrees", [0, 4, 20])
def test_student_t_is_normalised_and_drawn_from_its_own_density(degrees):
    # draws from a wider one, weighted by this density, must give 1; a wrong constant or scale would not
    density = Density("t", 2, lambda z: student_t_log_prob(START, degrees, squares(z)))

    def squares(z):
        u = torch.linalg.solve_triangular(START.scale_tril, (z - START.location).T, upper=False).T
        return u.square().sum(1)

    own = student_t_draws(density, START, degrees, NoiseStreams(0, range(200)))
    assert torch.allclose(own.log_weight, torch.zeros(200, dtype=torch.float64), atol=1e-10)
    weights = smooth_weights(student_t_draws(density, START, 4, NoiseStreams(0, range(20000))).log_weight)
    assert weights.log_z == pytest.approx(0.0, abs=4 * weights.log_z_se + 1e-9)


def test_student_t_matches_scipy():
    from scipy.stats import multivariate_t

    z = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.linalg.solve_triangular(START.scale_tril, (z - START.location).T, upper=False).T
    shape = (START.scale_tril @ START.scale_tril.T).numpy()
    expected = multivariate_t(START.location.numpy(), shape, df=7).logpdf(z.numpy())
    found = student_t_log_prob(START, 7, u.square().sum(1))
    assert torch.allclose(found, torch.from_numpy(expected), atol=1e-12)


def test_heavy_tails_get_a_heavy_tailed_proposal(tmp_path):
    fit = fit_posterior(student(), FitOptions(), tmp_path)
    assert fit.degrees > 0 or fit.route == "smc"
    gaussian_fit = fit_posterior(gaussian()[0], FitOptions(), tmp_path)
    assert gaussian_fit.degrees == 0


def pilots(figures):
    even = torch.zeros(100, dtype=torch.float64)
    some, draws = smooth_weights(even), Draws(torch.zeros(100, 2, dtype=torch.float64), even)
    made = [Pilot(nu, draws, replace(some, khat=khat, ess=ess, log_z=log_z)) for nu, khat, ess, log_z in figures]
    return [
        *made,
        Pilot(3, draws, replace(some, khat=0.0, ess=30.0, log_z=made[0].weights.log_z, log_z_se=0.1), probe=True),
    ]


def test_best_degrees_prefers_even_weights_with_a_safe_tail():
    figures = [
        (0, 0.9, 99.0, 0.0),
        (50, 0.6, 95.0, 0.0),
        (20, 0.3, 80.0, 0.0),
        (8, 0.2, 90.0, 0.0),
        (4, 0.1, 40.0, 0.0),
    ]
    assert best_degrees(pilots(figures)).degrees == 8
    assert best_degrees(pilots([(nu, khat + 1, ess, z) for nu, khat, ess, z in figures])).degrees == 4


def test_heavier_tails_that_find_more_contradict():
    fine = [(0, 0.1, 99.0, 0.0), (4, 0.2, 60.0, 0.01)]
    assert contradiction(pilots(fine)[0], pilots(fine)) is None
    more = pilots([(0, 0.1, 99.0, 0.0), (4, 0.2, 60.0, 0.7)])
    assert contradiction(more[0], more).degrees == 4
    wild = pilots([(0, 0.1, 99.0, 0.0), (4, 2.0, 60.0, 0.0)])
    assert contradiction(wild[0], wild).degrees == 4
    # nor does a k-hat within its own error, 0.35 for a hundred draws
    unsure = pilots([(0, 0.1, 99.0, 0.0), (4, 0.9, 60.0, 0.0)])
    assert contradiction(unsure[0], unsure) is None
    # lighter tails than the chosen ones prove nothing
    assert contradiction(wild[1], wild) is None


@pytest.mark.parametrize("apart", [4.0, 7.0])
def test_a_second_mode_far_out_is_not_missed_in_silence(apart, tmp_path):
    def log_prob(z):
        here = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        there = torch.distributions.Normal(0.0, 1.0).log_prob(z - 2 * apart * torch.tensor([1.0, 0.0])).sum(1)
        return torch.logaddexp(here, there) - math.log(2)

    for seed in (0, 1):
        fit = fit_posterior(Density("far", 2, log_prob), FitOptions(seed=seed), tmp_path)
        posterior = draw_posterior(fit, 2000, seed)
        share = float((posterior.values[:, 0] > apart).double().mean())
        assert 0.3 < share < 0.7 or report_on(fit, posterior, None, seed).verdict.level != "trust"


def skewed():
    """Three independent log-gammas, whose means are digamma(2)."""
    return Density("skewed", 3, lambda z: (2 * z - z.exp()).sum(1))


def test_resampled_draws_follow_the_weights_and_their_error_is_honest(tmp_path):
    fit = fit_posterior(skewed(), FitOptions(refine="none"), tmp_path)
    fit.degrees, fit.route = 4, "weights"
    truth = float(torch.digamma(torch.tensor(2.0, dtype=torch.float64)))
    z_scores = []
    for seed in range(12):
        posterior = draw_posterior(fit, 800, seed)
        report = report_on(fit, posterior, None, seed)
        z_scores += [(row.mean - truth) / row.mcse for row in report.summary]
        assert float(posterior.values.mean()) == pytest.approx(truth, abs=0.12)
        assert all(row.khat is not None and row.ess <= len(posterior.weighted) for row in report.summary)
    rms = (sum(z * z for z in z_scores) / len(z_scores)) ** 0.5
    assert 0.7 < rms < 1.4


def test_log_approx_is_the_density_of_the_approximation_in_the_users_coordinates(tmp_path):
    density, mean, covariance = gaussian()
    fit = fit_posterior(density, FitOptions(), tmp_path)
    posterior = draw_posterior(fit, 100, 0)
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(posterior.z)
    assert torch.allclose(posterior.log_approx, exact, atol=0.05)
    hsivi = fit_posterior(density, FitOptions(method="hsivi-lb", steps=30, layers=1, refine="none"), tmp_path / "h")
    raw = draw_posterior(hsivi, 4000, 0)
    # the mean of p / q under q is Z whatever the coordinates; a wrong log det of the whitening would multiply it
    assert raw.weights.log_z == pytest.approx(LOG_Z, abs=0.5)
    assert torch.allclose(raw.log_prob, density.log_prob(raw.z), atol=1e-9)


def test_pilots_and_draws_share_no_random_numbers(tmp_path):
    fit = fit_posterior(student(), FitOptions(refine="none", seed=4), tmp_path)
    seen = []
    run = posterior_module.NoiseStreams

    def spy(seed, indices):
        seen.append(seed)
        return run(seed, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior_module, "NoiseStreams", spy)
        patch.setattr(heavy_tails, "NoiseStreams", spy)
        fit_posterior(student(), FitOptions(refine="none", seed=4), tmp_path)
        pilot_seeds, seen = set(seen), []
        draw_posterior(fit, 100, 4)
    assert pilot_seeds
    assert not pilot_seeds & set(seen)


def test_a_stuck_refinement_is_not_trusted(tmp_path):
    fit = fit_posterior(two_bumps(), FitOptions(), tmp_path)
    posterior = draw_posterior(fit, 1000, 0)
    fit.modes = 1
    stuck = replace(posterior, refined=replace(posterior.refined, memory=0.6))
    assert report_on(fit, stuck, None, 0).verdict.level == "no"
    apart = replace(posterior, refined=replace(posterior.refined, r_hat=1.3))
    assert report_on(fit, apart, None, 0).verdict.level == "no"


def test_few_tempered_draws_claim_no_more_than_they_are(tmp_path):
    fit = fit_posterior(two_bumps(), FitOptions(), tmp_path)
    posterior = draw_posterior(fit, 10, 0)
    assert posterior.ess <= 10
    assert report_on(fit, posterior, None, 0).verdict.level != "trust"


def spiked(dim=5, narrow=0.01):
    """Half of the mass in a needle at the mode, half around it: true sds of 0.7, log Z of 0."""

    def log_prob(z):
        distance = z.square().sum(1)
        wide = -0.5 * distance
        needle = -0.5 * distance / narrow**2 - dim * math.log(narrow)
        return torch.logaddexp(wide, needle) - math.log(2) - 0.5 * dim * math.log(2 * math.pi)

    return Density("spiked", dim, log_prob)


@pytest.mark.parametrize("method", ["auto", "vi", "ula"])
def test_mass_that_pilots_found_and_draws_lack_is_never_trusted(method, tmp_path):
    steps = None if method == "auto" else 30
    fit = fit_posterior(spiked(), FitOptions(method=method, steps=steps), tmp_path)
    assert fit.least_log_z == pytest.approx(0.0, abs=1.0)
    posterior = draw_posterior(fit, 2000, 0)
    report = report_on(fit, posterior, None, 0)
    wrong = abs(float(posterior.values.std(0).mean()) / 0.5**0.5 - 1) > 0.1
    assert not (wrong and report.verdict.level == "trust"), report.verdict.line
    # and where the draws lack nothing, nothing is said
    complete = fit_posterior(gaussian()[0], FitOptions(method=method, steps=steps), tmp_path)
    assert "missing" not in report_on(complete, draw_posterior(complete, 2000, 0), None, 0).verdict.line


@pytest.mark.parametrize(("nu", "heavy"), [(1.5, True), (4.0, False)])
def test_one_heavy_coordinate_among_many_light_ones_is_seen(nu, heavy):
    def log_prob(z):
        return (
            -0.5 * (nu + 1) * (z[:, 3].square() / nu).log1p()
            - 0.5 * z[:, :3].square().sum(1)
            - z[:, 4:].square().sum(1)
        )

    density = Density("mixed", 20, log_prob)
    assert heavy_axis(density, find_start(density, 0)[0]) == heavy


@pytest.mark.parametrize(("khat", "level"), [(0.6, "trust"), (0.85, "care")])
def test_a_mean_that_rests_on_few_draws_lowers_the_verdict(tmp_path, monkeypatch, khat, level):
    summarise = posterior_report.summarise

    def uneven(*given, **named):
        return [replace(row, khat=khat) if row.name == "z[2]" else row for row in summarise(*given, **named)]

    monkeypatch.setattr(posterior_report, "summarise", uneven)
    fit = fit_posterior(gaussian()[0], FitOptions(), tmp_path)
    verdict = report_on(fit, draw_posterior(fit, 2000, 0), None, 0).verdict
    assert (verdict.level, "z[2]" in verdict.line) == (level, level == "care")


@pytest.mark.parametrize("dim", [2, 10, 40])
@pytest.mark.parametrize(("nu", "heavy"), [(1.5, True), (5.0, False), (1e6, False)])
def test_infinite_variance_is_told_from_many_dimensions(dim, nu, heavy):
    density = Density("t", dim, lambda z: -0.5 * (nu + dim) * (z.square().sum(1) / nu).log1p())
    start, _ = find_start(density, 0)
    seeds = iter(range(100))
    found = run_pilots(density, start, lambda: NoiseStreams(next(seeds), range(2000)))
    assert infinite_variance(found) == heavy


def test_infinite_variance_lowers_the_verdict(tmp_path):
    cauchy = Density("cauchy", 1, lambda z: -(1 + z[:, 0] ** 2).log() - math.log(math.pi))
    fit = fit_posterior(cauchy, FitOptions(), tmp_path)
    assert report_on(fit, draw_posterior(fit, 4000, 0), None, 0).verdict.level != "trust"

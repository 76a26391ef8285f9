"""Gaussian VI: exact on Gaussians in closed form, never above log Z, and the contract of every method."""

import math

import pytest
import torch

from hsivi_cli.engine.checkpoint import pack, unpack
from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import gaussian_vi
from hsivi_cli.methods.gaussian_vi import Config, fit_gaussian, gaussian_log_prob, moment_matched_normals
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.whiten import Affine

LOG_Z = 2.3


def gaussian(dim=4, units=2.0):
    root = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = torch.logspace(-units, units, dim, dtype=torch.float64)
    covariance = (root @ root.T + 0.5 * torch.eye(dim, dtype=torch.float64)) * scales[:, None] * scales
    location = 5 * scales * torch.randn(dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(location, covariance)
    return Density("gaussian", dim, lambda z: law.log_prob(z) + LOG_Z), location, covariance


def skewed():
    # log of a Gamma(2.5) variable, and a standard normal whose mean follows it
    shape = 2.5

    def log_prob(z):
        first = shape * z[:, 0] - z[:, 0].exp() - math.lgamma(shape)
        return first - 0.5 * (z[:, 1] - z[:, 0]) ** 2 - 0.5 * math.log(2 * math.pi)

    return Density("skewed", 2, log_prob)


def mean_field_optimum(covariance):
    """Sds of the best mean-field Gaussian, `1 / sqrt(precision_ii)`, and its ELBO's distance from log Z."""
    precision = covariance.inverse()
    sds = precision.diagonal().rsqrt()
    return sds, -0.5 * float(covariance.logdet()) + float(sds.log().sum())


def relative(found, expected, unit):
    return float(((found - expected) / unit).abs().max())


def test_full_rank_is_exact_on_a_gaussian():
    density, location, covariance = gaussian()
    fit = fit_gaussian(density)
    sd = covariance.diagonal().sqrt()
    assert relative(fit.location, location, sd) < 1e-4
    assert relative(fit.scale_tril @ fit.scale_tril.T, covariance, sd * sd[:, None]) < 1e-3
    assert abs(fit.elbo - LOG_Z) < 1e-6


def test_mean_field_has_the_precisions_diagonal():
    density, location, covariance = gaussian()
    fit = fit_gaussian(density, "mean-field")
    sds, gap = mean_field_optimum(covariance)
    assert relative(fit.location, location, covariance.diagonal().sqrt()) < 1e-3
    torch.testing.assert_close(fit.scale_tril, sds.diag(), rtol=2e-3, atol=1e-12)
    assert gap < -0.2
    assert abs(fit.elbo - (LOG_Z + gap)) < 4 * fit.elbo_se


@pytest.mark.parametrize("covariance", ["mean-field", "full-rank"])
def test_the_fit_finds_its_way_from_a_wrong_start(covariance):
    density, location, true_covariance = gaussian(units=0.0)  # the mode's Gaussian would be the answer already
    base = Affine(location + 2.0, torch.full((4,), 0.3, dtype=torch.float64))
    fit = gaussian_vi._fit_from(density, covariance, base, 0, None)
    expected = true_covariance
    if covariance == "mean-field":
        expected = (mean_field_optimum(true_covariance)[0] ** 2).diag()
    assert relative(fit.location, location, true_covariance.diagonal().sqrt()) < 5e-3
    torch.testing.assert_close(fit.scale_tril @ fit.scale_tril.T, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("covariance", ["mean-field", "full-rank"])
def test_by_stochastic_steps_too(covariance):
    density, location, true_covariance = gaussian()
    config = Config(steps=400, covariance=covariance, from_mode=True)
    state = gaussian_vi.init(density, config)
    # away from the start, which is the optimum already
    state.parameters[0] += 1.0
    state.parameters[1] += 0.7
    for i in range(config.steps):
        metrics = gaussian_vi.step(state, None, generator(0, Stream.TRAIN, i))
    fitted, sd = gaussian_vi.fitted_gaussian(state), true_covariance.diagonal().sqrt()
    expected = true_covariance
    if covariance == "mean-field":
        expected = (mean_field_optimum(true_covariance)[0] ** 2).diag()
    assert relative(fitted.location, location, sd) < 0.03
    found = fitted.scale @ fitted.scale.T
    assert relative(found, expected, sd * sd[:, None]) < 0.03
    if covariance == "full-rank":  # the landing sticks: no noise is left at the optimum
        assert relative(fitted.location, location, sd) < 1e-3
        assert abs(metrics["elbo"] - LOG_Z) < 1e-3


@pytest.mark.parametrize("covariance", ["mean-field", "full-rank"])
def test_the_gradient_is_the_elbos(covariance):
    """Finite differences of the ELBO, with the same draws, of an exact quadrature-like set."""
    density = skewed()
    config = Config(steps=1, batch=40_000, covariance=covariance, from_mode=False)
    state = gaussian_vi.init(density, config)
    state.parameters[0] += torch.tensor([0.4, -0.3])
    state.parameters[1] += torch.tensor([-0.5, 0.2])
    if covariance == "full-rank":
        state.parameters[2][1, 0] = 0.6
    start = [p.clone() for p in state.parameters]
    gaussian_vi.step(state, None, torch.Generator().manual_seed(0))
    u = moment_matched_normals(40_000, 2, 5)

    def elbo(parameters):
        fitted = gaussian_vi._compose(state.base, *gaussian_vi._unpacked(parameters))
        z = fitted.forward(u)
        return float((density.log_prob(z) - gaussian_log_prob(z, fitted.location, fitted.scale)).mean())

    for which, parameter in enumerate(start):
        for index in [(0,), (1,)] if parameter.ndim == 1 else [(1, 0)]:
            up, down = [p.clone() for p in start], [p.clone() for p in start]
            up[which][index] += 1e-4
            down[which][index] -= 1e-4
            slope = (elbo(up) - elbo(down)) / 2e-4
            assert abs(float(-state.parameters[which].grad[index]) - slope) < 0.05


def test_the_elbo_stays_below_the_evidence_and_full_rank_beats_mean_field():
    full, mean_field = fit_gaussian(skewed()), fit_gaussian(skewed(), "mean-field")
    assert full.elbo < 3 * full.elbo_se
    assert mean_field.elbo < full.elbo - 0.1
    again = fit_gaussian(skewed())
    torch.testing.assert_close(again.scale_tril, full.scale_tril, rtol=0, atol=0)


def test_a_high_narrow_spike_is_not_where_the_mass_is():
    # a funnel: the mode is deep in the neck, the mass is not
    def log_prob(z):
        v = z[:, 0]
        neck = -0.5 * (z[:, 1:] ** 2).sum(1) * torch.exp(-v) - 4.5 * v - 4.5 * math.log(2 * math.pi)
        return neck - 0.5 * v**2 / 9 - math.log(3) - 0.5 * math.log(2 * math.pi)

    fit = fit_gaussian(Density("funnel", 10, log_prob))
    assert -2.5 < fit.elbo < 0


def test_fixed_draws_have_the_moments_of_a_normal_exactly():
    u = moment_matched_normals(100, 7, 3)
    assert u.shape == (100, 7)
    torch.testing.assert_close(u.mean(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(u.T @ u / 100, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert moment_matched_normals(3, 7, 3).shape == (14, 7)


def test_draws_carry_exact_weights_and_do_not_depend_on_their_number():
    density, _, _ = gaussian()
    state = gaussian_vi.init(density, Config(steps=3, covariance="mean-field"))
    draws = gaussian_vi.sample(state, NoiseStreams(7, range(20_000)))
    torch.testing.assert_close(draws.log_prob, density.log_prob(draws.z))
    torch.testing.assert_close(draws.log_weight, draws.log_prob - draws.log_approx)
    fitted = gaussian_vi.fitted_gaussian(state)
    law = torch.distributions.MultivariateNormal(fitted.location, scale_tril=fitted.scale)
    torch.testing.assert_close(draws.log_approx, law.log_prob(draws.z))
    weight = (draws.log_weight - LOG_Z).exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / math.sqrt(20_000)
    few = gaussian_vi.sample(state, NoiseStreams(7, range(5, 8)))
    torch.testing.assert_close(few.z, draws.z[5:8], rtol=1e-12, atol=1e-12)
    assert draws.z.dtype == draws.log_weight.dtype == torch.float64


def test_a_resumed_run_is_the_uninterrupted_one():
    density, config = skewed(), Config(steps=20)

    def run(state, steps):
        for i in steps:
            gaussian_vi.step(state, None, generator(config.seed, Stream.TRAIN, i))
        return state

    whole = run(gaussian_vi.init(density, config), range(20))
    saved = unpack(*pack(gaussian_vi.state_dict(run(gaussian_vi.init(density, config), range(8)))))
    other = gaussian_vi.init(density, Config(steps=20, from_mode=False))
    gaussian_vi.load_state_dict(other, saved)
    assert other.step == 8
    resumed = run(other, range(8, 20))
    a, b = gaussian_vi.fitted_gaussian(whole), gaussian_vi.fitted_gaussian(resumed)
    torch.testing.assert_close(a.scale, b.scale, rtol=0, atol=0)
    torch.testing.assert_close(a.location, b.location, rtol=0, atol=0)


def test_bad_settings_improper_posteriors_and_divergence_are_told():
    density = skewed()
    with pytest.raises(InputError, match="at least 1 step"):
        gaussian_vi.init(density, Config(steps=0))
    flat = Density("flat", 2, lambda z: -0.5 * z[:, 0] ** 2)
    for attempt in (lambda: gaussian_vi.init(flat, Config()), lambda: fit_gaussian(flat)):
        with pytest.raises(InputError, match="improper"):
            attempt()
    state = gaussian_vi.init(density, Config())
    state.density = Density("nan", 2, lambda z: z[:, 0] * math.nan)
    with pytest.raises(RunError, match="diverged"):
        gaussian_vi.step(state, None, torch.Generator().manual_seed(0))

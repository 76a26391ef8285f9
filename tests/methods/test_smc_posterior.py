"""`--method smc`: a conjugate answer with its evidence, honest errors, and priors that draws cannot come from."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conjugate import LOG_Z, SD, X, conjugate

from hsivi_cli.errors import InputError
from hsivi_cli.methods.posterior import draw_posterior, fit_posterior, restore, state_tree
from hsivi_cli.methods.posterior_registry import FitOptions
from hsivi_cli.methods.posterior_report import report_on
from hsivi_cli.methods.smc_posterior import draw_smc
from hsivi_cli.targets.density import find_parts
from hsivi_cli.targets.regression import regression_density
from hsivi_cli.targets.whiten import whiten


def test_draws_and_evidence_are_those_of_a_conjugate_gaussian():
    found = draw_smc(conjugate(), 8000, 0)
    assert abs(found.log_z - LOG_Z) < 4 * found.log_z_se
    assert 1e-4 < found.log_z_se < 0.05
    assert torch.allclose(found.draws.z.mean(0), 0.8 * X, atol=4 * SD / found.ess**0.5)
    assert torch.allclose(found.draws.z.std(0), torch.full((2,), SD).double(), rtol=0.05)
    assert 400 < found.ess <= 8000
    assert found.r_hat < 1.01


def test_the_standard_error_of_the_evidence_is_its_spread_over_seeds():
    runs = [draw_smc(conjugate(), 400, seed, particles=100) for seed in range(30)]
    error = torch.tensor([(run.log_z - LOG_Z) / run.log_z_se for run in runs])
    assert 0.6 < float(error.std()) < 1.6


def test_fits_are_judged_and_redrawn(tmp_path):
    density = conjugate()
    options = FitOptions(method="smc")
    fit = fit_posterior(density, options, tmp_path)
    again = restore(density, options, state_tree(fit))
    first, second, other = (draw_posterior(f, 1000, seed) for f, seed in ((fit, 1), (again, 1), (again, 2)))
    assert torch.equal(first.z, second.z)
    assert not torch.equal(first.z, other.z)
    report = report_on(fit, draw_posterior(fit, 4000, 3), None, 0)
    assert report.verdict.level == "trust"
    assert report.log_z == pytest.approx(LOG_Z, abs=4 * report.log_z_se)


def test_a_prior_with_next_to_no_mass_lowers_the_verdict_and_one_without_any_is_refused(tmp_path):
    fit = fit_posterior(conjugate(2.6), FitOptions(method="smc"), tmp_path)
    report = report_on(fit, draw_posterior(fit, 4000, 0), None, 0)
    assert report.verdict.level != "trust"
    assert "narrow the prior" in report.verdict.line
    with pytest.raises(InputError, match="no mass where the data need it"):
        draw_smc(conjugate(50.0), 400, 0)


def test_a_whitened_density_has_the_same_parts():
    white = whiten(conjugate(), torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 3.0]).double())
    u = white.parts.sample_prior(5, torch.Generator().manual_seed(0))
    assert torch.allclose(white.parts.log_prior(u) + white.parts.log_likelihood(u), white.log_prob(u))
    assert draw_smc(white, 400, 0).log_z == pytest.approx(LOG_Z, abs=0.1)


def test_what_has_no_prior_or_takes_no_options_is_refused(tmp_path):
    bare = replace(conjugate(), parts=None)
    with pytest.raises(InputError, match="likelihood"):
        find_parts(bare)
    with pytest.raises(InputError, match="flat prior"):
        find_parts(replace(bare, proper_prior=False))
    for fields, says in (({"steps": 5}, "--steps"), ({"refine": "hmc"}, "--refine"), ({"paper": True}, "--paper")):
        with pytest.raises(InputError, match=says):
            fit_posterior(conjugate(), FitOptions(method="smc", **fields), tmp_path)


def test_the_prior_of_a_regression_is_that_of_its_draws():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)).numpy()
    density = regression_density(
        pd.DataFrame({"x": x, "y": 2 * x + x[::-1]}), "y ~ x", None, ("b=normal(0,1)", "Intercept=normal(0,2)")
    )
    parts = find_parts(density)
    drawn = parts.sample_prior(4000, torch.Generator().manual_seed(1)).requires_grad_(True)
    torch.testing.assert_close(parts.log_prior(drawn) + parts.log_likelihood(drawn), density.log_prob(drawn))
    (score,) = torch.autograd.grad(parts.log_prior(drawn).sum(), drawn)
    assert bool((score.mean(0).abs() < 4.5 * score.std(0) / math.sqrt(4000)).all())

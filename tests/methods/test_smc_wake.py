"""SMC-Wake on one observation: a conjugate answer, exact weights, a bit-for-bit resume, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from conjugate import LOG_Z, SD, X, conjugate

from hsivi_cli.engine import loop
from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import NoiseStreams, Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.pareto import smooth_weights
from hsivi_cli.methods import smc_wake
from hsivi_cli.methods.posterior import draw_posterior, fit_posterior, restore, state_tree
from hsivi_cli.methods.posterior_registry import FitOptions
from hsivi_cli.methods.posterior_report import report_on

SMALL = smc_wake.Config(steps=60, runs=4, particles=200, refresh_every=20, lr=0.01)


def trained(config, steps=None, state=None):
    state = state or smc_wake.init(conjugate(), config)
    for _ in range(steps or config.steps):
        metrics = smc_wake.step(state, None, generator(config.seed, Stream.TRAIN, state.step + 1))
    return state, metrics


def test_a_gaussian_encoder_becomes_the_conjugate_posterior():
    state, metrics = trained(replace(SMALL, family="gaussian", steps=200))
    draws = smc_wake.sample(state, NoiseStreams(3, range(4000)))
    weights = smooth_weights(draws.log_weight)
    assert weights.khat < 0.5
    assert weights.ess > 0.9 * 4000
    assert weights.log_z == pytest.approx(LOG_Z, abs=5 * weights.log_z_se + 1e-6)
    assert torch.allclose(draws.z.mean(0), 0.8 * X, atol=0.06)
    assert torch.allclose(draws.z.std(0), torch.full((2,), SD).double(), rtol=0.1)
    assert metrics["elbo"] == pytest.approx(LOG_Z, abs=0.2)
    # the weight is log p - log q of a density that integrates to 1: its mean is the evidence, not one shifted by scales
    assert float(draws.log_approx.mean()) == pytest.approx(-math.log(2 * math.pi * math.e * SD**2), abs=0.1)


def test_it_resumes_bit_for_bit(tmp_path):
    whole, _ = trained(SMALL)
    part, _ = trained(SMALL, 25)
    save_checkpoint(tmp_path / "state.safetensors", smc_wake.state_dict(part))
    again = smc_wake.init(conjugate(), SMALL)
    smc_wake.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
    again, _ = trained(SMALL, SMALL.steps - 25, again)
    one, other = (smc_wake.sample(state, NoiseStreams(0, range(50))) for state in (whole, again))
    assert torch.equal(one.z, other.z)
    assert torch.equal(one.log_weight, other.log_weight)
    assert torch.equal(whole.store.log_z, again.store.log_z)


def test_the_loop_runs_it_and_the_verdict_rests_on_its_weights(tmp_path):
    density, options = conjugate(), FitOptions(method="smc-wake", steps=800)
    fit = fit_posterior(density, options, tmp_path)
    assert fit.route == "weights"
    assert fit.trace[-1][0] == 800
    posterior = draw_posterior(fit, 2000, 1)
    report = report_on(fit, posterior, None, 0)
    assert report.verdict.level == "trust"
    assert report.log_z == pytest.approx(LOG_Z, abs=5 * report.log_z_se + 1e-6)
    save_checkpoint(tmp_path / "fit.safetensors", state_tree(fit))
    again = restore(density, options, load_checkpoint(tmp_path / "fit.safetensors"))
    assert torch.equal(draw_posterior(again, 2000, 1).z, posterior.z)


def test_refine_smc_tempers_from_the_prior(tmp_path):
    fit = fit_posterior(conjugate(), FitOptions(method="smc-wake", steps=3, refine="smc"), tmp_path)
    posterior = draw_posterior(fit, 2000, 1)
    assert posterior.route == "smc"
    assert torch.allclose(posterior.z.mean(0), 0.8 * X, atol=0.06)


def test_priors_without_mass_and_densities_without_a_prior_are_refused(tmp_path):
    state = smc_wake.init(conjugate(50.0), SMALL)
    with pytest.raises(InputError, match="no mass where the data need it"):
        smc_wake.step(state, None, generator(0, Stream.TRAIN, 1))
    with pytest.raises(InputError, match="likelihood"):
        smc_wake.init(replace(conjugate(), parts=None), SMALL)
    with pytest.raises(InputError, match="--paper"):
        fit_posterior(conjugate(), FitOptions(method="smc-wake", paper=True), tmp_path)


def test_draws_that_are_impossible_weigh_nothing_and_stop_no_training(tmp_path):
    config = loop.LoopConfig(30, 0, 10)
    state = smc_wake.init(conjugate(1.0), SMALL)
    loop.run_loop(smc_wake, state, config, tmp_path, loop.Hooks(lambda record: None))
    draws = smc_wake.sample(state, NoiseStreams(0, range(500)))
    assert bool((draws.log_weight == -math.inf).any())
    assert bool(draws.log_weight.exp().isfinite().all())

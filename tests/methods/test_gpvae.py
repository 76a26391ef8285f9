"""GPVAE as a method: weights that are those of its draws, its limits, routing, resume, options."""

import math
from dataclasses import replace

import pytest
import torch
from linear_latent import as_task, certain, make_linear

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import gpvae, vae
from hsivi_cli.methods.latent_training import gaussian_log_prob
from hsivi_cli.objectives.gpvae_bound import draw_latent, expected_variance, information
from hsivi_cli.objectives.vae_bounds import evidence_lower_bound, importance_weighted_bound
from hsivi_cli.targets.latent import LatentTask, ModelConfig, build_model

SMALL = gpvae.Config(steps=40, hidden=(8,), features=6, lr=3e-3, freeze_decoder=True)
PROBLEM = make_linear(rows=12, columns=4, seed=3)


def trained(config, task=None, steps=None, state=None, method=gpvae, seen=None):
    task = as_task(PROBLEM) if task is None else task
    state = state or method.init(task, config)
    for _ in range(config.steps if steps is None else steps):
        metrics = method.step(state, task.rows, generator(config.seed, Stream.TRAIN, state.step + 1))
        if seen is not None:
            seen.append(metrics)
    return state, metrics


def loosened(**changed):
    """A state whose functions are unsure enough for a mistake to show."""
    state = gpvae.init(as_task(PROBLEM), replace(SMALL, tau_mean=1.0, tau_log_sd=0.3, **changed))
    with torch.no_grad():
        for parameter in state.encoder.q_parameters():
            parameter.fill_(-1.0)
        state.encoder.mean_head.linear.weight.mul_(0.3)
        state.encoder.log_sd_head.linear.bias.fill_(-0.7)
    return state


def log_mean_within(log_weight, log_p, errors=4.0):
    """Whether the weights' mean is p(x), by its standard error."""
    ratio = (log_weight - log_p).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    return ((ratio.mean(0) - 1).abs() < errors * error).tolist()


@pytest.mark.parametrize("density", ["matched", "plug-in", "mixture"])
@pytest.mark.parametrize("functions", ["f", "f+g"])
def test_weights_are_those_of_the_density_that_draws_come_from(functions, density):
    state = loosened(functions=functions, density=density)
    draws = gpvae.posterior(state).draw(PROBLEM.x, 40_000, generator(0, Stream.DRAW))
    assert draws.log_weight.dtype == torch.float64
    assert all(log_mean_within(draws.log_weight, PROBLEM.log_p()))
    elbo = evidence_lower_bound(draws.log_weight)
    assert bool((elbo < PROBLEM.log_p()).all())
    spread = draws.z.var(0) / draws.sd**2
    assert float(spread.mean()) == pytest.approx(1.0, abs=0.1 if density == "mixture" and functions == "f+g" else 0.01)
    at = gpvae.posterior(state).moments(PROBLEM.x)
    plug_in = density == "plug-in"
    assert torch.allclose(draws.sd**2 - at.v, (2 * at.log_sd).exp() if plug_in else expected_variance(at))
    if density != "mixture":
        gaussian = certain(draws.mean, draws.sd.log())
        error = draws.log_weight.std(0) / math.sqrt(len(draws.log_weight))
        assert bool(((elbo - PROBLEM.elbo(gaussian)).abs() < 4 * error).all())


def test_the_published_mistake_is_caught():
    """Drawn with v and weighed by h alone: not a bound of anything. By f, or by the marginal: both are."""
    state = loosened()
    at = gpvae.posterior(state).moments(PROBLEM.x)
    noise = torch.randn(3, 40_000, *at.mean.shape, generator=generator(1, Stream.DRAW), dtype=torch.float64)
    z = draw_latent(at, noise)
    with torch.no_grad():
        log_joint, h = state.model.log_joint(PROBLEM.x, z), at.log_sd.exp()
    f = at.mean + at.v.sqrt() * noise[0]
    marginal = log_joint - gaussian_log_prob(z, at.mean, (at.v + h**2).sqrt())
    given_f = log_joint - gaussian_log_prob(z, f, h)
    mismatched = log_joint - gaussian_log_prob(z, at.mean, h)
    assert all(log_mean_within(marginal, PROBLEM.log_p()))
    assert all(log_mean_within(given_f, PROBLEM.log_p(), 5.0))
    assert sum(log_mean_within(mismatched, PROBLEM.log_p())) < 6
    too_high = importance_weighted_bound(mismatched).mean() - PROBLEM.log_p().mean()
    assert float(too_high) > 0.3
    # given f is the looser one, by the information that identity (10) names
    loss = (marginal - given_f).mean(0)
    error = (marginal - given_f).std(0) / math.sqrt(len(z))
    assert bool(((loss - information(at)).abs() < 5 * error).all())


def test_a_vanishing_tau_is_the_vae_step_by_step():
    task = as_task(PROBLEM)
    config = replace(SMALL, tau_mean=1e-7, tau_log_sd=1e-7, functions="f+g", freeze_decoder=False, kappa=0.0)
    shared = {name: getattr(config, name) for name in vars(SMALL) if name in vae.Config.__dataclass_fields__}
    ours, theirs = [], []
    one, _ = trained(config, task, seen=ours)
    other, _ = trained(vae.Config(**shared), task, seen=theirs, method=vae)
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine["elbo"] == pytest.approx(plain["elbo"], abs=1e-4)
    assert torch.allclose(one.model.decoder.net[0].weight, other.model.decoder.net[0].weight, atol=1e-5)


def test_before_the_functions_are_let_loose_it_is_the_vae():
    config = replace(SMALL, steps=10, warm_start=10, freeze_decoder=False)
    shared = {name: getattr(config, name) for name in vars(SMALL) if name in vae.Config.__dataclass_fields__}
    warm, _ = trained(config)
    plain, _ = trained(vae.Config(**shared), method=vae)
    assert torch.equal(warm.model.decoder.net[0].weight, plain.model.decoder.net[0].weight)
    assert torch.equal(warm.encoder.mean_head.linear.weight, plain.encoder.mean_head.linear.weight)
    before = warm.encoder.mean_head.log_sd.clone()
    warm.config = replace(config, steps=20)
    trained(config, steps=1, state=warm)
    assert not torch.equal(warm.encoder.mean_head.log_sd, before)


def test_training_raises_the_bound_and_v_leaves_where_it_costs_nothing():
    kept, free = [], []
    config = replace(SMALL, steps=250, lr=1e-2, tau_mean=1.0)
    trained(config, seen=kept)
    trained(replace(config, kappa=0.0), seen=free)
    early, late = (sum(m["bound"] for m in part) / 20 for part in (kept[:20], kept[-20:]))
    assert late > early + 0.5
    assert late < float(PROBLEM.log_p().mean())
    assert free[-1]["novelty"] < 0.3 * kept[-1]["novelty"]
    assert kept[-1]["bound"] == pytest.approx(kept[-1]["elbo"] - kept[-1]["weight_kl"] / 12, rel=1e-6)


def test_the_weight_of_the_kl_is_one_over_all_rows():
    """Two minibatches of one data set and the data set whole: the same share of the KL in the loss."""
    task = as_task(PROBLEM)
    grads = []
    for rows in (task.rows, task.rows[:3]):
        state = gpvae.init(task, replace(SMALL, steps=1))
        metrics = gpvae.step(state, rows, generator(0, Stream.TRAIN, 1))
        grads.append((metrics["elbo"] - metrics["bound"]) / metrics["weight_kl"])
    assert grads == pytest.approx([1 / 12, 1 / 12], rel=1e-5)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("mean_function", [True, False])
def test_what_learns(mean_function, freeze):
    task = as_task(PROBLEM)
    config = replace(SMALL, mean_function=mean_function, freeze_decoder=freeze, learn_tau=True, functions="f+g")
    state = gpvae.init(task, config)
    before = {name: value.clone() for name, value in state.encoder.named_parameters()}
    start = state.model.decoder.net[0].weight.clone()
    trained(config, task, steps=3, state=state)
    still = {name for name, value in state.encoder.named_parameters() if torch.equal(value, before[name])}
    assert still == {"trunk.mask.weight"}  # nothing is missing in these rows
    assert torch.equal(state.model.decoder.net[0].weight, start) == freeze
    assert torch.equal(task.model.decoder.net[0].weight, start)  # the task's own model is left as it was


def test_it_resumes_bit_for_bit(tmp_path):
    config = replace(SMALL, functions="f+g", covariance="full", freeze_decoder=False)
    whole, _ = trained(config)
    part, _ = trained(config, steps=15)
    save_checkpoint(tmp_path / "state.safetensors", gpvae.state_dict(part))
    again = gpvae.init(as_task(PROBLEM), config)
    gpvae.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
    again, _ = trained(config, steps=25, state=again)
    one, other = (gpvae.posterior(s).draw(PROBLEM.x, 3, generator(0, Stream.DRAW)) for s in (whole, again))
    assert torch.equal(one.z, other.z)
    assert torch.equal(one.log_weight, other.log_weight)


def test_uncertainty_is_per_row_and_larger_where_no_row_was():
    rows = make_linear(rows=400, columns=4, seed=3)
    state, _ = trained(replace(SMALL, steps=150, tau_mean=1.0, functions="f+g", lr=1e-2), as_task(rows))
    posterior = gpvae.posterior(state)
    near = posterior.uncertainty(rows.x)
    assert near.v.shape == near.s.shape == (400, 2)
    assert near.novelty.shape == (400,)
    assert torch.allclose(near.mean_sd.square(), near.v.mean(1))
    assert bool((near.v > 0).all())
    assert bool((near.s > 0).all())
    assert torch.allclose(posterior.uncertainty(rows.x[7:8]).v, near.v[7:8])


@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_float32_rows_with_gaps_and_other_priors(prior):
    x = make_linear(rows=30, columns=4, seed=3).x.float()
    x[::3, 1] = math.nan
    config = ModelConfig(latent=2, prior=prior, hidden=(8,), seed=1)
    task = LatentTask(x, build_model(config, x))
    metrics = []
    state, _ = trained(replace(SMALL, freeze_decoder=False, functions="f+g", lr=1e-2), task, seen=metrics)
    assert all(math.isfinite(value) for one in metrics for value in one.values())
    assert metrics[-1]["bound"] > metrics[0]["bound"]
    draws = gpvae.posterior(state).draw(x, 5, generator(0, Stream.DRAW))
    assert bool(draws.log_weight.isfinite().all())
    assert draws.z.shape == (5, 30, 2)
    # labels beside the rows are left aside
    gpvae.step(state, (x, torch.full((30,), -1)), generator(0, Stream.TRAIN, 99))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(InputError, match="kappa"):
        gpvae.init(as_task(PROBLEM), replace(SMALL, kappa=-1.0))
    with pytest.raises(InputError, match="tau"):
        gpvae.init(as_task(PROBLEM), replace(SMALL, tau_mean=0.0))

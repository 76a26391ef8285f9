"""The VAE and its variations: exact weights, IWAE monotone, decay, dropout, SVI in training and at the test."""

import math
from dataclasses import replace

import pytest
import torch
from linear_latent import as_task, make_linear

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import vae
from hsivi_cli.objectives.vae_bounds import (
    evidence_lower_bound,
    importance_weighted_bound,
    importance_weighted_bounds,
)

SMALL = vae.Config(steps=60, hidden=(8,), features=6, lr=1e-2, freeze_decoder=True)
PROBLEM = make_linear(rows=12, columns=4, seed=3)


def trained(config, steps=None, state=None, seen=None, task=None):
    task = as_task(PROBLEM) if task is None else task
    state = state or vae.init(task, config)
    for _ in range(config.steps if steps is None else steps):
        metrics = vae.step(state, task.rows, generator(config.seed, Stream.TRAIN, state.step + 1))
        if seen is not None:
            seen.append(metrics)
    return state


def drawn(state, k, seed=0):
    return vae.posterior(state).draw(PROBLEM.x, k, generator(seed, Stream.DRAW))


@pytest.mark.parametrize("steps", [0, 5])
def test_weights_are_unbiased_with_and_without_refinement(steps):
    state = trained(replace(SMALL, svi_test_steps=steps), steps=10)
    draws = drawn(state, 40_000)
    ratio = (draws.log_weight - PROBLEM.log_p()).exp()
    assert bool(((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(len(ratio))).all())
    assert bool((evidence_lower_bound(draws.log_weight) < PROBLEM.log_p()).all())


def test_importance_weighted_bounds_rise_with_the_draws_and_stop_at_log_p():
    """From draws of their own each: a bound of groups of the same draws rises by arithmetic alone."""
    state = trained(SMALL, steps=5)
    bounds, errors = [], []
    for count in (1, 10, 100, 1000):
        repeats = 20_000 // count
        log_weight = drawn(state, repeats * count, seed=count).log_weight.unflatten(0, (repeats, count))
        each = importance_weighted_bound(log_weight.transpose(0, 1))
        bounds.append(each.mean(0))
        errors.append(each.std(0) / math.sqrt(repeats))
    for index in range(3):
        error = (errors[index] ** 2 + errors[index + 1] ** 2).sqrt()
        assert bool((bounds[index + 1] - bounds[index] > -4 * error).all())
    assert bool((bounds[1] > bounds[0]).all())
    for bound, error in zip(bounds, errors, strict=True):
        assert bool((bound < PROBLEM.log_p() + 4 * error).all())
    assert bool(((bounds[-1] - PROBLEM.log_p()).abs() < 4 * errors[-1] + 0.01).all())


def test_bounds_of_several_counts_are_those_of_their_groups():
    log_weight = torch.randn(21, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds = importance_weighted_bounds(log_weight, (1, 5, 21))
    assert torch.allclose(bounds[0], evidence_lower_bound(log_weight))
    groups = torch.stack([importance_weighted_bound(log_weight[i : i + 5]) for i in (0, 5, 10, 15)])
    assert torch.allclose(bounds[1], groups.mean(0))
    assert torch.allclose(bounds[2], importance_weighted_bound(log_weight))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"objective": "iwae", "samples": 5},
        {"svi_train": "detached", "svi_steps": 2},
        {"svi_train": "through", "svi_steps": 2},
        {"svi_train": "through", "svi_steps": 2, "svi_rule": "sgd", "svi_lr": 0.05},
        {"dropout": 0.2},
        {"kl_warmup": 30},
    ],
    ids=["elbo", "iwae", "detached", "through", "through sgd", "dropout", "warm-up"],
)
def test_every_variation_learns_and_resumes_bit_for_bit(changed, tmp_path):
    config = replace(SMALL, freeze_decoder=False, **changed)
    seen = []
    whole = trained(config, seen=seen)
    key = "bound" if "objective" in changed else "elbo"
    early, late = (sum(m[key] for m in part) / 10 for part in (seen[:10], seen[-10:]))
    assert late > early
    part = trained(config, steps=25)
    save_checkpoint(tmp_path / "state.safetensors", vae.state_dict(part))
    again = vae.init(as_task(PROBLEM), config)
    vae.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
    again = trained(config, steps=35, state=again)
    assert torch.equal(drawn(whole, 3).log_weight, drawn(again, 3).log_weight)


def test_a_linear_decoder_and_a_wide_encoder_come_near_log_p():
    state = trained(replace(SMALL, steps=600, features=16, samples=8))
    elbo = evidence_lower_bound(drawn(state, 4000).log_weight)
    gap = PROBLEM.best_diagonal_elbo() - elbo
    assert float(gap.mean()) < 0.05
    assert float(gap.min()) > -0.05


def test_svi_at_the_test_closes_the_amortisation_gap():
    state = trained(SMALL, steps=3)
    best = float(PROBLEM.best_diagonal_elbo().mean())
    reached = []
    for steps in (0, 4, 200):
        state.config = replace(SMALL, svi_test_steps=steps, svi_lr=1.0, svi_samples=20)
        reached.append(float(evidence_lower_bound(drawn(state, 4000).log_weight).mean()))
    assert reached[0] < reached[1] < reached[2] + 0.02
    assert reached[0] < best - 0.3
    assert reached[2] == pytest.approx(best, abs=0.03)


def test_through_the_steps_the_gradient_is_exact():
    """Central differences of the refined ELBO in a weight of the encoder, with the noise held."""
    config = replace(SMALL, svi_train="through", svi_steps=3)
    state = vae.init(as_task(PROBLEM), config)
    weight = state.encoder.mean_head.linear.weight

    def loss():
        at = state.encoder(PROBLEM.x)
        return vae._refined_loss(state, PROBLEM.x, at, generator(0, Stream.TRAIN, 1))[0]

    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight[0, 0] += 1e-5
    high = float(loss().detach())
    with torch.no_grad():
        weight[0, 0] -= 2e-5
    low = float(loss().detach())
    assert float(gradient[0, 0]) == pytest.approx((high - low) / 2e-5, rel=1e-4)


def test_detached_refinement_gives_the_decoder_no_gradient_of_the_encoders_elbo():
    config = replace(SMALL, svi_train="detached", svi_steps=3, freeze_decoder=False)
    state = vae.init(as_task(PROBLEM), config)
    at = state.encoder(PROBLEM.x)
    loss, metrics = vae._refined_loss(state, PROBLEM.x, at, generator(0, Stream.TRAIN, 1))
    decoder = state.model.decoder.net[0].weight
    one = torch.autograd.grad(loss, (decoder, state.encoder.mean_head.linear.weight), retain_graph=True)
    assert all(bool(gradient.abs().sum() > 0) for gradient in one)
    assert all(parameter.requires_grad for parameter in state.model.parameters())
    assert metrics["elbo"] > metrics["elbo_before_svi"]


def test_weight_decay_shrinks_matrices_of_the_encoder_only():
    plain, decayed = (
        trained(replace(SMALL, weight_decay=share, steps=20, freeze_decoder=False)) for share in (0.0, 5.0)
    )
    assert decayed.encoder.mean_head.linear.weight.norm() < 0.8 * plain.encoder.mean_head.linear.weight.norm()
    one = vae.init(as_task(PROBLEM), replace(SMALL, weight_decay=1e3, lr=1e-3, steps=2, schedule="constant"))
    vae.step(one, PROBLEM.x, generator(0, Stream.TRAIN, 1))
    assert float(one.encoder.mean_head.linear.weight.detach().norm()) < 1e-2  # one step of rate 1
    assert torch.equal(one.model.decoder.net[0].weight, as_task(PROBLEM).model.decoder.net[0].weight)


def test_dropout_is_for_training_alone():
    state = trained(replace(SMALL, dropout=0.5), steps=2)
    assert torch.equal(drawn(state, 2).mean, drawn(state, 2, seed=1).mean)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dropout": 1.0}, "dropout"),
        ({"samples": 0}, "samples"),
        ({"hidden": (0,)}, "hidden"),
        ({"shape": (3, 3, 1)}, "9 numbers"),
        ({"objective": "iwae", "svi_train": "through"}, "choose one"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(changed, message):
    with pytest.raises(InputError, match=message) as caught:
        vae.init(as_task(PROBLEM), replace(SMALL, **changed))
    assert "\n" not in str(caught.value)

"""Flow posteriors: the density is that of the draws, weights are unbiased, training and resuming, torch's checks."""

import math
from dataclasses import replace

import pytest
import torch
from linear_latent import as_task, make_linear
from torch.distributions import Distribution

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import flow_posterior
from hsivi_cli.objectives.vae_bounds import evidence_lower_bound

SMALL = flow_posterior.Config(
    steps=60, hidden=(8,), features=6, lr=1e-2, transforms=2, flow_hidden=(12,), bins=4, freeze_decoder=True
)
PROBLEM = make_linear(rows=12, columns=4, seed=3)
CORRELATED = make_linear(rows=12, columns=4, seed=11)
FLOWS = pytest.mark.parametrize("flow", ["iaf", "nsf"])


def trained(config, steps=None, state=None, seen=None):
    state = state or flow_posterior.init(as_task(PROBLEM), config)
    for _ in range(config.steps if steps is None else steps):
        metrics = flow_posterior.step(state, PROBLEM.x, generator(config.seed, Stream.TRAIN, state.step + 1))
        if seen is not None:
            seen.append(metrics)
    return state


def drawn(state, k, seed=0):
    return flow_posterior.posterior(state).draw(PROBLEM.x, k, generator(seed, Stream.DRAW))


@FLOWS
def test_the_density_is_the_one_of_the_map_from_noise_to_z(flow):
    """log q = log N(noise) - log |det dz / dnoise|, with the Jacobian by autograd."""
    state = trained(replace(SMALL, flow=flow), steps=30)
    x, noise = PROBLEM.x[:1], torch.randn(2, generator=torch.Generator().manual_seed(1)).double()
    _, log_q = state.encoder(x, noise[None, None])
    jacobian = torch.autograd.functional.jacobian(lambda e: state.encoder(x, e[None, None])[0][0, 0], noise)
    expected = -0.5 * noise.square().sum() - math.log(2 * math.pi) - torch.linalg.slogdet(jacobian)[1]
    assert float(log_q.detach()) == pytest.approx(float(expected), abs=1e-9)
    off_diagonal = jacobian.abs()[0, 1] + jacobian.abs()[1, 0]
    assert float(off_diagonal) > 1e-4  # the flow is not a scaling of each number


@FLOWS
def test_weights_are_unbiased(flow):
    state = trained(replace(SMALL, flow=flow), steps=20)
    ratio = (drawn(state, 30_000).log_weight - PROBLEM.log_p()).exp()
    assert bool(((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / math.sqrt(len(ratio))).all())


@FLOWS
def test_training_closes_the_gap_that_a_diagonal_gaussian_leaves(flow):
    """The true posterior is correlated: an autoregressive flow reaches it, a diagonal Gaussian never does."""
    config = replace(SMALL, flow=flow, steps=500, features=16, samples=4)
    state = flow_posterior.init(as_task(CORRELATED), config)
    for _ in range(config.steps):
        flow_posterior.step(state, CORRELATED.x, generator(0, Stream.TRAIN, state.step + 1))
    draws = flow_posterior.posterior(state).draw(CORRELATED.x, 3000, generator(0, Stream.DRAW))
    gap = CORRELATED.log_p() - evidence_lower_bound(draws.log_weight)
    assert float((CORRELATED.log_p() - CORRELATED.best_diagonal_elbo()).mean()) > 0.5
    assert float(gap.mean()) < 0.1
    assert float(gap.min()) > -0.03


def test_moments_are_those_of_the_draws():
    state = trained(SMALL, steps=20)
    one, many = drawn(state, 1), drawn(state, 4000)
    assert one.z.shape == (1, 12, 2)
    assert one.log_weight.shape == (1, 12)
    assert torch.equal(many.mean, many.z.mean(0))
    assert torch.equal(many.sd, many.z.std(0))
    assert torch.equal(one.mean, one.z[0])
    assert not one.sd.any()


@FLOWS
def test_a_run_resumes_bit_for_bit(flow, tmp_path):
    config = replace(SMALL, flow=flow, freeze_decoder=False, steps=20)
    whole, part = trained(config), trained(config, steps=8)
    save_checkpoint(tmp_path / "state.safetensors", flow_posterior.state_dict(part))
    again = flow_posterior.init(as_task(PROBLEM), config)
    flow_posterior.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
    again = trained(config, steps=12, state=again)
    assert torch.equal(drawn(whole, 3).log_weight, drawn(again, 3).log_weight)


def test_the_importance_weighted_objective_learns_too():
    seen = []
    trained(replace(SMALL, objective="iwae", samples=5), seen=seen)
    assert sum(m["bound"] for m in seen[-10:]) > sum(m["bound"] for m in seen[:10])


def test_one_latent_dimension_will_do():
    problem = make_linear(rows=6, columns=3, latent=1)
    state = flow_posterior.init(as_task(problem), SMALL)
    draws = flow_posterior.posterior(state).draw(problem.x, 2, generator(0, Stream.DRAW))
    assert bool(torch.isfinite(draws.log_weight).all())


def test_neither_torchs_checks_nor_its_generator_are_touched():
    task = as_task(PROBLEM)
    before, checks = torch.random.get_rng_state(), Distribution._validate_args
    flow_posterior.init(task, SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert Distribution._validate_args == checks


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"transforms": 0}, "transforms"), ({"bins": 1}, "bins"), ({"flow": "maf"}, "iaf or nsf")],
)
def test_numbers_out_of_range_are_refused_in_one_line(changed, message):
    with pytest.raises(InputError, match=message):
        flow_posterior.init(as_task(PROBLEM), replace(SMALL, **changed))

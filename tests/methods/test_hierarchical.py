"""The two-level posterior: weights unbiased whatever the reverse model, the bound below log p, resuming."""

import math
from dataclasses import replace

import pytest
import torch
from linear_latent import as_task, make_linear

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import hierarchical
from hsivi_cli.objectives.vae_bounds import evidence_lower_bound

SMALL = hierarchical.Config(steps=60, hidden=(8,), features=6, lr=1e-2, width=12, freeze_decoder=True)
PROBLEM = make_linear(rows=12, columns=4, seed=3)
CORRELATED = make_linear(rows=12, columns=4, seed=11)


def trained(config, steps=None, state=None):
    state = state or hierarchical.init(as_task(PROBLEM), config)
    for _ in range(config.steps if steps is None else steps):
        hierarchical.step(state, PROBLEM.x, generator(config.seed, Stream.TRAIN, state.step + 1))
    return state


def drawn(state, k, seed=0):
    return hierarchical.posterior(state).draw(PROBLEM.x, k, generator(seed, Stream.DRAW))


def ratio_error(state, k=30_000):
    ratio = (drawn(state, k).log_weight - PROBLEM.log_p()).exp()
    return (ratio.mean(0) - 1).abs() * math.sqrt(k) / ratio.std(0)


@pytest.mark.parametrize("auxiliary", [0, 1, 3])
def test_weights_are_unbiased_also_with_a_reverse_model_that_is_wrong(auxiliary):
    state = trained(replace(SMALL, auxiliary=auxiliary), steps=40)
    assert state.encoder.reverse.straight.weight.shape == (auxiliary or 2, 2)
    assert float(ratio_error(state).max()) < 4.5
    before = drawn(state, 2000).log_weight.mean()
    with torch.no_grad():
        state.encoder.reverse.head.bias[:1] += 0.5
    assert float(ratio_error(state).max()) < 4.5
    assert float(drawn(state, 2000).log_weight.mean()) < float(before) - 0.03  # looser, and a bound still


def test_without_the_auxiliary_ratio_the_weights_are_not_unbiased(monkeypatch):
    """The negative control: q(z | u, x) alone in place of the ratio."""
    state = trained(replace(SMALL, steps=40))
    original = hierarchical.gaussian_log_prob
    count = iter(range(10**6))

    def without_u(value, mean, sd):  # calls come in threes: r(u), q(u), q(z)
        found = original(value, mean, sd)
        return found if next(count) % 3 == 2 else torch.zeros_like(found)

    monkeypatch.setattr(hierarchical, "gaussian_log_prob", without_u)
    with torch.no_grad():
        state.encoder.lower.head.weight *= 20
    assert float(ratio_error(state).max()) > 10


def test_the_start_is_a_gaussian_encoder():
    """r is the exact posterior of u, and with u integrated out z is the encoder's Gaussian."""
    state = trained(SMALL, steps=0)
    with torch.no_grad():
        for part in (state.encoder.lower, state.encoder.reverse):
            part.head.weight.zero_()
        at = state.encoder.base(PROBLEM.x)
        noise = torch.randn(2, 5, 12, 2, generator=generator(0, Stream.DRAW), dtype=torch.float64)
        z, log_q = state.encoder(PROBLEM.x, *noise)
    expected = torch.distributions.Normal(at.mean, at.log_sd.exp()).log_prob(z).sum(-1)
    assert torch.allclose(log_q, expected, atol=1e-6)


def test_training_closes_most_of_the_gap_that_a_diagonal_gaussian_leaves():
    """0.51 nats in this problem, whose posterior is strongly correlated."""
    config = replace(SMALL, steps=700, features=16, samples=8)
    state = hierarchical.init(as_task(CORRELATED), config)
    for _ in range(config.steps):
        hierarchical.step(state, CORRELATED.x, generator(0, Stream.TRAIN, state.step + 1))
    draws = hierarchical.posterior(state).draw(CORRELATED.x, 3000, generator(0, Stream.DRAW))
    gap = CORRELATED.log_p() - evidence_lower_bound(draws.log_weight)
    diagonal = CORRELATED.log_p() - CORRELATED.best_diagonal_elbo()
    assert float(diagonal.mean()) > 0.5
    assert float(gap.mean()) < 0.5 * float(diagonal.mean())
    assert float(gap.min()) > -0.03


def test_a_run_resumes_bit_for_bit(tmp_path):
    config = replace(SMALL, freeze_decoder=False, steps=20)
    whole, part = trained(config), trained(config, steps=8)
    save_checkpoint(tmp_path / "state.safetensors", hierarchical.state_dict(part))
    again = hierarchical.init(as_task(PROBLEM), config)
    hierarchical.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
    again = trained(config, steps=12, state=again)
    assert torch.equal(drawn(whole, 3).log_weight, drawn(again, 3).log_weight)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(InputError, match="auxiliary"):
        hierarchical.init(as_task(PROBLEM), replace(SMALL, auxiliary=-1))

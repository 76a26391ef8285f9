"""The adversarial autoencoder: each phase moves its own part, codes look like the prior, no weight is claimed."""

import math
from dataclasses import replace

import pytest
import torch
from linear_latent import as_task, make_linear

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.methods import adversarial

SMALL = adversarial.Config(steps=400, hidden=(16,), features=8, lr=5e-3, judge_hidden=(32, 32))
PROBLEM = make_linear(rows=64, columns=4, seed=3)


def trained(config, steps=None, state=None, seen=None):
    state = state or adversarial.init(as_task(PROBLEM), config)
    for _ in range(config.steps if steps is None else steps):
        metrics = adversarial.step(state, PROBLEM.x, generator(config.seed, Stream.TRAIN, state.step + 1))
        if seen is not None:
            seen.append(metrics)
    return state


def drawn(state, k, seed=0):
    return adversarial.posterior(state).draw(PROBLEM.x, k, generator(seed, Stream.DRAW))


def flat(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.mark.parametrize("phase", adversarial.PHASES)
def test_a_phase_moves_its_own_part_alone(phase, monkeypatch):
    state = adversarial.init(as_task(PROBLEM), SMALL)
    original = adversarial._descend
    monkeypatch.setattr(
        adversarial, "_descend", lambda s, name, loss, rate: original(s, name, loss, rate) if name == phase else 0.0
    )
    parts = {"encoder": state.encoder, "model": state.model, "judge": state.judge}
    before = {name: flat(module) for name, module in parts.items()}
    trained(SMALL, steps=2, state=state)
    moved = {name for name, module in parts.items() if not torch.equal(before[name], flat(module))}
    assert moved == {"rebuild": {"encoder", "model"}, "judge": {"judge"}, "deceive": {"encoder"}}[phase]


def test_codes_come_to_look_like_the_prior_and_rows_are_rebuilt():
    seen = []
    state = trained(SMALL, seen=seen)
    z = drawn(state, 1).mean
    assert float(z.mean(0).abs().max()) < 0.5
    assert 0.5 < float(z.std(0).min()) < float(z.std(0).max()) < 1.5
    early, late = (sum(m["log_likelihood"] for m in part) for part in (seen[:20], seen[-20:]))
    assert late > early
    assert 0.3 < seen[-1]["discriminator"] < 0.9  # log 2 where it cannot tell


def test_a_point_has_no_density_and_no_weight():
    draws = drawn(trained(SMALL, steps=1), 3)
    assert draws.log_weight is None
    assert float(draws.sd.abs().max()) == 0
    assert torch.equal(draws.z[0], draws.z[2])


def test_a_gaussian_encoder_has_exact_weights():
    draws = drawn(trained(replace(SMALL, noise="gaussian"), steps=0), 20_000)
    ratio = (draws.log_weight - PROBLEM.log_p()).exp()
    # the decoder is at its start, which is the problem's
    assert float(((ratio.mean(0) - 1).abs() * math.sqrt(20_000) / ratio.std(0)).max()) < 4.5


@pytest.mark.parametrize("noise", ["none", "gaussian"])
def test_a_run_resumes_bit_for_bit(noise, tmp_path):
    config = replace(SMALL, noise=noise, steps=12)
    whole, part = trained(config), trained(config, steps=5)
    save_checkpoint(tmp_path / "state.safetensors", adversarial.state_dict(part))
    again = adversarial.init(as_task(PROBLEM), config)
    adversarial.load_state_dict(again, load_checkpoint(tmp_path / "state.safetensors"))
    again = trained(config, steps=7, state=again)
    assert torch.equal(drawn(whole, 2).z, drawn(again, 2).z)


@pytest.mark.parametrize(("changed", "message"), [({"noise": "x"}, "noise"), ({"adversary_rate": 0.0}, "rate")])
def test_what_cannot_be_is_refused(changed, message):
    with pytest.raises(InputError, match=message):
        adversarial.init(as_task(PROBLEM), replace(SMALL, **changed))

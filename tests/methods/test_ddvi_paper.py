"""The public recipe of DDVI: its stages move what they should, and it does not claim a bound."""

import math

import pytest
import torch
from ddvi_parts import digits_like, gradients, seeded
from torch import nn

from hsivi_cli.engine.checkpoint import pack, unpack
from hsivi_cli.errors import InputError
from hsivi_cli.methods import ddvi, ddvi_paper

PAPER = ddvi_paper.Config(steps=10, hidden=(8, 8), width=8, times=6, first_times=4, batch=16)


def test_the_papers_recipe_runs_its_stages_and_owns_up():
    task = digits_like(prior="pinwheel")
    state, generator = ddvi_paper.init(task, PAPER), seeded(15)
    moved = []
    parts = {
        "model": state.model, "x": nn.ModuleList([state.encoder.trunk, state.encoder.start]),
        "see": state.encoder.see, "first": state.encoder.first, "second": state.encoder.second,
    }  # fmt: skip
    for _ in range(10):
        before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
        metrics = ddvi_paper.step(state, None, generator)
        assert all(math.isfinite(value) for value in metrics.values())
        same = {n: all(map(torch.equal, before[n], part.parameters())) for n, part in parts.items()}
        moved.append({name for name, still in same.items() if not still})
    assert moved[0] == moved[1] == {"first"}
    assert moved[3] == moved[5] == {"model", "x", "first"}
    assert moved[6] == {"x", "see", "second"}  # the decoder rests
    assert moved[9] == {"model", "x", "see", "second"}
    found = ddvi_paper.posterior(state)
    assert not found.is_bound
    assert ddvi.Posterior(state).is_bound
    draws = found.draw(task.rows, 3, generator)
    assert draws.log_weight is None
    assert draws.z.shape == (3, 64, 2)
    assert torch.isfinite(found.pseudo_elbo(task.rows, generator)).all()
    other = ddvi_paper.init(digits_like(prior="pinwheel"), PAPER)
    ddvi_paper.load_state_dict(other, unpack(*pack(ddvi_paper.state_dict(state))))
    again = ddvi_paper.posterior(other).draw(task.rows, 2, seeded())
    assert torch.equal(again.z, found.draw(task.rows, 2, seeded()).z)
    with pytest.raises(InputError, match="--clusters"):
        ddvi_paper.init(digits_like(clusters=3), PAPER)


def test_the_papers_sleep_leaves_the_encoder_of_the_start_alone():
    state = ddvi_paper.init(digits_like(prior="pinwheel"), PAPER)
    loss = ddvi_paper._sleep_loss(state, 16, seeded())
    assert all(gradient is None for gradient in gradients(loss, state.model).values())
    assert all(gradient is None for gradient in gradients(loss, state.encoder.trunk).values())

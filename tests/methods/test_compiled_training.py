"""`--compile` in training: the networks are compiled in place; metrics and the names in state dicts stay the same."""

import pytest
import torch

from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.targets.score_net import load_score_net


def test_distillation_compiles_in_place(tiny_teacher, monkeypatch):
    graphs, compile_module = [], torch.nn.Module.compile

    def backend(graph, inputs):  # what is traced is what runs: Inductor would write code for minutes
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    courses = []
    for compiled in (False, True):
        # through the frozen critic: its graphs with and without gradients are different ones
        config = hsivi_sm.DistillConfig(
            (0, 200, 800), steps=2, objective="diffused-fisher", batch=4, critic_steps=1, rollout=4, compiled=compiled
        )
        state = hsivi_sm.init(load_score_net(tiny_teacher), config)
        draws = [generator(0, Stream.TRAIN, step) for step in (1, 2)]
        courses.append([hsivi_sm.step(state, None, each) for each in draws])
        assert bool(graphs) == compiled
    for metrics, expected in zip(courses[1], courses[0], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    tree = hsivi_sm.state_dict(state)
    assert tree["student"].keys() == tree["ema_student"].keys() == load_score_net(tiny_teacher).unet.state_dict().keys()
    torch._dynamo.reset()

"""The loop: resumption repeats the straight run, signals stop it cleanly, divergence is named."""

import os
import signal

import pytest
import torch

from hsivi_cli.engine.loop import CHECKPOINT, METRICS, Hooks, LoopConfig, resume, run_loop
from hsivi_cli.errors import InterruptError, RunError
from hsivi_cli.io.metrics_log import read_metrics


class Walk:
    """A method of one number: a random walk."""

    def __init__(self):
        self.step_count, self.x = 0, torch.zeros(())

    @property
    def step(self):
        return self.step_count


class WalkMethod:
    def init(self, target, config):
        return Walk()

    def sample(self, state, noise):
        return noise.draw(())

    def __init__(self, at=None, action=None):
        self.at, self.action = at, action

    def step(self, state, batch, generator):
        state.step_count += 1
        state.x = state.x + torch.randn((), generator=generator)
        if state.step_count == self.at:
            return {"x": self.action() or 0.0}
        return {"x": float(state.x)}

    def state_dict(self, state):
        return {"step": state.step_count, "x": state.x}

    def load_state_dict(self, state, tree):
        state.step_count, state.x = tree["step"], tree["x"]


CONFIG = LoopConfig(steps=20, seed=3, log_every=4, checkpoint_every=6)


def run(directory, method=None, state=None):
    state = state or Walk()
    run_loop(method or WalkMethod(), state, CONFIG, directory, Hooks(lambda record: None))
    return state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_resumes_to_the_same_state(tmp_path, number):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = run(tmp_path / "a")
    before = signal.getsignal(number)
    with pytest.raises(InterruptError, match="step 9"):
        run(tmp_path / "b", WalkMethod(9, lambda: os.kill(os.getpid(), number)))
    assert signal.getsignal(number) == before
    state = Walk()
    resume(WalkMethod(), state, tmp_path / "b")
    assert state.step == 9
    resumed = run(tmp_path / "b", state=state)
    assert torch.equal(straight.x, resumed.x)
    assert [r["step"] for r in read_metrics(tmp_path / "b" / METRICS)] == [4, 8, 12, 16, 20]


def test_lines_after_the_checkpoint_are_not_repeated(tmp_path):
    with pytest.raises(KeyError):  # a crash, not a request to stop: the last checkpoint is that of step 12
        run(tmp_path, WalkMethod(17, lambda: {}["crash"]))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 17, "x"')  # and a line cut short
    state = Walk()
    resume(WalkMethod(), state, tmp_path)
    assert state.step == 12
    run(tmp_path, state=state)
    assert [r["step"] for r in read_metrics(tmp_path / METRICS)] == [4, 8, 12, 16, 20]


def test_divergence_is_named_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RunError, match="x is nan at step 15"):
        run(tmp_path, WalkMethod(15, lambda: float("nan")))
    state = Walk()
    resume(WalkMethod(), state, tmp_path)
    assert state.step == 12
    assert (tmp_path / CHECKPOINT).is_file()

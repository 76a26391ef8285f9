"""The loop in several processes: one writes, and a slow one is neither overtaken nor led elsewhere."""

import time
from contextlib import nullcontext

import pytest
import torch
from several import in_processes

from hsivi_cli.engine import loop, processes
from hsivi_cli.engine.loop import Hooks, LoopConfig, resume, run_loop
from hsivi_cli.errors import InputError, InterruptError
from hsivi_cli.io.metrics_log import read_metrics
from hsivi_cli.io.run_directory import METRICS, checkpoints

CONFIG = LoopConfig(steps=20, seed=3, log_every=4, checkpoint_every=3, rollbacks=2)


class Walk:
    """A walk whose steps 11 to 15 cannot be made at the full rate."""

    def __init__(self):
        self.step, self.x, self.lr_scale = 0, torch.zeros(()), 1.0


class Method:
    def step(self, state, batch, generator):
        state.step += 1
        skipped = 11 <= state.step <= 15 and state.lr_scale == 1
        if not skipped:
            state.x = state.x + state.lr_scale * torch.randn((), generator=generator)
        return {"x": float(state.x), "skipped": float(skipped)}

    def state_dict(self, state):
        return {"step": state.step, "x": state.x}

    def load_state_dict(self, state, tree):
        state.step, state.x = tree["step"], tree["x"]


def walked(directory, slow):
    """The end of a walk in which process `slow` is late wherever it reads; and what it was told."""
    processes.start("cpu")
    if processes.rank() == slow:
        for name in ("checkpoints", "load_newest"):
            late(name)
    state, told = Walk(), []
    run_loop(Method(), state, CONFIG, directory, Hooks(lambda record: None, tell=told.append))
    return float(state.x), state.lr_scale, told


def late(name):
    read = getattr(loop, name)

    def later(*arguments):
        time.sleep(0.3)
        return read(*arguments)

    setattr(loop, name, later)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_roll_back_is_everybodys(tmp_path, slow):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = walked(tmp_path / "one", None)
    assert one[1] == 0.5
    assert len(one[2]) == 1
    assert in_processes(2, walked, tmp_path / "two", slow) == [one, one]
    logs = [[r["x"] for r in read_metrics(tmp_path / name / METRICS)] for name in ("one", "two")]
    assert logs[0] == logs[1]
    assert [p.name for p in checkpoints(tmp_path / "one")] == [p.name for p in checkpoints(tmp_path / "two")]


def stale(directory):
    """A walk in which process 1 does not see the newest checkpoint when it lists them."""
    processes.start("cpu")
    processes.GRACE = 0.5
    if processes.rank() == 1:
        loop.checkpoints = lambda directory: checkpoints(directory)[1:]
    return walked(directory, None)


def test_a_roll_back_goes_to_the_checkpoint_that_the_first_process_names(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = walked(tmp_path / "one", None)
    assert in_processes(2, stale, tmp_path / "two") == [one, one]


def apart(directory):
    """Resume where process 1 sees another file system, with an older checkpoint."""
    processes.start("cpu")
    processes.GRACE = 0.5
    state = Walk()
    if processes.rank() == 1:
        loop.checkpoints = lambda directory: checkpoints(directory)[1:]
    try:
        resume(Method(), state, directory)
        processes.agree_on_largest(0)
    except Exception as err:
        return type(err), str(err)
    return None


def test_processes_that_see_different_files_are_refused(tmp_path):
    walked(tmp_path, None)
    first, second = in_processes(2, apart, tmp_path)
    assert second == (InputError, second[1])
    assert "where all machines see the same files" in second[1]
    assert "has ended" in first[1]


def stopped(directory):
    processes.start("cpu")
    state = Walk()
    request = InterruptError if processes.rank() == 1 else None
    loop._stop_requests = lambda: nullcontext(lambda: request if state.step == 5 else None)
    with pytest.raises(InterruptError, match="step 5"):
        run_loop(Method(), state, CONFIG, directory, Hooks(lambda record: None))
    return state.step, [p.name for p in checkpoints(directory)]


def test_a_request_to_one_stops_all_after_the_same_step(tmp_path):
    found = in_processes(2, stopped, tmp_path)
    assert found[0] == found[1]
    assert found[0][0] == 5

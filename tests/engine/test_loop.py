"""The loop: resumption repeats the straight run, signals stop it cleanly, divergence is named."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from hsivi_cli.engine import loop
from hsivi_cli.engine.checkpoint import pack
from hsivi_cli.engine.loop import METRICS, Hooks, LoopConfig, resume, run_loop
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError, InterruptError, RunError, TerminatedError
from hsivi_cli.io.metrics_log import read_metrics
from hsivi_cli.io.run_directory import CHECKPOINT, checkpoints


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


def names(directory):
    return [path.name for path in checkpoints(directory)]


@pytest.mark.parametrize(
    ("number", "error", "code"), [(signal.SIGINT, InterruptError, 130), (signal.SIGTERM, TerminatedError, 143)]
)
def test_interrupted_run_resumes_to_the_same_state(tmp_path, number, error, code):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    straight = run(tmp_path / "a")
    before = signal.getsignal(number)
    with pytest.raises(InterruptError, match="step 9") as raised:
        run(tmp_path / "b", WalkMethod(9, lambda: os.kill(os.getpid(), number)))
    assert (type(raised.value), raised.value.exit_code) == (error, code)
    assert signal.getsignal(number) == before
    state = Walk()
    resume(WalkMethod(), state, tmp_path / "b")
    assert state.step == 9
    resumed = run(tmp_path / "b", state=state)
    assert torch.equal(straight.x, resumed.x)
    assert [r["step"] for r in read_metrics(tmp_path / "b" / METRICS)] == [4, 8, 12, 16, 20]


def test_every_step_is_told_before_its_log_line(tmp_path):
    told = []
    hooks = Hooks(lambda record: told.append(f"line {record['step']}"), on_step=told.append)
    run_loop(WalkMethod(), Walk(), replace(CONFIG, steps=5), tmp_path, hooks)
    assert told == [1, 2, 3, 4, "line 4", 5, "line 5"]


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
    assert names(tmp_path) == ["checkpoint-000012.safetensors", "checkpoint-000006.safetensors"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_loop(WalkMethod(), Walk(), replace(CONFIG, steps=30, keep=3), tmp_path, Hooks(lambda record: None))
    assert names(tmp_path) == [f"checkpoint-0000{step}.safetensors" for step in (30, 24, 18)]


def test_a_run_of_an_earlier_version_goes_on_from_its_only_checkpoint(tmp_path):
    (tmp_path / "straight").mkdir()
    straight = run(tmp_path / "straight")
    state = Walk()
    for step in range(1, 8):
        WalkMethod().step(state, None, generator(CONFIG.seed, Stream.TRAIN, step))
    tensors, structure = pack(WalkMethod().state_dict(state))
    save_file(tensors, tmp_path / CHECKPOINT, {"structure": json.dumps(structure)})
    state = Walk()
    resume(WalkMethod(), state, tmp_path)
    assert state.step == 7
    assert torch.equal(run(tmp_path, state=state).x, straight.x)
    assert names(tmp_path) == ["checkpoint-000020.safetensors", "checkpoint-000018.safetensors"]


def flip(path, offset=-3):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path):
    (tmp_path / "straight").mkdir()
    straight = run(tmp_path / "straight")
    with pytest.raises(KeyError):
        run(tmp_path, WalkMethod(17, lambda: {}["crash"]))
    flip(tmp_path / "checkpoint-000012.safetensors")
    with pytest.raises(InputError, match=r"checksum: remove it to go on from checkpoint-000006\.safetensors$"):
        resume(WalkMethod(), Walk(), tmp_path)  # with nobody to tell
    state, told = Walk(), []
    progress = resume(WalkMethod(), state, tmp_path, told.append)
    assert state.step == 6
    (line,) = told
    assert line.endswith(
        "checkpoint-000012.safetensors is damaged: it does not match its checksum: going on from "
        "checkpoint-000006.safetensors"
    )
    run_loop(WalkMethod(), state, CONFIG, tmp_path, Hooks(lambda record: None), progress)
    assert torch.equal(state.x, straight.x)
    for path in checkpoints(tmp_path):
        flip(path)
    with pytest.raises(InputError, match=r"000020.* no checkpoint beside it is whole"):
        resume(WalkMethod(), Walk(), tmp_path, told.append)


class Rough(Walk):
    """A walk whose steps get shorter as the loop lowers its rate."""

    def __init__(self):
        super().__init__()
        self.lr_scale = 1.0


class RoughMethod(WalkMethod):
    """Skips the steps for which `bad(step, lr_scale)`; `seen` are the steps made with their rates."""

    def __init__(self, bad, crash_at=None):
        super().__init__()
        self.bad, self.crash_at, self.seen = bad, crash_at, []

    def step(self, state, batch, generator):
        state.step_count += 1
        self.seen.append((state.step_count, state.lr_scale))
        if len(self.seen) == self.crash_at:
            raise KeyError("crash")
        move = torch.randn((), generator=generator)
        if self.bad(state.step_count, state.lr_scale):
            return {"x": math.nan, "skipped": 1.0}
        state.x = state.x + state.lr_scale * move
        return {"x": float(state.x), "skipped": 0.0}


ROUGH = LoopConfig(steps=40, seed=3, log_every=4, checkpoint_every=6, rollbacks=3)


def rough(directory, method, config=ROUGH):
    """Run, resumed if there is something to resume; returns the state and what was told."""
    state, told = Rough(), []
    progress = resume(method, state, directory, told.append) if checkpoints(directory) else None
    run_loop(method, state, config, directory, Hooks(lambda record: None, tell=told.append), progress)
    return state, told


def log(directory):
    return [{k: v for k, v in r.items() if k != "seconds_per_step"} for r in read_metrics(directory / METRICS)]


def test_single_steps_are_skipped_counted_and_left_out_of_the_means(tmp_path):
    state, told = rough(tmp_path, RoughMethod(lambda step, _: step in (5, 6, 7, 8, 10)))
    assert not told
    assert [r["skipped"] for r in log(tmp_path)] == [0, 4, 5, 5, 5, 5, 5, 5, 5, 5]
    assert log(tmp_path)[1]["x"] is None  # all four were skipped
    assert log(tmp_path)[2]["x"] is not None
    assert state.lr_scale == 1


BURSTS = {
    "five in a row": (lambda step, scale: step >= 20 and scale == 1, 24, 18),
    "ten of a hundred": (lambda step, scale: step % 3 == 1 and scale == 1, 28, 24),
    "before the first checkpoint": (lambda step, scale: scale == 1, 5, 0),
}


@pytest.mark.parametrize(("bad", "end", "start"), BURSTS.values(), ids=BURSTS)
def test_a_burst_rolls_back_to_the_last_checkpoint_at_half_the_rate(tmp_path, bad, end, start):
    method = RoughMethod(bad)
    state, (told,) = rough(tmp_path, method)
    assert f"x is nan at step {end}" in told
    assert told.endswith(f"back to step {start}, with 0.5 of the learning rate")
    assert method.seen == [(i, 1.0) for i in range(1, end + 1)] + [(i, 0.5) for i in range(start + 1, 41)]
    assert [r["step"] for r in log(tmp_path)] == list(range(4, 41, 4))
    assert log(tmp_path)[-1]["rollbacks"] == 1
    assert state.step == 40


@pytest.mark.parametrize(("bad", "end", "start"), BURSTS.values(), ids=BURSTS)
def test_wherever_it_is_killed_a_resumed_run_repeats_skips_and_roll_backs(tmp_path, bad, end, start):
    (tmp_path / "straight").mkdir()
    straight, _ = rough(tmp_path / "straight", RoughMethod(bad))
    for crash_at in {2, end - 2, end, end + 1, end + 2, end + 8}:
        directory = tmp_path / str(crash_at)
        directory.mkdir()
        with pytest.raises(KeyError):
            rough(directory, RoughMethod(bad, crash_at))
        resumed, _ = rough(directory, RoughMethod(bad))
        assert torch.equal(resumed.x, straight.x)
        assert resumed.lr_scale == straight.lr_scale == 0.5
        assert log(directory) == log(tmp_path / "straight")


def test_roll_backs_that_do_not_help_go_further_back_and_end_with_the_reason(tmp_path):
    method = RoughMethod(lambda step, scale: step >= 20)
    told = []
    with pytest.raises(RunError, match=r"^diverged: x is nan at step 24, .* skipped, after 3 roll-backs .*lower --lr$"):
        run_loop(method, Rough(), ROUGH, tmp_path, Hooks(lambda record: None, tell=told.append))
    assert [line.split(": ")[-1] for line in told] == [
        "back to step 18, with 0.5 of the learning rate",
        "back to step 12, with 0.25 of the learning rate",  # 18 may have been bad already
        "back to step 18, with 0.125 of the learning rate",
    ]
    state = Rough()
    assert resume(method, state, tmp_path).rollbacks == 3
    assert state.lr_scale == 0.125
    with pytest.raises(RunError, match="after 3 roll-backs"):  # a resumed run has not forgotten
        rough(tmp_path, RoughMethod(lambda step, scale: step >= 20))


def test_weights_that_are_not_finite_are_never_saved_nor_shown(tmp_path):
    shown = []

    class Poisoned(RoughMethod):
        def step(self, state, batch, generator):
            metrics = super().step(state, batch, generator)
            if state.step_count == 11 and state.lr_scale == 1:
                state.x = state.x * math.inf
            return metrics | {"x": 0.0}

    state, told = Rough(), []
    hooks = Hooks(lambda record: None, lambda step: shown.append(float(state.x)) or {}, tell=told.append)
    run_loop(Poisoned(lambda *_: False), state, replace(ROUGH, preview_every=4), tmp_path, hooks)
    assert told == ["x holds values that are not finite at step 12: back to step 6, with 0.5 of the learning rate"]
    assert all(math.isfinite(x) for x in shown)
    assert math.isfinite(state.x)


def test_a_second_sigterm_waits_for_the_checkpoint_and_a_second_ctrl_c_does_not(tmp_path):
    def stop(*numbers):
        for number in numbers:
            os.kill(os.getpid(), number)

    with pytest.raises(TerminatedError):
        run(tmp_path, WalkMethod(9, lambda: stop(signal.SIGTERM, signal.SIGTERM)))
    assert names(tmp_path)[0] == "checkpoint-000009.safetensors"
    for first in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, WalkMethod(9, lambda first=first: stop(first, signal.SIGINT)))


def test_a_signal_in_the_last_step_is_told_to_the_caller(tmp_path):
    for number, error in ((signal.SIGINT, InterruptError), (signal.SIGTERM, TerminatedError)):
        method = WalkMethod(20, lambda number=number: os.kill(os.getpid(), number))
        assert run_loop(method, Walk(), CONFIG, tmp_path, Hooks(lambda record: None)) is error


def test_where_a_roll_back_goes_depends_on_neither_clocks_nor_signals_nor_keep(tmp_path, monkeypatch):
    bad = BURSTS["five in a row"][0]
    (tmp_path / "straight").mkdir()
    straight, _ = rough(tmp_path / "straight", RoughMethod(bad))

    class Stopped(RoughMethod):
        def step(self, state, batch, generator):
            if state.step_count in (18, 20):  # after a regular checkpoint, and during a burst
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(state, batch, generator)

    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)  # after every good step
    directory = tmp_path / "stopped"
    directory.mkdir()
    config = replace(ROUGH, keep=1, preview_every=5)
    with pytest.raises(TerminatedError, match="step 19"):
        rough(directory, Stopped(bad), config)
    assert names(directory) == [f"checkpoint-{step:06d}.safetensors" for step in (19, 18, 12, 6)]
    with pytest.raises(TerminatedError, match="step 18"):  # asked to stop in the burst, it rolls back first
        rough(directory, Stopped(bad), config)
    resumed, _ = rough(directory, RoughMethod(bad), config)
    assert torch.equal(resumed.x, straight.x)


def test_with_many_kept_a_roll_back_goes_to_one_of_those_that_are_kept_in_any_case(tmp_path):
    """Three damaged regular checkpoints end a run, as where --keep leaves no more; a fourth would be another course."""

    class Damaging(RoughMethod):
        def step(self, state, batch, generator):
            if state.step_count == 32:
                for path in checkpoints(tmp_path)[:3]:
                    flip(path)
            return super().step(state, batch, generator)

    method = Damaging(lambda step, scale: step >= 32 and scale == 1)
    with pytest.raises(InputError, match=r"000030\..* no checkpoint beside it is whole"):
        rough(tmp_path, method, replace(ROUGH, keep=9))
    assert names(tmp_path) == [f"checkpoint-{step:06d}.safetensors" for step in (30, 24, 18, 12, 6, 0)]


def test_nothing_is_shown_or_saved_at_a_skipped_step_but_the_last(tmp_path):
    shown = []
    state = Rough()
    hooks = Hooks(lambda record: None, lambda step: shown.append(step) or {})
    config = replace(ROUGH, preview_every=6)
    run_loop(RoughMethod(lambda step, _: step in (12, 40)), state, config, tmp_path, hooks)
    assert shown == [6, 18, 24, 30, 36, 40]
    assert names(tmp_path)[0] == "checkpoint-000040.safetensors"


def test_a_run_in_which_nothing_was_learned_is_no_success(tmp_path):
    config = replace(ROUGH, steps=3)
    with pytest.raises(RunError, match="every step was skipped"):
        run_loop(RoughMethod(lambda step, _: True), Rough(), config, tmp_path, Hooks(lambda record: None))

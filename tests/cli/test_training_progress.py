"""A long run must not flood a log, nor leave it silent; its pace is that of this process alone."""

import io
import json
import time

import pytest
from rich.console import Console

from hsivi_cli.cli import console, training_progress
from hsivi_cli.cli.app import main
from hsivi_cli.cli.training_progress import Pace, follow

SMALL = ["--batch", "4", "--critic-steps", "1", "--preview-every", "0", "--warmup", "0"]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_the_pace_leaves_out_setting_up_and_the_first_step():
    clock = Clock()
    pace = Pace(10, clock)
    clock.now += 60.0
    pace.at(1)
    assert pace.seconds_per_step is None
    assert str(pace) == ""
    for step in (2, 3):
        clock.now += 2.0
        pace.at(step)
    assert pace.seconds_per_step == 2.0
    assert pace.seconds_left == 14.0
    clock.now += 1.5
    assert pace.seconds_left == 12.5  # it counts down between steps
    clock.now += 100.0
    assert pace.seconds_left == 0.0


@pytest.mark.parametrize("taken_up_at", [501, 3])
def test_the_pace_begins_anew_where_a_run_is_taken_up(taken_up_at):
    """After a resumption it is the first step of all; after a roll-back it comes below the last."""
    clock = Clock()
    pace = Pace(1000, clock)
    if taken_up_at < 500:
        for step in range(1, 10):
            clock.now += 9.0
            pace.at(step)
    for step in range(taken_up_at, taken_up_at + 3):
        clock.now += 2.0
        pace.at(step)
    assert pace.seconds_per_step == 2.0


def test_a_log_gets_a_line_at_once_one_soon_and_then_one_every_half_minute(clock, capsys):
    with follow("NFE 5", 2000) as follower:
        for step in range(1, 2001):
            clock.now += 0.5
            follower.on_step(step)
            if step % 10 == 0:
                follower.on_log({"step": step}, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "NFE 5  step 1/2000"
    assert lines[1] == "NFE 5  step 11/2000  0.50 s/step  about 17 min left  loss 10"
    assert lines[2].startswith("NFE 5  step 71/2000")
    assert lines[-1] == "NFE 5  step 2000/2000  0.50 s/step  took 17 min  loss 2000"
    assert len(lines) == 2 + (1000 - 5) // 30 + 1


def test_slow_steps_get_a_line_each(clock, capsys):
    with follow("training", 3) as follower:
        for step in (1, 2, 3):
            clock.now += 40.0
            follower.on_step(step)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["1/3", "2/3", "3/3"]


def test_nothing_is_said_of_a_training_that_was_finished_before(capsys):
    with follow("NFE 5", 10):
        pass
    assert capsys.readouterr().err == ""


def test_a_failure_adds_no_line(capsys):
    with pytest.raises(KeyboardInterrupt), follow("NFE 5", 10) as follower:
        follower.on_step(1)
        follower.on_step(2)
        raise KeyboardInterrupt
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_terminal_gets_a_bar_that_leaves_its_last_state(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, legacy_windows=False, color_system=None)
    monkeypatch.setattr(console, "story_terminal", lambda: terminal)
    with follow("NFE [5]", 3) as follower:
        assert screen.getvalue() == ""
        for step in (1, 2, 3):
            follower.on_step(step)
            follower.on_log({"step": step}, f"loss {step}")
    last = screen.getvalue().rsplit("NFE [5]", 1)[1]
    assert "3/3" in last
    assert "took" in last
    assert "loss 3" in last


def test_a_distillation_says_how_it_stands_in_few_lines(tiny_teacher, tmp_path, capsys):
    arguments = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2", "--steps", "30", *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("NFE 2  step")]
    assert lines[0] == "NFE 2  step 1/30"
    assert lines[-1].startswith("NFE 2  step 30/30  ")
    assert "mismatch" in lines[-1]
    assert "too early to tell" in lines[-1]
    assert len(lines) <= 3
    assert main([*arguments, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "NFE 2  step" not in capsys.readouterr().err


def test_the_last_fid_stays_in_view(tiny_teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_progress, "SECONDS_TO_SECOND_LINE", 0.001)
    monkeypatch.setattr(training_progress, "SECONDS_BETWEEN_LINES", 0.0)
    arguments = ["--reference", "digits", "--fid-images", "8", "--preview-every", "4", "--steps", "7", *SMALL[:-4]]
    command = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2", "--out", str(tmp_path / "run"), *arguments]
    assert main([*command, "--critic-steps", "1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("NFE 2  step")]
    records = [json.loads(line) for line in (tmp_path / "run/training/nfe2/metrics.jsonl").read_text().splitlines()]
    assert f"fid@8 {records[0]['fid@8']:.4f} (step 4)" in lines[-2]
    assert f"fid@8 {records[-1]['fid@8']:.4f} (step 7)" in lines[-1]


def test_tensorboard_sees_what_the_metrics_file_holds(tiny_teacher, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    work = tmp_path / "run" / "training" / "nfe2"
    command = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2", "--steps", "25", *SMALL]
    assert main([*command, "--out", str(tmp_path / "run"), "--tensorboard"]) == 0
    events = EventAccumulator(str(work))
    events.Reload()
    records = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    points = [(point.step, point.value) for point in events.Scalars("critic_loss")]
    assert points == [(record["step"], pytest.approx(record["critic_loss"])) for record in records]
    assert {"mismatch", "critic_error", "log_gamma"} <= set(events.Tags()["scalars"])


def test_event_files_do_not_keep_a_failed_run(tiny_teacher, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from hsivi_cli.errors import RunError
    from hsivi_cli.methods import hsivi_sm

    steps, step = [], hsivi_sm.step

    def failing(*arguments):
        steps.append(step(*arguments))
        if len(steps) == 3:
            raise RunError("no more")
        return steps[-1]

    monkeypatch.setattr(hsivi_sm, "step", failing)
    command = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2", "--steps", "5", *SMALL]
    assert main([*command, "--out", str(tmp_path / "run"), "--tensorboard"]) == 1
    assert len(steps) == 3
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["train", "--data", "digits", "--out", str(tmp_path / "t"), "--tensorboard"]) == 2
    assert "pip install 'hsivi[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_the_result_goes_to_stdout_after_a_bar(tiny_teacher, tmp_path, monkeypatch, capsys):
    """The bar and the guard of stdout both put something in its place: each must take back what it put."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, legacy_windows=False)
    monkeypatch.setattr(console, "story_terminal", lambda: terminal)
    command = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2,3", "--steps", "2", *SMALL]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert main(["train", "--data", "digits", "--steps", "2", "--channels", "8", "--out", str(tmp_path / "t")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 't'}\n"
    assert "2/2" in screen.getvalue()

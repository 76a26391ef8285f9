"""A run is read while others write it, whatever state it was left in."""

import json
import os
import subprocess
import sys

import pytest

from hsivi_cli.engine.run_view import view_run
from hsivi_cli.errors import InputError


def a_run(path, steps=100, grids=None, **logs):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"steps": steps} | ({"grids": grids} if grids else {})))
    for name, records in logs.items():
        folder = path if name == "own" else path / "training" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(*steps, **also):
    return [{"step": step, "loss": 1.0 / step, "seconds_per_step": 0.5} | also for step in steps]


def test_a_training_half_way(tmp_path):
    view = view_run(a_run(tmp_path / "run", own=records(10, 20, 30)))
    (training,) = view.trainings
    assert (training.name, training.step, training.steps, training.seconds_left) == ("", 30, 100, 35.0)
    assert training.curves["loss"] == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
    assert not training.finished
    assert not view.finished
    assert view.process is None
    assert training.advice is None


def test_students_come_in_the_order_of_the_run_and_those_to_come_are_named(tmp_path):
    run = a_run(tmp_path / "run", grids={"10": [0, 1], "5": [0, 1], "3": [0, 1]}, nfe5=records(10), nfe10=records(100))
    view = view_run(run)
    assert [(t.name, t.step, t.finished) for t in view.trainings] == [
        ("nfe10", 100, True),
        ("nfe5", 10, False),
        ("nfe3", 0, False),
    ]
    assert view.trainings[2].curves == {}
    assert view.trainings[2].written is None


def test_a_distillation_is_judged_as_its_progress_line_judges_it(tmp_path):
    logged = records(*range(10, 310, 10), fisher=0.4, critic_gap=0.6)
    (training,) = view_run(a_run(tmp_path / "run", grids={"5": [0, 1]}, nfe5=logged)).trainings
    assert training.advice == "healthy"
    assert training.curves["mismatch"][-1] == (300, 0.5)
    assert training.curves["critic_error"][-1] == (300, pytest.approx(0.1))
    assert "fisher" not in training.curves
    assert list(training.curves)[:3] == ["mismatch", "critic_error", "loss"]


def test_cut_lines_and_values_that_are_no_numbers_are_left_out(tmp_path):
    run = a_run(tmp_path / "run", own=records(10, 20))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": NaN, "text": "x", "flag": true}\n[1]\n{"step": "x"}\n{"step": 40, "lo')
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00")
    (training,) = view_run(run).trainings
    assert training.step == 30
    assert [step for step, _ in training.curves["loss"]] == [10, 20]
    assert set(training.curves) == {"loss"}
    assert training.seconds_per_step is None


def test_a_run_that_has_not_begun(tmp_path):
    view = view_run(a_run(tmp_path / "run"))
    assert view.trainings == ()
    assert not view.finished
    (tmp_path / "run" / "config.json").write_text('{"st')
    with pytest.raises(InputError, match="does not exist"):
        view_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no run"):
        view_run(tmp_path / "empty")
    runs = tmp_path / "runs"
    runs.mkdir()
    a_run(runs / "run", own=records(10))
    with pytest.raises(InputError, match="is no run"):
        view_run(runs)  # it holds one
    assert view_run(tmp_path / "run").trainings == ()  # its configuration is being written


def test_a_fit_is_finished_when_it_has_reported(tmp_path):
    run = a_run(tmp_path / "run", steps=None, own=records(10))
    (run / "config.json").write_text(json.dumps({"kind": "posterior", "steps": None}))
    assert not view_run(run).finished
    (run / "report.json").write_text("{}")
    assert view_run(run).finished
    assert view_run(run).trainings[0].seconds_left is None


def test_the_writer_is_named_while_it_lives_and_its_lock_is_left_alone(tmp_path):
    run = a_run(tmp_path / "run", own=records(10))
    script = (
        "import sys, time; from pathlib import Path; from hsivi_cli.io.run_directory import lock_run\n"
        f"with lock_run(Path({str(run)!r})): print('locked', flush=True); sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        before = (run / ".lock").stat()
        assert view_run(run).process == process.pid
        assert (run / ".lock").stat() == before
        process.kill()
    assert (run / ".lock").is_file()  # left behind by the kill
    assert view_run(run).process is None


def test_a_lock_that_says_nothing_is_no_process(tmp_path):
    run = a_run(tmp_path / "run", own=records(10))
    for text in ("", "x", "999999999999999999999", "-1"):
        (run / ".lock").write_text(text)
        assert view_run(run).process is None, text
    (run / ".lock").write_text(str(os.getpid()))
    assert view_run(run).process == os.getpid()

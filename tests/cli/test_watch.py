"""`hsivi watch` on runs of every kind and state; off a terminal it prints once."""

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hsivi_cli.cli import console
from hsivi_cli.cli.app import main
from hsivi_cli.cli.watch import BLOCKS, sparkline


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 80))
def test_a_sparkline_is_as_wide_as_asked_or_as_there_are_values(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set(BLOCKS)


def test_a_sparkline_follows_its_values():
    assert sparkline(range(8), 8) == BLOCKS
    assert sparkline([3.0, 3.0], 8) == BLOCKS[0] * 2
    assert sparkline([0, 0, 7, 7], 2) == BLOCKS[0] + BLOCKS[-1]
    with pytest.raises(ValueError, match="values"):
        sparkline([], 3)


def test_one_spike_does_not_flatten_what_follows():
    falling = [1e6, *(1.0 / step for step in range(1, 60))]
    assert len(set(sparkline(falling, 60)[1:])) > 4


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    work = path / "training" / "nfe5"
    work.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"steps": 100, "grids": {"5": [0, 1], "3": [0, 1]}}))
    lines = [
        {"step": step, "fisher": 0.4, "critic_gap": 0.6, "critic_loss": 10.0 - step / 10, "seconds_per_step": 2.0}
        | ({"fid@8": 100.0 - step} if step % 20 == 0 else {})
        for step in range(10, 70, 10)
    ]
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_that_was_stopped(run, capsys):
    assert main(["watch", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run}: no process writes it, last written ")
    assert "--resume" in lines[0]
    assert "nfe5  step 60/100  2.00 s/step" in lines
    assert "nfe3  nothing logged yet" in lines
    critic = next(line for line in lines if line.startswith("critic loss"))
    assert critic.split() == ["critic", "loss", "4", "█▇▅▄▂▁", "4", "..", "9"]
    assert "fid@8 at step 20: 80  40: 60  60: 40; lowest 40 at 60" in lines
    assert "too early to tell" in lines


def test_a_run_that_is_being_written_says_how_long_it_takes(run, capsys):
    from hsivi_cli.io.run_directory import lock_run

    with lock_run(run):
        assert main(["watch", str(run), "--once"]) == 0
    out = capsys.readouterr().out
    assert "running as process" in out
    assert "nfe5  step 60/100  2.00 s/step  about 1 min 20 s left" in out


def test_paths_with_brackets_and_non_finite_values(tmp_path, capsys):
    path = tmp_path / "a[b]c"
    path.mkdir()
    (path / "config.json").write_text('{"steps": 5}')
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": math.nan, "bold[red]": 2.0}) + "\n")
    assert main(["watch", str(path)]) == 0
    out = capsys.readouterr().out
    assert "a[b]c" in out
    assert "bold[red]" in out


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    for path in (tmp_path / "none", tmp_path):
        assert main(["watch", str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.err.strip().count("\n") == 0
        assert captured.out == ""


def test_on_a_terminal_it_redraws_until_the_run_is_finished(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    looks = []

    def look(screen, live):
        looks.append(live)
        return f"look {len(looks)}", len(looks) == 3

    screen = Terminal()
    monkeypatch.setattr(console, "stdout", lambda: screen)
    monkeypatch.setenv("TERM", "xterm")
    console.result_watch(look, 0.0, once=False)
    assert looks == [True, True, True]
    assert "look 3" in screen.getvalue()


def test_leaving_with_control_c_is_no_failure(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def leave(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "stdout", Terminal)
    monkeypatch.setattr("time.sleep", leave)
    console.result_watch(lambda screen, live: ("x", False), 1.0, once=False)


def test_without_unicode_the_curves_are_plain(run):
    from hsivi_cli.cli.watch import _look
    from hsivi_cli.engine.run_view import view_run

    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    screen = Console(file=file, width=100)
    screen.print(_look(view_run(run), screen, False)[0])
    file.flush()
    assert "#" in file.buffer.getvalue().decode("ascii")

"""Event files that TensorBoard reads, and that never go back in time."""

import importlib.util
import math

import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.io.event_log import EVENTS, EventLog

pytest.importorskip("tensorboard")


def written(directory, name="loss"):
    """What TensorBoard shows of this scalar: steps and values, in its own order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(point.step, round(point.value, 4)) for point in events.Scalars(name)]


def log(directory, steps, value, every=1):
    events = EventLog(directory)
    for step in steps:
        events.on_step(step)
        if step % every == 0:
            events.add({"step": step, "loss": value, "text": "x", "bad": math.nan, "flag": None})
    return events


def test_finite_numbers_are_written_at_their_steps(tmp_path):
    log(tmp_path, range(1, 4), 0.5).close()
    assert written(tmp_path) == [(1, 0.5), (2, 0.5), (3, 0.5)]
    with pytest.raises(KeyError):
        written(tmp_path, "bad")


def test_a_resumed_run_replaces_the_steps_that_it_takes_again(tmp_path):
    log(tmp_path, range(1, 36), 1.0, every=10)  # killed after step 35: never closed
    log(tmp_path, range(21, 51), 2.0, every=10).close()  # from a checkpoint of step 20
    assert written(tmp_path) == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]


def test_so_does_a_roll_back_within_a_run(tmp_path):
    events = log(tmp_path, [*range(1, 36)], 1.0, every=10)
    for step in range(21, 31):
        events.on_step(step)
    events.add({"loss": 3.0})
    events.close()
    assert written(tmp_path) == [(10, 1.0), (20, 1.0), (30, 3.0)]


def test_a_file_cut_short_by_a_kill_is_no_hindrance(tmp_path):
    log(tmp_path, range(1, 4), 1.0).close()
    (file,) = tmp_path.glob(f"{EVENTS}*")
    file.write_bytes(file.read_bytes()[:-7])
    log(tmp_path, range(3, 5), 2.0).close()
    assert written(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'hsivi\[tensorboard\]'"):
        EventLog(tmp_path)

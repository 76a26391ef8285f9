"""Run directories: a failed first run blocks nothing and costs nobody's files, and one process writes at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.run_directory import CHECKPOINT, CONFIG, LOCK, METRICS, check_free, check_run, run_directory

PLAN = {"method": "x", "lr": 0.1}


def fail(directory, error, leave=(), plan=PLAN, resume=False):
    """A run that writes the files `leave` and then fails."""
    with run_directory(directory, plan, resume) as had_run:
        for name in leave:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text("x")
        raise error
    return had_run


def finish(directory, plan=PLAN, resume=False):
    with run_directory(directory, plan, resume) as had_run:
        (directory / CHECKPOINT).write_text("x")
    return had_run


LITTER = (METRICS, "training/nfe5/metrics.jsonl", "training/nfe5/samples-000020.png", "training/.nfe5.0a.tmp/half")


@pytest.mark.parametrize("error", [RunError("diverged"), InputError("bad reference"), KeyboardInterrupt(), KeyError()])
def test_a_failed_first_run_leaves_nothing(tmp_path, error):
    out = tmp_path / "deep" / "run"
    with pytest.raises(type(error)) as raised:
        fail(out, error, LITTER)
    assert raised.value is error  # nothing is kept, so there is nothing to add
    assert list(tmp_path.iterdir()) == []
    assert not finish(out)
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, CONFIG]


def test_a_directory_that_was_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError):
        fail(tmp_path / "run", RunError("diverged"), LITTER)
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]
    assert not finish(tmp_path / "run")


@pytest.mark.parametrize("product", [CHECKPOINT, "nfe5/unet/model.safetensors", "thesis.tex", ".nfe5.0a.tmp.old/w"])
def test_what_is_worth_keeping_is_kept_and_the_line_says_how_to_go_on(tmp_path, product):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=r"^diverged; .*run is kept: --resume goes on with it, another --out starts"):
        fail(out, RunError("diverged"), (*LITTER, product))
    assert (out / product).read_text() == "x"
    assert (out / METRICS).is_file()
    with pytest.raises(InputError, match="--resume"):
        finish(out)
    assert finish(out, resume=True)


def test_a_full_disk_is_one_line(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / METRICS))
    with pytest.raises(RunError, match=r"disk is full, .*metrics\.jsonl was not written: make room and try again$"):
        fail(tmp_path / "run", full)
    with pytest.raises(RunError, match=r"disk is full.*--resume"):
        fail(tmp_path / "run", full, [CHECKPOINT])


def killed(out, leave=LITTER):
    """What SIGKILL leaves of a run: nobody could clean up."""
    out.mkdir()
    (out / LOCK).write_text("4000000\n")  # of a process that is no more
    (out / CONFIG).write_text('{"method": "x", "lr": 0.1}')
    for name in leave:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")


def test_the_same_command_works_after_a_kill_before_the_first_checkpoint(tmp_path):
    killed(tmp_path / "run")
    with pytest.raises(InputError, match="exists already"):  # of another configuration, it might be wanted
        finish(tmp_path / "run", PLAN | {"lr": 0.2})
    assert check_run(tmp_path / "run", PLAN, resume=False)
    assert finish(tmp_path / "run")
    killed(tmp_path / "other", (*LITTER, "nfe5/unet/model.safetensors"))
    with pytest.raises(InputError, match="exists already: add --resume"):
        finish(tmp_path / "other")


def test_a_failed_resumption_keeps_the_run(tmp_path):
    finish(tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        fail(tmp_path / "run", RunError("diverged"), resume=True)
    assert (tmp_path / "run" / CHECKPOINT).is_file()


def test_a_run_is_held_by_one_at_a_time(tmp_path):
    out = tmp_path / "run"
    with run_directory(out, PLAN, False):
        for resume in (False, True):
            with pytest.raises(InputError, match=f"run is in use by process {os.getpid()}: "):
                finish(out, resume=resume)
            with pytest.raises(InputError, match="in use"):
                check_run(out, PLAN, resume)
        (out / CHECKPOINT).write_text("x")
    assert not (out / LOCK).exists()
    check_free(out)
    assert finish(out, resume=True)


def test_a_lock_vanishes_with_its_process(tmp_path):
    out = tmp_path / "run"
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from hsivi_cli.io.run_directory import run_directory
        with run_directory(Path(sys.argv[1]), {"method": "x", "lr": 0.1}, False):
            (Path(sys.argv[1]) / "checkpoint.safetensors").write_text("x")
            print("held", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by process {process.pid}:"):
            finish(out, resume=True)
        os.kill(process.pid, signal.SIGKILL)
    assert (out / LOCK).read_text() == f"{process.pid}\n"
    assert finish(out, resume=True)


def test_of_many_that_start_together_one_wins(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from hsivi_cli.errors import InputError
        from hsivi_cli.io.run_directory import lock_run
        log, deadline = Path(sys.argv[1]).parent / "log", time.monotonic() + 1
        while time.monotonic() < deadline:
            try:
                with lock_run(Path(sys.argv[1])), log.open("a") as file:
                    file.write("<"); file.flush(); time.sleep(0.001); file.write(">"); file.flush()
            except InputError:
                pass
        """
    )
    others = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")]) for _ in range(3)]
    assert [process.wait() for process in others] == [0, 0, 0]
    log = (tmp_path / "log").read_text()
    assert log == "<>" * (len(log) // 2)
    assert len(log) > 20


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot write to /proc/run"):
        finish(type(tmp_path)("/proc/run"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="holds no run of ours"):
        finish(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="holds no run of ours"):
        finish(tmp_path / "full", resume=True)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_every_setting_that_differs_is_told_in_one_line(tmp_path):
    plan = PLAN | {"batch": 8, "grids": {"5": [0, 5], "10": [0, 9]}, "data": {"n": 3}, "name": "x" * 200}
    finish(tmp_path / "run", plan)
    changed = plan | {"lr": 0.2, "batch": 9, "grids": {"5": [0, 6], "10": [0, 9]}, "name": "y" * 200, "more": True}
    with pytest.raises(InputError) as raised:
        finish(tmp_path / "run", changed, resume=True)
    assert str(raised.value) == (
        "--resume: batch was 8, now 9; grids.5 was [0, 5], now [0, 6]; lr was 0.1, now 0.2; more was None, now True; "
        f"name was '{'x' * 19}..{'x' * 19}', now '{'y' * 19}..{'y' * 19}': repeat the first command's options"
    )


def test_data_that_differ_are_not_told_by_their_hash(tmp_path):
    plan = PLAN | {"source": {"data": "0" * 64, "formula": "y ~ x"}}
    finish(tmp_path / "run", plan)
    changed = PLAN | {"source": {"data": "1" * 64, "formula": "y ~ z"}}
    line = r"--resume: the data are not those that .*run was begun with; formula was 'y ~ x', now 'y ~ z': repeat"
    with pytest.raises(InputError, match=line):
        finish(tmp_path / "run", changed, resume=True)


def test_a_disk_that_fails_is_one_line_too(tmp_path):
    for number, text in ((errno.EIO, "Input/output error"), (errno.EFBIG, "File too large")):
        with pytest.raises(RunError, match=f"run cannot be written or read: {text}; .*--resume goes on"):
            fail(tmp_path / str(number) / "run", OSError(number, text), [CHECKPOINT])
    with pytest.raises(BrokenPipeError):  # not of the run: the reader of our stdout went away
        fail(tmp_path / "pipe", BrokenPipeError(errno.EPIPE, "Broken pipe"), [CHECKPOINT])


def test_the_checkpoint_of_step_0_is_nothing_to_go_on_from(tmp_path):
    with pytest.raises(KeyError):
        fail(tmp_path / "run", KeyError(), ["training/nfe5/checkpoint-000000.safetensors"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "opens"), [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks_does_without_and_a_broken_one_is_named(tmp_path, monkeypatch, number, opens):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if opens:
        with run_directory(tmp_path / "run", {}, resume=False) as had_run:
            assert not had_run
    else:
        with pytest.raises(InputError, match="Input/output error"), run_directory(tmp_path / "run", {}, resume=False):
            pass

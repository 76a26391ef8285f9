"""Commands in several processes: the same results as in one, told and written once, and no hang."""

import contextlib
import errno
import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from several import in_processes

from hsivi_cli.cli.app import main
from hsivi_cli.engine import processes
from hsivi_cli.evaluation import metrics


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.5)
    monkeypatch.setattr(metrics, "KID_SUBSETS", 2)


def command(*argv):
    """Exit code, stdout and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(("count", "n", "batch_size"), [(2, 7, 3), (3, 7, 3), (2, 1, 4), (3, 2, 1)])
def test_sample_writes_the_same_bytes(tiny_student, tmp_path, count, n, batch_size):
    argv = ("sample", tiny_student, "-n", n, "--batch-size", batch_size, "--seed", 5)
    assert command(*argv, "--out", tmp_path / "one.npy")[0] == 0
    (code, out, err), *others = in_processes(count, command, *argv, "--out", tmp_path / "several.npy")
    assert (code, out) == (0, f"{tmp_path / 'several.npy'}\n")
    assert f"on {count} processes" in err
    assert ("lower --batch-size" in err) == (n <= batch_size * (count - 1))
    assert others == [(0, "", "")] * (count - 1)
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "several.npy").read_bytes()
    assert len(np.load(tmp_path / "one.npy")) == n


def test_evaluate_finds_the_same_figures(tiny_student):
    argv = ("evaluate", tiny_student, "--reference", "digits", "-n", 75, "--batch-size", 20, "--json")
    code, one, _ = command(*argv)
    assert code == 0
    (code, several, _), other = in_processes(2, command, *argv)
    assert code == 0
    assert other == (0, "", "")
    assert json.loads(several) == json.loads(one)
    (code, _, err), other = in_processes(2, command, *argv, "--max-fid", 0.1)
    assert (code, other) == (3, (3, "", ""))
    assert "above --max-fid" in err


def test_a_refusal_is_one_line_and_code_2_in_every_process(tiny_student, tmp_path):
    taken = tmp_path / "taken.npy"
    taken.touch()
    for argv, says in (
        (("sample", tiny_student, "--nfe", 4), "NFE 3 only"),
        (("sample", tiny_student, "--out", taken), "exists already"),
        (("sample", tiny_student, "--device", "cpu:0"), "use --device cpu"),
        (("evaluate", "-", "--reference", "digits"), "several processes cannot share"),
        (("fit-posterior", "--model", "none.py"), "hsivi fit-posterior runs in one process, not 2"),
        (("bench",), "hsivi bench runs in one process"),
    ):
        (code, out, err), other = in_processes(2, command, *argv)
        assert (code, out, other) == (2, "", (2, "", "")), err
        assert says in err
        assert err.count("\n") == 1


def broken_in_the_second(student, out):
    from hsivi_cli.methods import sampling

    whole = sampling.to_uint8

    def to_uint8(images):
        if processes.rank() == 1:
            raise RuntimeError("out of memory")
        return whole(images)

    sampling.to_uint8 = to_uint8
    return command("sample", student, "-n", 4, "--batch-size", 2, "--out", out)


def test_a_failure_in_one_process_ends_all_and_is_told_once(tiny_student, tmp_path):
    first, second = in_processes(2, broken_in_the_second, tiny_student, tmp_path / "a.npy")
    assert (first[0], second[0]) == (1, 1)
    assert "error" not in first[2]
    assert second[2].startswith("error: process 1: out of memory")
    assert second[2].count("\n") == 1
    assert list(tmp_path.iterdir()) == []


TRAIN = ("train", "--data", "digits", "--steps", 4, "--batch", 5, "--channels", "8,16", "--preview-every", 2)
DISTILL = ("--nfe", "2,3", "--steps", 4, "--batch", 5, "--critic-steps", 2, "--preview-every", 2)
DISTILL += ("--reference", "digits", "--fid-images", 70)


def test_train_and_distill_write_one_run(tmp_path, tiny_teacher):
    """Without a file more or less than one process writes, and with its figures."""
    for argv in (TRAIN, ("distill", "--score-net", tiny_teacher, *DISTILL)):
        one, several = tmp_path / f"one-{argv[0]}", tmp_path / f"several-{argv[0]}"
        assert command(*argv, "--out", one)[0] == 0
        (code, out, err), other = in_processes(2, command, *argv, "--out", several)
        assert (code, out) == (0, f"{several}\n"), err
        assert other == (0, "", "")
        names = sorted(path.relative_to(one) for path in one.rglob("*"))
        assert sorted(path.relative_to(several) for path in several.rglob("*")) == names
        for log in one.rglob("metrics.jsonl"):
            ours = (several / log.relative_to(one)).read_text().splitlines()
            for line, expected in zip(ours, log.read_text().splitlines(), strict=True):
                found, wanted = json.loads(line), json.loads(expected)
                for record in (found, wanted):
                    record.pop("seconds_per_step")
                # but for losses these are differences of networks that are almost the same yet
                near = {name: 1e-5 if name in ("loss", "critic_loss") else 1e-3 for name in wanted}
                assert all(found[name] == pytest.approx(wanted[name], rel=near[name], abs=1e-6) for name in wanted)
                assert found.keys() == wanted.keys()
        (code, _, err), other = in_processes(2, command, *argv, "--out", several)
        assert (code, other) == (2, (2, "", ""))
        assert "--resume" in err
        assert err.count("\n") == 1


def stopped(number, *argv):
    """As `command`, with a signal to process 1 alone in its second step."""
    import os

    from hsivi_cli.engine import loop

    append, steps = loop.generator, []

    def generator(*key):
        steps.append(key)
        if len(steps) == 2 and processes.rank() == 1:
            os.kill(os.getpid(), number)
        return append(*key)

    loop.generator = generator
    return command(*argv)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_stops_all_and_another_number_of_processes_goes_on(tmp_path, tiny_teacher, number):
    argv = ("distill", "--score-net", tiny_teacher, *DISTILL[:8], "--preview-every", 0)
    (code, _, err), other = in_processes(2, stopped, number, *argv, "--out", tmp_path / "run")
    assert code == other[0] == 128 + number
    assert "interrupted at step 2; checkpoint written" in err
    assert (other[1], other[2]) == ("", "")
    assert command(*argv, "--out", tmp_path / "run", "--resume")[0] == 0
    assert command(*argv, "--out", tmp_path / "straight")[0] == 0
    for nfe in (2, 3):
        found, wanted = (load_file(tmp_path / run / f"nfe{nfe}/log_gamma.safetensors") for run in ("run", "straight"))
        assert found["log_gamma"] == pytest.approx(wanted["log_gamma"], rel=1e-4, abs=1e-7)


def full_disk(*argv):
    from hsivi_cli.engine import loop

    def save(directory, *rest):
        assert processes.is_main()
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    loop.keep_checkpoint = save
    return command(*argv)


def test_what_fails_in_the_first_alone_is_told_once(tmp_path):
    (code, _, err), other = in_processes(2, full_disk, *TRAIN, "--out", tmp_path / "run")
    assert (code, other) == (1, (1, "", ""))
    assert "the disk is full" in err.splitlines()[-1]


def test_under_torchrun(tiny_student, tmp_path):
    """As a user starts it, with the launcher's own environment and fresh imports."""
    argv = ["sample", str(tiny_student), "-n", "3", "--batch-size", "2", "--device", "cpu", "--out"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "hsivi_cli",
    ]
    done = subprocess.run([*launcher, *argv, tmp_path / "a.npy"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'a.npy'}\n"), done.stderr
    assert "3 images with HSIVI student, NFE 3, seed 0, on 2 processes" in done.stderr
    assert command(*argv, tmp_path / "b.npy")[0] == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()

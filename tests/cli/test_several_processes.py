"""Commands in several processes: the same results as in one, told and written once, and no hang."""

import contextlib
import io
import json

import numpy as np
import pytest
from several import in_processes

from hsivi_cli.cli.app import main
from hsivi_cli.evaluation import metrics


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


def test_evaluate_finds_the_same_figures(tiny_student, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSETS", 2)
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
    from hsivi_cli.engine import processes
    from hsivi_cli.methods import sampling

    processes.GRACE = 0.5
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

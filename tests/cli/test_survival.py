"""Runs that survive, as a user meets it: signals, full disks, damaged files, the best student, changed options."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hsivi_cli.cli.app import main
from hsivi_cli.engine.checkpoint import load_checkpoint
from hsivi_cli.io import files
from hsivi_cli.io.run_directory import checkpoints
from hsivi_cli.methods import distillation
from hsivi_cli.methods.student import load_student

OPTIONS = ["--nfe", "2", "--steps", "6", "--batch", "4", "--critic-steps", "1", "--preview-every", "2"]


@pytest.fixture
def distil(tiny_teacher, tmp_path, monkeypatch):
    """`distil(name, *more)`: the exit code of a small distillation into tmp_path / name, without curves (they cost)."""
    monkeypatch.setattr(distillation, "plot_metrics", lambda *_: None)

    def run(name, *more):
        return main(["distill", "--score-net", str(tiny_teacher), "--out", str(tmp_path / name), *OPTIONS, *more])

    return run


def weights(run, name="nfe2"):
    student = run / name
    return load_file(student / "unet/diffusion_pytorch_model.safetensors") | load_file(
        student / "log_gamma.safetensors"
    )


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def all_loads(run):
    """Load whatever is there; returns how many checkpoints."""
    found = checkpoints(run / "training" / "nfe2")
    for path in found:
        load_checkpoint(path)
    for student in run.glob("nfe2*"):
        load_student(student)
    assert not [path for path in run.rglob(".*") if path.name.endswith((".tmp", ".old"))]
    return len(found)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_own_code_after_a_checkpoint(distil, tmp_path, capsys, monkeypatch, number, code):
    from hsivi_cli.engine import loop

    whole = loop.append_metrics
    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_metrics", lambda *a: whole(*a) or os.kill(os.getpid(), number))
        assert distil("run") == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: interrupted at step 3; checkpoint written, go on with --resume"
    assert distil("run", "--resume") == 0
    assert distil("straight") == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_wherever_the_disk_fills_up_all_that_is_there_loads_and_the_run_goes_on(distil, tmp_path, capsys, monkeypatch):
    whole, count = files._sync, [0]
    assert distil("straight") == 0
    for full_at in (2, 11, 19):
        name, count[0] = f"run{full_at}", 0

        def sync(path, full_at=full_at):
            count[0] += 1
            if count[0] >= full_at:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            whole(path)

        with monkeypatch.context() as patch:
            patch.setattr(files, "_sync", sync)
            assert distil(name) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: the disk is full, ")
        assert (tmp_path / name).exists() == ("--resume goes on with it" in line)
        if (tmp_path / name).exists():
            assert all_loads(tmp_path / name) > 0
        assert distil(name, "--resume") == 0
        assert same(weights(tmp_path / name), weights(tmp_path / "straight"))


def mounts():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mounts(), reason="no file system can be mounted here without root")
def test_a_file_system_that_fills_up_for_real(tiny_teacher, tmp_path):
    """A tmpfs with room for two checkpoints (each half a megabyte) and a student."""
    script = 'mount -t tmpfs -o size=1400k tmpfs "$1" && shift && "$@"; code=$?; cp -r disk/run kept; exit $code'
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "hsivi_cli", "distill", "--score-net", str(tiny_teacher), "--out", "disk/run"]
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", "disk", *command, *OPTIONS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: the disk is full, disk/run/")
    assert line.endswith("disk/run is kept: --resume goes on with it, another --out starts afresh")
    assert all_loads(tmp_path / "kept") >= 1
    again = ["distill", "--score-net", str(tiny_teacher), "--out", str(tmp_path / "kept"), *OPTIONS, "--resume"]
    assert main(again) == 0  # where there is room


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_in_one_line(distil, tmp_path, capsys):
    assert distil("straight") == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    newest, before, *_ = checkpoints(tmp_path / "run" / "training" / "nfe2")
    flip(newest)
    capsys.readouterr()
    assert distil("run", "--resume") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [f"warning: {newest} is damaged: it does not match its checksum: going on from {before.name}"]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    for path in checkpoints(tmp_path / "run" / "training" / "nfe2"):
        flip(path)
    assert distil("run", "--resume") == 2
    assert "no checkpoint beside it is whole" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("fid", [5, [1], "x", {}, {"value": None}, {"value": "x", "n": 2}])
def test_what_is_no_fid_of_the_best_student_is_none(tiny_student, tmp_path, capsys, fid):
    best = shutil.copytree(tiny_student, tmp_path / "run/nfe2-best")
    shutil.copytree(tiny_student, tmp_path / "run/nfe2")
    fields = json.loads((best / "hsivi.json").read_text()) | {"preview_fid": fid}
    (best / "hsivi.json").write_text(json.dumps(fields))
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert distillation._is_better({"value": 1.0, "n": 2}, best)


@pytest.mark.parametrize(("name", "kept"), [(b'"step"', 0), (b'"fisher"', 1), (b'"critic_gap"', 1)])
def test_a_damaged_line_of_the_log_does_not_stop_a_run(distil, tmp_path, name, kept):
    assert distil("run") == 0
    log = tmp_path / "run/training/nfe2/metrics.jsonl"
    first, rest = log.read_bytes().split(b"\n", 1)
    log.write_bytes(first.replace(name, name.replace(b"t", b"u").replace(b"f", b"g")) + b"\n" + rest)
    assert log.read_bytes() != first + b"\n" + rest
    for path in checkpoints(log.parent):
        if "000006" in path.name:
            path.unlink()
    assert distil("run", "--resume") == 0
    assert len([line for line in log.read_text().splitlines() if '"step": 2' in line]) == kept


def test_a_damaged_student_is_refused_in_one_line(distil, tmp_path, capsys):
    assert distil("run") == 0
    flip(tmp_path / "run/nfe2/unet/diffusion_pytorch_model.safetensors")
    capsys.readouterr()
    for command in (["sample", str(tmp_path / "run"), "-n", "1", "--out", str(tmp_path / "a.npy")], ["inspect"]):
        if command == ["inspect"]:
            command = ["inspect", str(tmp_path / "run" / "nfe2")]
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "diffusion_pytorch_model.safetensors is damaged: it is not what SHA256SUMS beside it says" in line


def test_every_option_that_changed_is_told_and_what_may_change_does(distil, tmp_path, capsys):
    assert distil("run") == 0
    assert distil("run", "--resume", "--lr", "0.5", "--batch", "5", "--seed", "1") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    changes = "--batch was 4, now 5; --lr was 0.0001, now 0.5; --seed was 0, now 1"
    assert line == f"error: --resume: {changes}: repeat the first command's options"
    free = ["--keep", "5", "--preview-every", "3", "--threads", "1", "--kernels", "torch", "--device", "cpu"]
    assert distil("run", "--resume", *free) == 0


def test_the_best_student_by_fid_is_kept_beside_the_last(distil, tmp_path, capsys, monkeypatch):
    from hsivi_cli.evaluation import reference

    values = iter([3.0, 1.0, 2.0])

    def fid(images):
        return next(values)

    fid.reference_sha256, fid.extractor_sha256 = "a", "b"
    monkeypatch.setattr(reference, "fid_against", lambda *_: fid)
    assert distil("run", "--reference", "any", "--fid-images", "2") == 0
    run = tmp_path / "run"
    assert f"lowest FID at a preview for NFE 2: {run / 'nfe2-best'}" in capsys.readouterr().err
    assert load_student(run / "nfe2").description["step"] == 6
    assert load_student(run / "nfe2-best").description["step"] == 4
    assert not same(weights(run), weights(run, "nfe2-best"))
    assert main(["inspect", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["students"] == {"2": str(run / "nfe2")}
    assert facts["best"] == {"2": {"path": str(run / "nfe2-best"), "step": 4, "fid": 1.0, "images": 2}}
    assert facts["training"]["nfe2"]["checkpoints"] == [f"checkpoint-00000{step}.safetensors" for step in (6, 4, 0)]
    for which in (run, run / "nfe2-best"):
        assert main(["sample", str(which), "-n", "1", "--out", str(tmp_path / f"{which.name}.npy")]) == 0


def test_a_run_that_diverges_for_good_says_so_and_leaves_nothing(distil, tmp_path, capsys, monkeypatch):
    from hsivi_cli.methods import hsivi_sm

    whole = hsivi_sm.critic_loss
    monkeypatch.setattr(hsivi_sm, "critic_loss", lambda *parts: whole(*parts) * float("inf"))
    assert distil("run") == 1
    told = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("warning: critic_loss is inf at step 5") for line in told) == 3
    assert told[-1] == (
        "error: diverged: critic_loss is inf at step 5, and 5 steps in a row had to be skipped, "
        "after 3 roll-backs to lower rates: use a lower --lr"
    )
    assert not (tmp_path / "run").exists()

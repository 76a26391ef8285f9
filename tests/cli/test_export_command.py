"""`hsivi export`: one line for a user, one object for a program, and files that open again."""

import json

import numpy as np
import pytest

from hsivi_cli.cli.app import main


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_file_draws_the_images_of_its_directory(tiny_run, tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    code, stdout, stderr = run(capsys, "export", tiny_run, "--nfe", 5, "--out", out)
    assert (code, stdout) == (0, f"{out}\n")
    assert "largest difference 0 over 4 images" in stderr
    for source, name in ((out, "file"), (tiny_run / "nfe5", "directory")):
        assert run(capsys, "sample", source, "-n", 5, "--out", tmp_path / f"{name}.npy")[0] == 0
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npy") for name in ("file", "directory")))
    code, stdout, _ = run(capsys, "inspect", out, "--json")
    assert code == 0
    assert json.loads(stdout)["kind"] == "student"
    code, stdout, _ = run(capsys, "evaluate", out, "-n", 16, "--reference", tmp_path / "file.npy", "--json")
    assert code == 0
    assert "NFE 5" in stdout


def test_json(tiny_student, tmp_path, capsys):
    out = tmp_path / "s.pt"
    code, stdout, stderr = run(capsys, "export", tiny_student, "--out", out, "--json")
    told = json.loads(stdout)
    assert code == 0
    assert told["format"] == "torchscript"
    assert told["max_difference"] < 1e-5
    assert told["nfe"] == 3
    assert told["shape"] == [1, 8, 8]
    assert told["bytes"] == out.stat().st_size
    assert "noise (3, n, 1, 8, 8)" in stderr


def test_bad_usage(tiny_student, tiny_run, tiny_teacher, tmp_path, capsys):
    there = tmp_path / "there.pt"
    there.write_text("mine")
    for arguments, what in (
        ((tiny_student, "--out", there), "exists already"),
        ((tiny_run, "--out", tmp_path / "s.pt"), "choose one with --nfe"),
        ((tiny_teacher, "--out", tmp_path / "s.pt"), "holds no student"),
        ((tmp_path / "none", "--out", tmp_path / "s.pt"), "does not exist"),
        ((there, "--out", tmp_path / "s.pt"), "damaged or no safetensors file"),
        ((tiny_student, "--out", tmp_path / "s"), "none of the endings"),
        ((tiny_student, "--out", tmp_path / "no" / "s.pt"), "does not exist"),
        ((tiny_student, "--out", tmp_path, "--format", "torchscript", "--force"), "is a directory"),
        ((tiny_student, "--out", tmp_path / "s.pt", "--device", "cuda:99"), "--device"),
        ((tiny_student, "--nfe", 9, "--out", tmp_path / "s.pt"), "NFE 3 only"),
    ):
        code, stdout, stderr = run(capsys, "export", *arguments)
        assert (code, stdout) == (2, ""), arguments
        assert what in stderr, arguments
        assert len([line for line in stderr.splitlines() if line.startswith("error")]) == 1
    assert there.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]


@pytest.mark.parametrize("arguments", [("--solver", "ddim"), ()])
def test_a_teachers_weights_are_no_student(tiny_teacher, capsys, arguments, tmp_path):
    weights = tiny_teacher / "unet" / "diffusion_pytorch_model.safetensors"
    code, _, stderr = run(capsys, "sample", weights, *arguments, "--out", tmp_path / "grid.png")
    assert code == 2
    assert ("holds no student" in stderr) == (not arguments)

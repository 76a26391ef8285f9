"""What ships with the package: small, whole, traceable to its teacher, and better than the best solver."""

import json

import pytest

from hsivi_cli.cli.app import main
from hsivi_cli.io.files import asset
from hsivi_cli.methods.student import find_students, load_student
from hsivi_cli.targets.score_net import load_score_net

LIMIT = 16_000_000


def test_assets_are_small_and_hold_no_pickles():
    files = [path for path in asset("mnist").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".npz", ".md", ".png", ".py", ".csv"}


def test_teacher_is_small_and_students_are_its_own():
    teacher = load_score_net(asset("mnist/teacher"))
    assert teacher.shape == (1, 28, 28)
    assert sum(p.numel() for p in teacher.unet.parameters()) <= 2_000_000
    students = find_students(asset("mnist"))
    assert {5, 10} <= students.keys()
    for nfe, path in students.items():
        student = load_student(path)
        assert student.nfe == nfe
        assert student.description["teacher_sha256"] == teacher.sha256


def test_shipped_student_beats_the_solvers_at_its_nfe(capsys):
    def fid(*arguments):
        capsys.readouterr()
        code = main(["evaluate", *arguments, "--nfe", "5", "-n", "500", "--reference", "digits", "--json"])
        assert code == 0
        return json.loads(capsys.readouterr().out)["metrics"]["fid@500"]

    student = fid("shipped")
    for solver in ("ddim", "dpm++", "unipc", "deis"):
        assert student < fid(str(asset("mnist/teacher")), "--solver", solver)


@pytest.mark.parametrize("seed", [0, 1])
def test_first_command_draws_a_picture(tmp_path, capsys, seed):
    from PIL import Image

    out = tmp_path / "grid.png"
    assert main(["sample", "--nfe", "10", "-n", "16", "--seed", str(seed), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).width >= 300

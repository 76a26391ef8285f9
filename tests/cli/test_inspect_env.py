import json

import numpy as np
import pytest

from hsivi_cli.cli.app import main


def inspected(capsys, path):
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_every_kind(tiny_teacher, tiny_run, tiny_student, tmp_path, capsys):
    teacher = inspected(capsys, tiny_teacher)
    assert teacher["kind"] == "teacher"
    assert teacher["parameters"] > 0
    student = inspected(capsys, tiny_student)
    assert (student["kind"], student["nfe"], student["step"]) == ("student", 3, 7)
    assert student["teacher_sha256"] == teacher["sha256"]
    assert student["log_gamma"]["max"] == pytest.approx(0.1)
    assert list(inspected(capsys, tiny_run)["students"]) == ["3", "5"]
    tensors = inspected(capsys, tiny_student / "log_gamma.safetensors")
    assert tensors["tensors"]["log_gamma"]["shape"] == [1, 8, 8]
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert inspected(capsys, tmp_path / "ref.npz")["arrays"]["sigma"]["shape"] == [4, 4]


def test_inspect_prints_a_table(tiny_student, capsys):
    assert main(["inspect", str(tiny_student)]) == 0
    assert "log gamma" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["none", "a.txt", "a.npz", "a.safetensors", "folder"])
def test_inspect_refuses_what_it_does_not_know(name, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for file in ("a.txt", "a.npz", "a.safetensors"):
        (tmp_path / file).write_bytes(b"nonsense")
    assert main(["inspect", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert name in err


def test_env_is_complete(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"hsivi", "python", "torch", "diffusers", "devices", "kernels", "assets"} <= facts.keys()
    assert main(["env"]) == 0
    assert "torch:" in capsys.readouterr().out

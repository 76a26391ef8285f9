import json
import shutil

import numpy as np
import pytest
import torch

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


def logged(folder, step):
    """A training folder as the loop leaves it, with a checkpoint of realistic clutter."""
    from hsivi_cli.engine.checkpoint import save_checkpoint
    from hsivi_cli.io.metrics_log import append_metrics

    folder.mkdir(parents=True, exist_ok=True)
    for i in (step - 1, step):
        append_metrics(folder / "metrics.jsonl", {"step": i, "loss": 1.0 / i})
    save_checkpoint(folder / "checkpoint.safetensors", {f"weight {i}": torch.zeros(2) for i in range(40)})


def test_inspect_a_distillation(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "config.json").write_text('{"teacher": "somewhere", "nfe5": {}}')
    logged(run / "training" / "nfe5", 40)
    logged(run / "training" / "nfe10", 70)
    logged(run / "training" / ".nfe5.1234.tmp", 2)
    shutil.copytree(run / "nfe5", run / ".nfe5.1234.tmp")
    found = inspected(capsys, run)
    assert (found["kind"], list(found["students"])) == ("run", ["3", "5"])
    assert list(found["training"]) == ["nfe5", "nfe10"]
    assert (found["training"]["nfe10"]["step"], found["training"]["nfe10"]["latest_metrics"]["loss"]) == (70, 1 / 70)
    assert found["training"]["nfe5"]["checkpoint_bytes"] > 0
    assert found["config"]["teacher"] == "somewhere"
    assert main(["inspect", str(run)]) == 0
    assert "training.nfe5" in capsys.readouterr().out
    checkpoint = inspected(capsys, run / "training" / "nfe5" / "checkpoint.safetensors")
    assert checkpoint["metadata"]["structure"].endswith(" characters")


def test_inspect_a_trained_teacher(teacher_copy, tmp_path, capsys):
    teacher = teacher_copy()
    logged(teacher, 12)
    (teacher / "config.json").write_text('{"method": "ddpm"}')
    found = inspected(capsys, teacher)
    assert (found["kind"], found["training"]["step"], found["config"]["method"]) == ("teacher", 12, "ddpm")
    # before its first preview it has no network yet
    shutil.rmtree(teacher / "scheduler")
    assert inspected(capsys, teacher)["kind"] == "run"


def test_a_bare_network_is_no_run(tiny_teacher, capsys):
    assert main(["inspect", str(tiny_teacher / "unet")]) == 2
    assert "without its noise schedule" in capsys.readouterr().err


def test_inspect_prints_a_table(tiny_student, capsys):
    assert main(["inspect", str(tiny_student)]) == 0
    assert "log_gamma" in capsys.readouterr().out


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

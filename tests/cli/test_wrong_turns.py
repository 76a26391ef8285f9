"""What a stranger mistyped: each is refused in one line that names the flag and says what to do."""

import json

import pytest
import torch

from hsivi_cli.cli import options
from hsivi_cli.cli.app import main
from hsivi_cli.io import capacity


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


@pytest.mark.parametrize("command", ["train --data digits", "distill --score-net t", "sample", "export shipped"])
@pytest.mark.parametrize("empty", [["--out", ""], ["--out="]])
def test_an_output_without_a_name(command, empty, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *command.split(), *empty) == 'error: --out "" is empty: name what to write'
    assert not list(tmp_path.iterdir())


def test_init_from_that_is_no_student(tiny_teacher, tiny_run, tmp_path, capsys):
    base = ["distill", "--score-net", tiny_teacher, "--nfe", "3", "--dry-run", "--init-from"]
    assert f"--init-from {tmp_path / 'no'} does not exist: name the dir" in refused(capsys, *base, tmp_path / "no")
    assert f"--init-from {tiny_run} holds no student itself: name the dir" in refused(capsys, *base, tiny_run)


def test_images_larger_than_memory(tiny_teacher, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "free_memory", lambda: 2**20)
    weights = tiny_teacher / "unet" / "diffusion_pytorch_model.safetensors"
    line = refused(capsys, "distill", "--score-net", weights, "--network", "n.py", "--shape", "1,999,999", "--dry-run")
    assert (
        "--shape 1,999,999: 2 images of 1x999x999 alone take 7.614 MiB of memory, and 1 MiB are free: give sm" in line
    )
    line = refused(capsys, "distill", "--score-net", tiny_teacher, "--batch", "9999", "--dry-run", "--device", "cpu")
    assert "--batch 9999 takes 19.6 MiB of memory, and 1 MiB are free: ask for fewer" in line


def test_out_of_memory_names_the_shape_where_one_was_given(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(options, "image_device", full)
    for extra, told in (([], False), (["--shape", "1,8,8"], True), (["--shape=1,8,8"], True)):
        assert main(["distill", "--score-net", "t", "--dry-run", *extra]) == 1
        line = capsys.readouterr().err
        assert "out of memory: lower the batch size" in line
        assert ("is --shape right?" in line) == told


def test_relative_paths_of_a_config_from_another_folder(tiny_teacher, tmp_path, capsys, monkeypatch):
    (tmp_path / "moved").mkdir()
    config = tmp_path / "moved" / "config.toml"
    config.write_text('[distill]\nscore-net = "teacher"\n[train]\ndata = "images"\n')
    monkeypatch.chdir(tmp_path)
    for command in (["distill", "--dry-run"], ["train", "--out", "t"]):
        line = refused(capsys, *command, "--config", config)
        assert "does not exist" in line
        assert f"is from {config}: its head says which folder its paths are relative to" in line
    assert "its head" not in refused(capsys, "distill", "--dry-run", "--config", config, "--score-net", "none")


def test_config_of_a_folder_that_is_no_run(tmp_path, capsys):
    assert refused(capsys, "config", tmp_path) == f"error: {tmp_path} is no run directory: it holds no config.toml"
    (tmp_path / "config.json").write_text("{}")
    assert "hsivi inspect" in refused(capsys, "config", tmp_path)


def test_inspect_knows_the_shipped_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "shipped", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["students"]


def test_export_looks_for_its_file_before_it_loads_anything(tiny_student, tmp_path, capsys, monkeypatch):
    from hsivi_cli.methods import student

    (tmp_path / "s.pt").write_text("mine")
    monkeypatch.setattr(student, "load_student", lambda *_: pytest.fail("loaded"))
    assert "exists already" in refused(capsys, "export", tiny_student, "--out", tmp_path / "s.pt")


def test_dry_run_says_the_chains_the_pace_in_figures_and_the_sum(tiny_teacher, capsys):
    base = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2,3", "--batch", "12", "--critic-steps", "1"]
    assert main([*base, "--dry-run"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.split()]
    assert [line[1].strip() for line in lines if line[0] == "rollout"] == ["12 chains", "8 chains"]
    paces = [line[1].strip() for line in lines if line[0] == "seconds_per_step"]
    assert all(len(pace.lstrip("0.").replace(".", "").split("e")[0]) <= 4 for pace in paces), paces
    assert any(line[1].startswith("total, all 2 students") for line in lines if line[0] == "expected")
    assert main([*base, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["rollout_chains"] for row in told["dry_run"]] == [12, 8]
    assert told["total_seconds"] == sum(row["total_seconds"] for row in told["dry_run"])


def test_one_tensor_is_one(tmp_path):
    from hsivi_cli.targets.checkpoints.fit import Fitted

    assert Fitted({}, unexpected=("a",)).notes == ("1 tensor of the file was not used: a.",)
    assert Fitted({}, unexpected=("a", "b")).notes[0].startswith("2 tensors of the file were not used")


def test_help_says_the_defaults(capsys):
    for command, told in (("sample", "with --solver 10 by default"), ("distill", "means its function build")):
        assert main([command, "--help"]) == 0
        assert told in " ".join(capsys.readouterr().out.split())


def test_an_own_network_that_fails_late_is_told_with_its_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "late.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Conv2d):\n    def forward(self, x, t):\n        if int(t[0]) > 5:\n"
        "            raise KeyError('no such time')\n        return super().forward(x)\n\n\n"
        "def build():\n    return Net(1, 1, 3, padding=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Conv2d(1, 1, 3).state_dict(), "w.pt")
    argv = ["sample", "w.pt", "--solver", "ddim", "--nfe", 2, "-n", 1, "--shape", "1,4,4", "--schedule", "linear"]
    for network in (["--network", "late.py:build"], ["--network=late.py"]):
        line = refused(capsys, *argv, *network, "--out", "a.png")
        assert "the network raised KeyError: 'no such time' (late.py, line 7)" in line
    assert not (tmp_path / "a.png").exists()

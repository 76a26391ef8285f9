"""A run that was stopped before it wrote a network is told apart from what never was one, by every command."""

import json
import os
import shutil

import pytest

from hsivi_cli.cli.app import main
from hsivi_cli.engine.run_view import refuse_unfinished
from hsivi_cli.errors import InputError


def begun(path, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_distillation_without_students(tiny_run, tmp_path, capsys):
    run = begun(tmp_path / "run", steps=9, grids={"3": [0, 1, 2, 9], "5": [0, 1, 2, 3, 4, 9]})
    out = str(tmp_path / "out.pt")
    for arguments in (
        ["sample", run, "--nfe", "3", "--out", tmp_path / "g.png"],
        ["export", run, "--out", out],
        ["evaluate", run, "--reference", "digits"],
        ["push", run, "me/it", "--dry-run"],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        stderr = capsys.readouterr().err
        assert stderr == (
            f"error: {run} is an unfinished run of hsivi distill, which has no student yet: "
            "go on with hsivi distill ... --resume\n"
        )
    assert main(["distill", "--score-net", str(run), "--dry-run"]) == 2
    assert "it is a run of hsivi distill: name its teacher" in capsys.readouterr().err
    shutil.copytree(tiny_run / "nfe3", run / "nfe3")
    for nfe in (None, 3, 4):
        refuse_unfinished(run, nfe)  # there is one, or there was never to be one
    (run / ".lock").write_text(f"{os.getpid()}\n")
    with pytest.raises(InputError, match=f"no student for NFE 5 yet: wait for process {os.getpid()}"):
        refuse_unfinished(run, 5)


def test_a_training_without_a_network(tmp_path, capsys):
    path = begun(tmp_path / "tint", method="ddpm", steps=9)
    for arguments in (
        ["distill", "--score-net", path, "--dry-run"],
        ["sample", path, "--solver", "ddim", "--out", tmp_path / "g.png"],
        ["sample", path, "--out", tmp_path / "g.png"],
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert (
            "tint is an unfinished run of hsivi train, which has no network yet: go on with hsivi train ... --resume"
            in capsys.readouterr().err
        )


def test_watch_says_that_a_file_is_a_file(tmp_path, capsys):
    (tmp_path / "grid.png").write_bytes(b"x")
    for name, what in (("grid.png", "is a file"), ("none", "does not exist")):
        assert main(["watch", str(tmp_path / name), "--once"]) == 2
        assert f"{name} {what}: name a run directory" in capsys.readouterr().err

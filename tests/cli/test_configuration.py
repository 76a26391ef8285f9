"""Options from a file: every command's own, whatever they are; what is wrong is named; a run's own file repeats it."""

import json
import shutil
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from hsivi_cli.cli.app import main

SMALL = ["--steps", "2", "--batch", "4", "--critic-steps", "1", "--preview-every", "0", "--warmup", "0"]


def resolved(capsys, *arguments):
    """What `hsivi config` says the command would run with."""
    capsys.readouterr()
    assert main(["config", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["options"]


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_defaults_then_file_then_command_line(tmp_path, capsys):
    path = write(tmp_path, "eta = 0.5\nsteps = 7\n")
    options = resolved(capsys, "distill", "--config", path, "--steps", "9")
    assert (options["eta"], options["steps"], options["batch"]) == (0.5, 9, 128)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("score_net = 'a'", "score-net", "a"),
        ("score-net = 'a'", "score-net", "a"),
        ("nfe = '5,10'", "nfe", "5,10"),
        ("nfe = [5, 10]", "nfe", "5,10"),
        ("nfe = 5", "nfe", "5"),
        ("steps = 1e3", "steps", 1000),
        ("rollout-cache = false", "rollout-cache", False),
        ("lr = 1", "lr", 1.0),
        ("steps = 1\n[distill]\nsteps = 2", "steps", 2),
        ("[train]\ndata = 'digits'\n[distill]\nsteps = 2", "steps", 2),
        ("reference = 'C:\\new \"x\" \u00fc'", "reference", 'C:\\new "x" \u00fc'),
    ],
)
def test_how_a_setting_may_be_written(tmp_path, capsys, text, key, value):
    assert resolved(capsys, "distill", "--config", write(tmp_path, text))[key] == value


def test_arguments_and_options_that_repeat(tmp_path, capsys):
    path = write(tmp_path, "data = 'd.csv'\nprior = ['a=1', 'b=2']\nset = 'k=1'\nn = 3")
    with pytest.raises(AssertionError):
        resolved(capsys, "fit-posterior", "--config", path)  # `n` is not among this command's names
    path = write(tmp_path, "data = 'd.csv'\nprior = ['a=1', 'b=2']\nset = 'k=1'\ndraws = 30")
    options = resolved(capsys, "fit-posterior", "--config", path)
    assert (options["data"], options["prior"], options["set"]) == ("d.csv", ["a=1", "b=2"], ["k=1"])
    assert resolved(capsys, "fit-posterior", "--config", path, "--prior", "c=3")["prior"] == ["c=3"]
    assert resolved(capsys, "fit-posterior", "--config", path, "e.csv")["data"] == "e.csv"


def test_every_setting_of_every_command_survives(tmp_path, capsys):
    """What `hsivi config` prints is read back as the same options, for each command that takes --config."""
    given = {
        "distill": ["--nfe", "5,10", "--no-rollout-cache", "--lr", "1e-5", "--score-net", "a b", "--out", "x"],
        "train": ["--data", "digits", "--attention"],
        "sample": ["shipped", "-n", "5"],
        "evaluate": ["x.npy", "--reference", "digits", "--record", "a", "--record", "b"],
        "fit-posterior": ["-f", "y ~ 'a' + \"b\"", "--prior", "b=normal(0,10)"],
        "bench": ["--batch", "1,2", "--compile", "default"],
    }
    for command, arguments in given.items():
        first = resolved(capsys, command, *arguments)
        assert main(["config", command, *arguments]) == 0
        path = write(tmp_path, capsys.readouterr().out)
        assert resolved(capsys, command, "--config", path) == first


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("stepz = 3", "stepz is no option of hsivi distill: did you mean steps?"),
        ("qqqqqq = 3", "qqqqqq is no option of hsivi distill (see 'hsivi distill --help')"),
        ("[distil]\nsteps = 3", "[distil] is no command of hsivi: did you mean [distill]?"),
        ("[train]\nsteps = 3", "says nothing about hsivi distill: it has [train]"),
        ("config = 'x'", "config is no option"),
        ("no-rollout-cache = true", "did you mean rollout-cache?"),
        ("steps = 'many'", "steps = 'many'"),
        ("steps = 0", "greater than or equal to 1"),
        ("steps = 1.5", "steps = 1.5"),
        ("steps = true", "steps = True"),
        ("steps = [1, 2]", "steps = [1, 2]"),
        ("score-net = 5", None),
        ("warm-start = 1", "true or false"),
        ("warm-start = 'yes'", "true or false"),
        ("nfe = []", "nfe = []"),
        ("nfe = [[1]]", "nfe = [[1]]"),
        ("nfe = 1979-05-27", "nfe = "),
        ("eta = nan", "eta"),
        ("score-net = 'a'\nscore_net = 'b'", "score-net and score_net are the same option"),
        ("json = true\nas_json = true", "json and as_json are the same option"),
        ("a = ", "cannot be read as TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_that_names_it(tmp_path, capsys, text, what):
    path = write(tmp_path, text)
    assert main(["distill", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().count("\n") == 0
    assert what is None or (str(path) in captured.err and what in captured.err)
    assert not (tmp_path / "run").exists()


def test_help_shows_what_the_file_says(tmp_path, capsys):
    assert main(["distill", "--config", str(write(tmp_path, "steps = 12345")), "--help"]) == 0
    assert "default: 12345" in " ".join(capsys.readouterr().out.split())


def test_wrong_requests_for_a_configuration(tmp_path, capsys):
    for arguments, what in (
        (["env"], "takes no --config"),
        (["nosuch"], "no run directory and none of the commands"),
        ([str(tmp_path)], "holds no config.toml"),
        (["distill", "--etta", "1"], "--etta"),
        (["distill", "--eta", "5"], "--eta"),
    ):
        assert main(["config", *arguments]) == 2
        captured = capsys.readouterr()
        assert what in captured.err
        assert captured.err.strip().count("\n") == 0


def test_a_run_is_repeated_moved_and_gone_on_with_from_its_own_file(tiny_teacher, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["distill", "--score-net", str(tiny_teacher), "--nfe", "2", *SMALL, "--out", str(first)]) == 0
    again = ["distill", "--config", str(first / "config.toml")]
    capsys.readouterr()
    assert main(again) == 2
    assert f"{first} exists already: add --resume" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert main([*again, "--out", str(second)]) == 0
    ours, theirs = (load_file(run / "nfe2/unet/diffusion_pytorch_model.safetensors") for run in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    settings = [tomllib.loads((run / "config.toml").read_text()) for run in (first, second)]
    assert settings[0] == settings[1]
    assert "out" not in settings[0]["distill"]
    shutil.move(first, tmp_path / "moved")
    assert main(["distill", "--config", str(tmp_path / "moved" / "config.toml"), "--resume"]) == 0
    assert not first.exists()
    assert main(["config", str(second)]) == 0
    assert capsys.readouterr().out.endswith((second / "config.toml").read_text())


def test_the_file_says_who_wrote_it_when_and_from_where(tmp_path, monkeypatch):
    import hsivi_cli

    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--data", "digits", "--steps", "1", "--batch", "4", "--channels", "8", "--preview-every", "0"]
    assert main([*arguments, "--out", "a run"]) == 0
    lines = (tmp_path / "a run" / "config.toml").read_text().splitlines()
    assert lines[0].startswith(f"# hsivi {hsivi_cli.__version__}, 20")
    assert lines[1] == f"# hsivi {' '.join(arguments)} --out 'a run'"
    assert lines[2] == f"# relative paths are relative to {tmp_path}"
    assert tomllib.loads("\n".join(lines))["train"]["steps"] == 1


def test_going_on_keeps_the_file_of_the_first_command(tiny_teacher, tmp_path):
    run = tmp_path / "run"
    command = ["distill", "--score-net", str(tiny_teacher), "--nfe", "2", *SMALL, "--out", str(run)]
    assert main(command) == 0
    before = (run / "config.toml").read_text()
    assert main([*command, "--resume", "--threads", "1"]) == 0
    assert (run / "config.toml").read_text() == before
    (run / "config.toml").unlink()  # a run of before there was such a file
    assert main([*command, "--resume"]) == 0
    assert (run / "config.toml").is_file()


def test_a_run_without_a_checkpoint_leaves_nothing(tiny_teacher, tmp_path, monkeypatch):
    from hsivi_cli.errors import RunError
    from hsivi_cli.methods import distillation

    def fail(*_):
        raise RunError("diverged")

    monkeypatch.setattr(distillation, "distill", fail)
    run = tmp_path / "run"
    assert main(["distill", "--score-net", str(tiny_teacher), "--nfe", "2", *SMALL, "--out", str(run)]) == 1
    assert not run.exists()


CODE = [
    ("distill", "network", "n.py:build", ["--score-net", "w.pt", "--nfe", "2", "--out", "run"]),
    ("distill", "network", "n.py:build.json", ["--score-net", "w.pt", "--nfe", "2", "--out", "run"]),
    ("sample", "network", "n.py", ["run"]),
    ("sample", "model", "latent", ["run"]),
    ("evaluate", "features", "n.py", ["a.npy", "--reference", "digits"]),
    ("evaluate", "network", "n.py:build", ["a.npy", "--reference", "digits"]),
    ("export", "network", "n.py:build", ["run", "--out", "x"]),
    ("fit-posterior", "model", "n.py", ["rows.csv"]),
    ("fit-posterior", "model", "./latent", ["rows.csv"]),
]


@pytest.mark.parametrize(("command", "key", "value", "arguments"), CODE)
def test_a_file_alone_runs_no_code(tmp_path, monkeypatch, capsys, command, key, value, arguments):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, f"{key} = '{value}'\n")
    for name in ("n.py", "latent"):
        (tmp_path / name).write_text("raise SystemExit(open('ran', 'w').close())\n")
    assert main([command, *arguments, "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.strip().count("\n") == 0
    assert f"{path}: {key} = '{value}' runs code: add --{key} {value} to the command line if you trust it" in said
    assert not (tmp_path / "ran").exists()


def test_code_in_a_file_counts_with_the_command_line(tmp_path, capsys):
    path = write(tmp_path, "network = 'n.py:build'\nsteps = 7\n")
    assert resolved(capsys, "distill", "--config", path, "--network", "n.py:build")["network"] == "n.py:build"
    assert resolved(capsys, "distill", "--network", "mine.py", "--config", path)["network"] == "mine.py"
    assert main(["distill", "--config", str(path), "--help"]) == 0


def test_what_runs_no_code_may_stand_in_a_file(tmp_path, capsys):
    from hsivi_cli.evaluation.extractors import CHOICES

    for command, key, value in (
        ("distill", "network", "arch.json"),
        ("fit-posterior", "model", "latent"),
        *(("evaluate", "features", choice) for choice in CHOICES),
    ):
        assert resolved(capsys, command, "--config", write(tmp_path, f"{key} = '{value}'"))[key] == value

"""`hsivi fit-posterior --amortize` and `hsivi sample --observe` from the command line, as a user runs them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hsivi_cli.cli.app import main

MODEL = """
import torch
from torch.distributions import Normal
from hsivi_cli import Model, Parameter


def model(data):
    return Model(
        parameters=[Parameter("theta", (2,))],
        log_prior=lambda p: Normal(0.0, 1.0).log_prob(p.theta).sum(),
        log_likelihood=lambda p, y: Normal(p.theta, 0.5).log_prob(y),
        simulate=lambda p, generator: Normal(p.theta, 0.5).sample(),
        sample_prior=lambda generator: {"theta": Normal(0.0, 1.0).sample((2,))},
        observed=torch.tensor(data[["a", "b"]].iloc[0].to_numpy(), dtype=torch.float64),
    )
"""
SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "models"
SMALL = ("--amortize", "--encoder", "gaussian", "--steps", "150", "--particles", "100", "--sbc", "100", "-n", "200")


@pytest.fixture
def files(tmp_path):
    x = np.random.default_rng(0).normal(scale=1.1, size=(12, 2))
    pd.DataFrame({"label": list("abcdefghijkl"), "a": x[:, 0], "b": x[:, 1]}).to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def fit(files, *argv, small=SMALL):
    return main(["fit-posterior", str(files / "rows.csv"), "--model", str(files / "model.py"), *small, *map(str, argv)])


def test_every_row_gets_its_posterior_and_new_rows_follow(files, capsys):
    assert fit(files, "--save", files / "FIT", "--out", files / "d.csv", "--plot", files / "p.png", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"]["level"] == "trust"
    rows = pd.read_csv(files / "rows.csv")
    for one, x in zip(found["observations"], rows["a"], strict=True):
        theta = one["parameters"]["theta[1]"]
        assert theta["mean"] == pytest.approx(0.8 * x, abs=0.08)
        assert theta["sd"] == pytest.approx(0.447, rel=0.15)
    draws = pd.read_csv(files / "d.csv")
    assert list(draws) == ["lp_approx__", "lp__", "observation", "theta[1]", "theta[2]"]
    assert draws.groupby("observation").size().tolist() == [200] * 12
    assert (files / "p.png").stat().st_size > 5000
    assert (files / "p-check.png").stat().st_size > 5000

    pd.DataFrame({"b": [0.5, 30.0], "a": [1.0, 0.0]}).to_csv(files / "new.csv", index=False)
    new = ["sample", str(files / "FIT"), "--observe", str(files / "new.csv"), "-n", "300"]
    assert main([*new, "--out", str(files / "new_draws.csv")]) == 3
    story = capsys.readouterr()
    assert "1 of 2 observations (2) outside of the range" in story.err
    assert "nothing has checked these draws" in story.out
    unchecked = pd.read_csv(files / "new_draws.csv")
    # columns are found by name, whatever their order
    assert unchecked[unchecked.observation == 1]["theta[1]"].mean() == pytest.approx(0.8, abs=0.15)
    assert main([*new, "--model", str(files / "model.py"), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["observations"][0]["correction"] == "weights"
    assert checked["observations"][0]["beyond"] == 0
    assert checked["observations"][1]["beyond"] > 5
    assert checked["observations"][1]["parameters"]["theta[2]"]["mean"] == pytest.approx(24.0, abs=0.3)


def test_an_interrupted_run_goes_on_to_the_same_end(files, capsys, monkeypatch):
    from hsivi_cli.methods import amortised

    assert fit(files, "--save", files / "WHOLE", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    once, step = [True], amortised.step

    def interrupted(state, batch, generator):
        if state.step == 70 and once.pop():
            once.append(False)
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return step(state, batch, generator)

    monkeypatch.setattr(amortised, "step", interrupted)
    assert fit(files, "--save", files / "PART") == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(amortised, "step", step)
    assert main(["sample", str(files / "PART"), "--observe", str(files / "rows.csv")]) == 2
    assert "unfinished" in capsys.readouterr().err
    assert fit(files, "--save", files / "PART", "--lr", "0.5", "--resume") == 2
    assert "lr was" in capsys.readouterr().err
    assert fit(files, "--save", files / "PART", "--resume", "--json") == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["observations"] == whole["observations"]


@pytest.mark.parametrize("method", ["npe", "wake", "defensive-wake", "msc"])
def test_the_baselines_are_methods(method, files, capsys):
    small = ("--amortize", "--method", method, "--encoder", "gaussian", "--steps", "40", "--sbc", "0", "-n", "50")
    assert fit(files, "--json", small=small) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == method
    assert "sbc" not in found


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--bridges", "3"), "--bridges does nothing with --amortize"),
        (("--refine", "hmc"), "--refine hmc does nothing"),
        (("--shape", "3x4"), "--shape 3x4"),
        (("--sleep", "2"), "--sleep 2.0"),
        (("--estimator", "z"), "--estimator z"),
        (("--out", "d.xyz"), "unknown extension"),
    ],
)
def test_refusals_are_one_line(argv, says, files, capsys):
    assert fit(files, *argv) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1
    assert says in err[0]


def test_more_refusals(files, capsys):
    rows = str(files / "rows.csv")

    def refused(*argv):
        assert main(list(map(str, argv))) == 2
        return capsys.readouterr().err

    (files / "nosim.py").write_text((files / "model.py").read_text().replace("simulate=", "generated=None,  # "))
    assert "--sbc needs a model that simulates" in refused(
        "fit-posterior", rows, "--model", files / "nosim.py", "--amortize", "--sbc", "50"
    )
    assert "--amortize needs --model" in refused("fit-posterior", rows, "--amortize", "-f", "b ~ a")
    assert "add --amortize" in refused("fit-posterior", rows, "--model", files / "model.py", "--method", "npe")
    assert "--sleep goes with --amortize" in refused("fit-posterior", rows, "-f", "b ~ a", "--sleep", "0.5")
    (files / "one.csv").write_text("a,b\n1,2\n")
    assert "one observation alone" in refused(
        "fit-posterior", files / "one.csv", "--model", files / "nosim.py", "--amortize"
    )
    (files / "gap.csv").write_text("a,b\n1,2\n3,\n")
    assert "row 2" in refused("fit-posterior", files / "gap.csv", "--model", files / "model.py", "--amortize")
    nowhere = (
        (files / "model.py")
        .read_text()
        .replace(
            "Normal(p.theta, 0.5).log_prob(y)",
            "torch.where(y.sum() > 50, -torch.inf, Normal(p.theta, 0.5).log_prob(y))",
        )
    )
    (files / "nowhere.py").write_text(nowhere)
    (files / "far.csv").write_text("a,b\n1,2\n300,400\n")
    assert "observation 2" in refused("fit-posterior", files / "far.csv", "--model", files / "nowhere.py", "--amortize")


def test_new_rows_must_fit(files, capsys):
    assert fit(files, "--save", files / "FIT", "--json") == 0
    capsys.readouterr()
    for text, says in {
        "a\n1\n": "no column b",
        "a,b\n1,x\n": "holds no numbers",
        "a,b\n1,2\n3,\n": "row 2",
        "": "empty",
    }.items():
        (files / "new.csv").write_text(text)
        assert main(["sample", str(files / "FIT"), "--observe", str(files / "new.csv")]) == 2
        assert says in capsys.readouterr().err
    other = files / "other.py"
    other.write_text(MODEL.replace("0.5", "0.6"))
    assert main(["sample", str(files / "FIT"), "--observe", str(files / "rows.csv"), "--model", str(other)]) == 2
    assert "differs from the file" in capsys.readouterr().err
    assert main(["sample", "shipped", "--observe", str(files / "rows.csv")]) == 2
    assert "--observe belongs to a posterior fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", [p for p in SHIPPED.glob("*.py") if "--amortize" in p.read_text()], ids=lambda p: p.stem
)
def test_every_shipped_simulator_is_amortised(path, capsys):
    argv = [
        "--amortize",
        "--encoder",
        "mixture",
        "--steps",
        "3",
        "--particles",
        "30",
        "--sbc",
        "20",
        "-n",
        "20",
        "--refine",
        "none",
        "--json",
    ]
    code = main(["fit-posterior", str(path.with_suffix(".csv")), "--model", str(path), *argv])
    assert code in (0, 3)  # three steps teach little, and it says so
    found = json.loads(capsys.readouterr().out)
    assert len(found["observations"]) >= 20
    assert found["sbc"]["replications"] == 20


def test_a_posterior_that_wake_has_lost_a_mode_of_is_not_trusted(tmp_path, capsys):
    model = MODEL.replace('Parameter("theta", (2,))', 'Parameter("theta")').replace('["a", "b"]', '["a"]')
    model = model.replace("Normal(0.0, 1.0)", "Normal(0.0, 3.0)").replace(
        "Normal(p.theta, 0.5)", "Normal(p.theta.abs(), 0.3)"
    )
    model = model.replace(".log_prob(p.theta).sum()", ".log_prob(p.theta)").replace(
        '"theta": Normal(0.0, 3.0).sample((2,))', '"theta": Normal(0.0, 3.0).sample()'
    )
    model = model.replace("Normal(p.theta.abs(), 0.3).sample()", "Normal(p.theta.abs(), 0.3).sample((1,))")
    (tmp_path / "model.py").write_text(model)
    pd.DataFrame({"a": np.linspace(1.5, 5.0, 8)}).to_csv(tmp_path / "rows.csv", index=False)
    argv = [
        "fit-posterior",
        str(tmp_path / "rows.csv"),
        "--model",
        str(tmp_path / "model.py"),
        "--amortize",
        "-n",
        "400",
    ]
    argv += ["--method", "wake", "--encoder", "gaussian", "--particles", "4", "--steps", "300", "--sbc", "0"]
    assert main([*argv, "--save", str(tmp_path / "FIT"), "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    new = ["sample", str(tmp_path / "FIT"), "--model", str(tmp_path / "model.py"), "-n", "400", "--json"]
    assert main(new) == 0
    for found in (fitted, json.loads(capsys.readouterr().out)):
        for one in found["observations"]:
            theta = one["parameters"]["theta"]
            assert theta["q5"] < 0 < theta["q95"]  # both modes, by samplers
            assert one["correction"] == "smc"
    assert main([*new, "--refine", "none"]) == 3

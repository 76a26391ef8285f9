"""`hsivi fit-posterior --method smc` from the command line: regressions, user models, saved fits, refusals."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hsivi_cli.cli.app import main
from hsivi_cli.methods import smc_posterior


@pytest.fixture(autouse=True)
def _few_particles(monkeypatch):
    monkeypatch.setattr(smc_posterior, "MOST", smc_posterior.FEWEST)


SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "models"
PRIORS = ("--prior", "b=normal(0,5)", "--prior", "Intercept=normal(0,5)")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    path = tmp_path_factory.mktemp("data") / "data.csv"
    pd.DataFrame({"x": x, "y": 1.0 + 2.0 * x + 0.5 * rng.normal(size=20)}).to_csv(path, index=False)
    return path


def run(*argv):
    return main(["fit-posterior", *map(str, argv)])


def test_a_regression_agrees_with_the_default_method_and_is_drawn_again(table, tmp_path, capsys):
    assert run(table, *PRIORS, "--json") == 0
    exact = json.loads(capsys.readouterr().out)
    fit, out = tmp_path / "FIT", tmp_path / "draws.csv"
    argv = [table, *PRIORS, "--method", "smc", "--save", fit, "--out", out, "-n", "500", "--json"]
    assert run(*argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "smc"
    assert found["log_z"] == pytest.approx(exact["log_z"], abs=4 * found["log_z_se"] + 0.05)
    x = exact["parameters"]["x"]
    assert found["parameters"]["x"]["mean"] == pytest.approx(x["mean"], abs=0.1 * x["sd"])
    assert found["parameters"]["x"]["sd"] == pytest.approx(x["sd"], rel=0.1)
    assert len(pd.read_csv(out)) == 500
    assert main(["sample", str(fit), "-n", "300", "--seed", "5", "--out", str(tmp_path / "more.csv"), "--json"]) == 0
    assert len(pd.read_csv(tmp_path / "more.csv")) == 300


def test_refusals_are_one_line(table, tmp_path, capsys):
    model = tmp_path / "model.py"
    model.write_text(
        "import torch\nfrom hsivi_cli import Model, Parameter\n"
        "def model(data):\n"
        "    normal = torch.distributions.Normal(0.0, 1.0)\n"
        "    return Model([Parameter('mu')], lambda p: normal.log_prob(p.mu), lambda p: normal.log_prob(p.mu - 1.0))\n"
    )
    cases = [
        ([table, "--prior", "b=flat"], "flat prior"),
        (["--model", model], "sample_prior"),
        (["--example", "banana"], "likelihood"),
        ([table, "--steps", "5"], "--steps"),
    ]
    for argv, says in cases:
        assert run(*argv, "--method", "smc") == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert "Traceback" not in err
    text = (SHIPPED / "two_moons.py").read_text()
    model.write_text(text.replace("return torch.where(u > 0,", "return torch.where(u > 9,"))
    assert run(SHIPPED / "two_moons.csv", "--model", model, "--method", "smc") == 2
    assert "-inf at every point" in capsys.readouterr().err


def test_sbc_reruns_the_sampler(capsys):
    argv = ["--example", "eight-schools", "--method", "smc", "--sbc", "2", "-n", "200", "--json"]
    assert run(*argv) == 0
    assert json.loads(capsys.readouterr().out)["sbc"]["replications"] == 2

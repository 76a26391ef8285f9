"""`hsivi fit-posterior` as its users type it: tables, models, examples, pipes, saved fits, and what goes wrong."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hsivi_cli.cli.app import main

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "models"
MODEL = """
import torch
from hsivi_cli import Model, Parameter

def model(data):
    y = torch.tensor(data["y"].to_numpy(), dtype=torch.float64)
    normal = torch.distributions.Normal
    return Model(
        parameters=[Parameter("mu"), Parameter("sigma", support="positive")],
        log_prior=lambda p: normal(0.0, 10.0).log_prob(p["mu"]) - p["sigma"],
        log_likelihood=lambda p: normal(p["mu"], p["sigma"]).log_prob(y),
    )
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = 1.0 + 2.0 * x + 0.5 * rng.normal(size=80)
    path = tmp_path_factory.mktemp("data") / "data.csv"
    pd.DataFrame({"x": x, "g": np.repeat(list("ab"), 40), "y": y}).to_csv(path, index=False)
    return path


def run(*argv):
    return main(["fit-posterior", *map(str, argv)])


def fails(capsys, says, *argv, code=2):
    assert run(*argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err


def test_table_and_verdict(table, capsys):
    assert run(table, "--formula", "y ~ x", "-n", "1000") == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert float(rows["x"][1]) == pytest.approx(2.0, abs=0.25)
    assert float(rows["sigma"][1]) == pytest.approx(0.5, abs=0.15)
    assert "trust:" in out
    assert "prior" in err
    assert "gaussian" in err


def test_a_flat_prior_has_no_evidence(table, capsys):
    for prior, known in (("x=flat", False), ("x=normal(0,10)", True)):
        assert run(table, "--formula", "y ~ x", "--prior", prior, "--json") == 0
        assert (json.loads(capsys.readouterr().out)["log_z"] is not None) == known


def test_json_is_one_object_and_the_draws_agree_with_it(table, tmp_path, capsys):
    draws = tmp_path / "draws.csv"
    assert run(table, "--formula", "y ~ x", "--out", draws, "--json") == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    frame = pd.read_csv(draws)
    assert list(frame.columns) == ["lp_approx__", "lp__", "Intercept", "x", "sigma"]
    assert found["draws"] == len(frame) == 4000
    assert found["n"] == 16_000  # the summary is of more draws than are written: its quantiles are less noisy
    x = found["parameters"]["x"]
    assert x["mean"] == pytest.approx(frame["x"].mean(), abs=5 * x["sd"] / 4000**0.5)
    assert found["verdict"]["level"] == "trust"


def test_data_from_stdin_draws_to_stdout(table, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(table.read_bytes())))
    assert run("-", "--formula", "y ~ x", "-n", "800", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert len(pd.read_csv(io.BytesIO(out))) == 800
    assert b"trust" in err


def test_the_last_column_is_the_default_response(table, capsys):
    assert run(table, "-n", "200") == 0
    _, err = capsys.readouterr()
    assert "y ~ x + g" in err


def test_saved_fits_draw_more(table, tmp_path, capsys):
    fit = tmp_path / "FIT"
    assert run(table, "--formula", "y ~ x", "--save", fit, "--json") == 0
    mean = json.loads(capsys.readouterr().out)["parameters"]["x"]["mean"]
    out = tmp_path / "more.csv"
    assert main(["sample", str(fit), "-n", "3000", "--seed", "9", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["draws"] == 3000
    assert pd.read_csv(out)["x"].mean() == pytest.approx(mean, abs=0.02)
    assert main(["sample", str(fit), "-n", "5", "--out", str(tmp_path / "few.csv")]) == 0
    assert len(pd.read_csv(tmp_path / "few.csv")) == 5
    capsys.readouterr()
    assert main(["inspect", str(fit), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "posterior fit"
    fails(capsys, "exists already", table, "--formula", "y ~ x", "--save", fit)
    fails(capsys, "repeat the first command", table, "--formula", "y ~ g", "--save", fit, "--resume")


def test_the_verdict_on_more_draws_is_never_better_than_the_fits(table, tmp_path, capsys):
    fit = tmp_path / "FIT"
    assert run(table, "--formula", "y ~ x", "--save", fit) == 0
    assert main(["sample", str(fit), "-n", "50"]) == 0
    report = json.loads((fit / "report.json").read_text())
    report["verdict"] = {"level": "no", "reasons": ["k-hat 0.98"]}
    (fit / "report.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert main(["sample", str(fit), "-n", "50"]) == 3
    assert "do not use: the fit said: k-hat 0.98" in capsys.readouterr().out


def test_user_model_fits_and_must_be_named_again(table, tmp_path, capsys):
    model, fit = tmp_path / "model.py", tmp_path / "FIT"
    model.write_text(MODEL)
    assert run(table, "--model", model, "--save", fit, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    y = pd.read_csv(table)["y"]
    assert found["parameters"]["mu"]["mean"] == pytest.approx(y.mean(), abs=0.1)
    out = str(tmp_path / "a.csv")
    assert main(["sample", str(fit), "--out", out]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["sample", str(fit), "--out", out, "--model", str(model), "-n", "100"]) == 0
    model.write_text(MODEL + "\n# changed\n")
    assert main(["sample", str(fit), "--out", str(tmp_path / "b.csv"), "--model", str(model)]) == 2
    assert "differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in SHIPPED.glob("*.py") if "--method smc-wake" not in path.read_text())
)
def test_models_that_ship_are_fitted_and_trusted_or_nearly(name, capsys):
    assert run(SHIPPED / f"{name}.csv", "--model", SHIPPED / f"{name}.py", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"]["level"] in ("trust", "care")
    assert all(np.isfinite(row["mean"]) and row["sd"] > 0 for row in report["parameters"].values())


def test_examples_and_a_plot(tmp_path, capsys):
    assert run("--example", "list") == 0
    assert "eight-schools" in capsys.readouterr().out
    picture = tmp_path / "fit.png"
    argv = ["--example", "banana", "--method", "ula", "--steps", "20", "--bridges", "2", "-n", "200"]
    assert run(*argv, "--plot", picture) in (0, 3)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_fit_not_to_be_used_leaves_with_3_but_writes_its_draws(tmp_path, capsys):
    out = tmp_path / "draws.csv"
    argv = ["--example", "seeds", "--method", "vi", "--paper", "--steps", "2", "--refine", "none", "-n", "500"]
    assert run(*argv, "--out", out, "--json") == 3
    stdout, err = capsys.readouterr()
    assert json.loads(stdout)["verdict"]["level"] == "no"
    assert "do not use" in err
    assert len(pd.read_csv(out)) == 500


def test_sbc_is_reported(table, capsys):
    argv = [table, "--formula", "y ~ x", "--prior", "b=normal(0,1)", "--prior", "Intercept=normal(0,1)"]
    assert run(*argv, "--sbc", "20", "-n", "200", "--json") == 0
    found = json.loads(capsys.readouterr().out)["sbc"]
    assert found["replications"] == 20
    assert found["passed"] is True


def test_the_registry_and_the_choices_agree():
    from hsivi_cli.cli.fit_posterior import METHODS
    from hsivi_cli.methods.posterior_registry import POSTERIOR_METHODS, UNTRAINED

    assert set(METHODS) == {*UNTRAINED, *POSTERIOR_METHODS}


def test_bad_input(table, tmp_path, capsys):
    taken = tmp_path / "taken.csv"
    taken.touch()
    fails(capsys, "no data")
    fails(capsys, "does not exist", tmp_path / "none.csv")
    fails(capsys, "exclude", table, "--model", "m.py", "--example", "banana")
    fails(capsys, "belongs to regressions", "--example", "banana", "--formula", "y ~ x")
    fails(capsys, "unknown", table, "--method", "nuts")
    fails(capsys, "does nothing", table, "--bridges", "4")
    fails(capsys, "both want stdout", table, "--out", "-", "--json")
    fails(capsys, "exists already", table, "--out", taken)
    fails(capsys, "unknown extension", table, "--out", tmp_path / "a.doc")
    fails(capsys, "--resume needs", table, "--resume")
    fails(capsys, "--formula is empty", table, "--formula", " ")
    fails(capsys, "z9", table, "--formula", "y ~ z9")
    fails(capsys, "no example", "--example", "nine-schools")
    fails(capsys, "flat", table, "--formula", "y ~ x", "--prior", "b=flat", "--sbc", "5")


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no signals on this system")
def test_an_interrupted_fit_resumes_where_it_was(tmp_path, capsys):
    options = ["--example", "seeds", "--method", "uha", "--bridges", "2", "--steps", "600", "--refine", "none", "-n"]
    options += ["200", "--json"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*options, "--save", whole) in (0, 3)
    first = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "hsivi_cli", "fit-posterior", *options, "--save", str(parts), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (parts / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if process.returncode == 130:
        assert b"--resume" in err
    assert run(*options, "--save", parts, "--resume") in (0, 3)
    second = json.loads(capsys.readouterr().out)
    assert first["parameters"] == second["parameters"]


@pytest.mark.parametrize("paper", [(), ("--paper",)], ids=["stable", "paper"])
def test_ctrl_c_without_save_says_that_nothing_was_kept(paper):
    command = [sys.executable, "-m", "hsivi_cli", "fit-posterior", "--example", "seeds", "--method", "ula", *paper]
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if b"ms/step" in line:  # training has begun, be it of the first stage
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"nothing was kept: with --save DIR" in err

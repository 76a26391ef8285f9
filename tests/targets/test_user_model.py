"""A user's file: what it may be, what is told in one line, and the model files that ship."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from hsivi_cli.errors import InputError
from hsivi_cli.targets.examples import example_density
from hsivi_cli.targets.user_model import load_user_model

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "models"
HEAD = "import torch\nfrom torch.distributions import Normal\nfrom hsivi_cli import Model, Parameter\n"
GOOD = """
def model(data):
    y = torch.tensor(data["y"])
    return Model([Parameter("m")], lambda p: Normal(0, 1).log_prob(p.m), lambda p: Normal(p.m, 0.1).log_prob(y))
"""
TABLE = pd.DataFrame({"y": [0.1, 0.2]})


def load(tmp_path, body, data=TABLE):
    path = tmp_path / "my.py"
    path.write_text(HEAD + body, encoding="utf-8")
    return load_user_model(path, data)


@pytest.mark.parametrize("data", [TABLE, {"y": [0.1, 0.2]}])
def test_a_table_and_a_json_object_give_the_same_posterior(tmp_path, data):
    density = load(tmp_path, GOOD, data)
    assert (density.name, density.dim) == ("my.py", 1)
    # y = 0.1, 0.2 in float64, not rounded to float32 on the way
    m = torch.zeros(1, 1, dtype=torch.float64)
    expected = -1.5 * math.log(2 * math.pi) - 2 * math.log(0.1) - 0.5 * (1 + 4)
    assert abs(float(density.log_prob(m)) - expected) < 1e-12


def test_a_file_beside_it_can_be_imported(tmp_path):
    (tmp_path / "my_helper_of_hsivi.py").write_text("SCALE = 2.0\n")
    body = GOOD.replace("Normal(0, 1)", "Normal(0, SCALE)")
    assert load(tmp_path, "from my_helper_of_hsivi import SCALE\n" + body).dim == 1


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("def model(data)\n  return 1\n", "my.py, line 4: SyntaxError: expected ':'"),
        ("  x = 1\n", "my.py, line 4: IndentationError"),
        ("x = 1\n", "defines no model: write def model(data)"),
        ("model = 3\n", "model is a int, not a function"),
        ("import no_such_module\n", "No module named 'no_such_module' (my.py, line 4)"),
        ("raise SystemExit(3)\n", "SystemExit: 3 (my.py, line 4)"),
        ("def model(data):\n    return 1 / 0\n", "ZeroDivisionError: division by zero (my.py, line 5)"),
        ("def model(data):\n    return data['z']\n", "KeyError: 'z' (my.py, line 5); the data has y"),
        ("def model():\n    return 1\n", "model() must take the data alone"),
        ("def model(data):\n    pass\n", "returned nothing: is a return missing?"),
        ("def model(data):\n    return {}\n", "returned a dict, not a Model"),
        (GOOD.replace('Parameter("m")', 'Parameter("m"), Parameter("m")'), "my.py, line 7: Model: two parameters"),
        (GOOD.replace('"m"', '"m", support="up"'), "my.py, line 7: parameter 'm': support 'up' is not known"),
        (GOOD.replace("p.m, 0.1", "p.n, 0.1"), "no parameter is called 'n': there are m (my.py, line 7)"),
        (GOOD.replace("p.m, 0.1", "p.m.item(), 0.1"), "not differentiable in 'm'"),
    ],
)
def test_one_line_for_a_broken_file(tmp_path, body, line):
    with pytest.raises(InputError) as err:
        load(tmp_path, body)
    assert line in str(err.value)
    assert "\n" not in str(err.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_user_model(tmp_path / "none.py", None)
    with pytest.raises(InputError, match="is a folder"):
        load_user_model(tmp_path, None)
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(InputError, match="is no Python file"):
        load_user_model(tmp_path / "bytes.py", None)
    with pytest.raises(InputError, match="no data file was given"):
        load(tmp_path, GOOD, None)


def shipped(name):
    return load_user_model(SHIPPED / f"{name}.py", pd.read_csv(SHIPPED / f"{name}.csv"))


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.py")))
def test_shipped_models_load_batch_and_predict(name):
    density = shipped(name)
    assert len(density.facts) == 1, "a model that ships must be batched and twice differentiable"
    assert f"hsivi fit-posterior {name}.csv --model {name}.py" in (SHIPPED / f"{name}.py").read_text()
    z = 0.3 * torch.randn(3, density.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(density.gradient(z)).all()
    predictive = density.predictive
    response = predictive.simulate(z, torch.Generator().manual_seed(1))
    assert response.shape == (3, len(predictive.observed))
    assert predictive.condition(response[0]).log_prob(z).shape == (3,)
    if predictive.prior is not None:
        drawn = predictive.prior(200, torch.Generator().manual_seed(2))
        assert torch.isfinite(density.log_prob(drawn)).sum() > 190


def test_shipped_eight_schools_is_the_named_example():
    ours, example = shipped("eight_schools"), example_density("eight-schools")
    z = torch.randn(5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(ours.log_prob(z), example.log_prob(z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.gradient(z), example.gradient(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.constrain(z)["theta"], example.constrain(z)["theta"])


def test_autoregression_takes_its_order_from_json(tmp_path):
    series = pd.read_csv(SHIPPED / "ark.csv")["y"].tolist()
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"K": 3, "T": len(series), "y": series}))
    density = load_user_model(SHIPPED / "ark.py", json.loads(path.read_text()))
    assert density.dim == 5
    z = torch.tensor([[0.1, 0.5, 0.2, -0.1, -1.0]], dtype=torch.float64)
    y = torch.tensor(series, dtype=torch.float64)
    mean = 0.1 + 0.5 * y[2:-1] + 0.2 * y[1:-2] - 0.1 * y[:-3]
    expected = torch.distributions.Normal(mean, torch.tensor(-1.0).double().exp()).log_prob(y[3:])
    torch.testing.assert_close(density.predictive.log_likelihood(z)[0], expected)


def test_epidemic_conserves_the_boys():
    """With hardly any recovery everybody falls ill: the solver's shares still sum to one."""
    density = shipped("ode_model")
    z = torch.tensor([[math.log(3.0), -30.0, math.log(1e-4)]], dtype=torch.float64)
    counts = density.predictive.simulate(z.expand(50, -1), torch.Generator().manual_seed(5)).mean(0)
    assert abs(float(counts[-1]) - 763) < 15

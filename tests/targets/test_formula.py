"""Design matrices against numpy, and data that a formula cannot use."""

import numpy as np
import pandas as pd
import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.targets.formula import build_design, default_formula, formula_columns

RNG = np.random.default_rng(4)
N = 40
FRAME = pd.DataFrame(
    {
        "y": RNG.normal(size=N),
        "x": RNG.normal(size=N),
        "w": RNG.exponential(size=N),
        "big": RNG.integers(10**6, 10**7, N),
        "age": RNG.integers(1, 4, N),
        "g": RNG.choice(["a", "b", "c"], N),
        "yes": RNG.choice(["no", "yes"], N),
        "k": RNG.integers(0, 5, N),
        "flag": RNG.integers(0, 2, N).astype(bool),
        "my col": RNG.normal(size=N),
    }
)
X, W = FRAME["x"].to_numpy(), FRAME["w"].to_numpy()


@pytest.mark.parametrize(
    ("text", "intercept", "columns"),
    [
        ("y ~ x + w", True, {"x": X, "w": W}),
        ("y ~ 0 + x", False, {"x": X}),
        ("y ~ x - 1", False, {"x": X}),
        ("y ~ 1", True, {}),
        ("y ~ x:w", True, {"x:w": X * W}),
        ("y ~ log(w * exp(x)) + sqrt(w)", True, {"log(w * exp(x))": np.log(W) + X, "sqrt(w)": np.sqrt(W)}),
        ("y ~ I((x + w) * w) + I(x + w * w)", True, {"I((x + w) * w)": (X + W) * W, "I(x + w * w)": X + W * W}),
        ("y ~ log(sqrt(w)) + log(w)", True, {"log(sqrt(w))": np.log(W) / 2, "log(w)": np.log(W)}),
        ("y ~ I(big ** 3)", True, {"I(big ** 3)": FRAME["big"].to_numpy(float) ** 3}),  # int64 would overflow
        ("y ~ flag", True, {"flag": FRAME["flag"] * 1.0}),
        ("y ~ `my col`", True, {"my col": FRAME["my col"]}),
        ("y ~ C(age)", True, {"C(age)[2]": FRAME["age"] == 2, "C(age)[3]": FRAME["age"] == 3}),
        ("y ~ T(g, ref='b')", True, {"T(g, ref='b')[a]": FRAME["g"] == "a", "T(g, ref='b')[c]": FRAME["g"] == "c"}),
        ("y ~ 0 + g", False, {f"g[{v}]": FRAME["g"] == v for v in "abc"}),
        ("y ~ x + x:g", True, {"x": X, "x:g[b]": X * (FRAME["g"] == "b"), "x:g[c]": X * (FRAME["g"] == "c")}),
    ],
)
def test_columns_and_names(text, intercept, columns):
    design = build_design(text, FRAME)
    assert design.intercept == intercept
    assert design.names == tuple(columns)
    expected = np.array([np.asarray(c, float) for c in columns.values()]).reshape(-1, N).T
    np.testing.assert_allclose(design.X, expected, rtol=1e-12)
    np.testing.assert_array_equal(design.y, FRAME["y"])


def test_responses_and_offsets():
    np.testing.assert_array_equal(build_design("log(w) ~ x", FRAME).y, np.log(W))
    text = build_design("yes ~ x", FRAME)
    assert text.levels == ("no", "yes")
    np.testing.assert_array_equal(text.y, FRAME["yes"] == "yes")
    np.testing.assert_array_equal(build_design('g["b"] ~ x', FRAME).y, FRAME["g"] == "b")
    trials = build_design("p(k, 9) ~ x", FRAME)
    np.testing.assert_array_equal(trials.trials, np.full(N, 9))
    np.testing.assert_array_equal(trials.y, FRAME["k"])
    offset = build_design("k ~ x + offset(log(w)) + offset(2)", FRAME)
    assert offset.names == ("x",)
    np.testing.assert_allclose(offset.offset, np.log(W) + 2)


def test_group_blocks_follow_the_brackets():
    (block,) = build_design("y ~ (x | g)", FRAME).groups
    assert (block.factor, block.terms, block.levels) == ("g", ("Intercept", "x"), ("a", "b", "c"))
    np.testing.assert_array_equal(np.array(block.levels)[block.index], FRAME["g"])
    np.testing.assert_array_equal(block.values, np.stack([np.ones(N), X], 1))
    apart = build_design("y ~ (1 | g) + (0 + x | g)", FRAME).groups
    assert [b.terms for b in apart] == [("Intercept",), ("x",)]
    (crossed,) = build_design("y ~ (1 | g:age)", FRAME).groups
    assert crossed.factor == "g:age"
    joined = FRAME["g"] + ":" + FRAME["age"].astype(str)
    np.testing.assert_array_equal(np.array(crossed.levels)[crossed.index], joined)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("y ~ log(x)", r'"log\(x\)" is not a number in row'),
        ("y ~ I(1 / (x - x))", "is infinite in row 1|is not a number in row 1"),
        ("y ~ x + y", 'the response "y" is also a predictor'),
        ("y ~ 0", "nothing to estimate"),
        ("g ~ x", r'3 categories, and needs two: choose one, as in g\["c"\]'),
        ('g["z"] ~ x', 'no category "z"'),
        ("y ~ (1 | one)", "all rows are in one group"),
        ("y ~ bad", r'holds numbers, but "oops" in row 3'),
        ("y ~ gap", "missing values"),
        ("y ~ when", "neither numbers nor text"),
        ("y ~ many", "201 categories: leave it out, or make it a group effect"),
    ],
)
def test_bad_data_in_one_line(text, words, capsys):
    frame = pd.concat([FRAME] * 6, ignore_index=True)
    frame["one"], frame["gap"] = "same", np.nan
    frame["bad"] = frame["x"].astype(str)
    frame.loc[2, "bad"] = "oops"
    frame["when"] = pd.Timestamp("2020-01-01")
    frame["many"] = [f"id{i % 201}" for i in range(len(frame))]
    with pytest.raises(InputError, match=words) as caught:
        build_design(text, frame)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""  # formulae would print


def test_default_formula_is_the_last_column_on_all_others():
    frame = FRAME[["my col", "x", "y"]]
    assert default_formula(list(frame.columns)) == "y ~ `my col` + x"
    assert set(formula_columns(None, frame)) == {"my col", "x", "y"}
    assert build_design(default_formula(list(frame.columns)), frame).names == ("my col", "x")
    with pytest.raises(InputError, match="one column only"):
        default_formula(["y"])

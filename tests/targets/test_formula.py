"""Design matrices against numpy, and data that a formula cannot use."""

import datetime
import time

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


def test_whole_numbers_are_in_numeric_order():
    frame = FRAME.assign(plate=np.arange(N) % 12 + 1, old=np.arange(N) % 2 + 9)
    order = [str(i) for i in range(1, 13)]
    for plate in (frame["plate"], frame["plate"] * 1.0, frame["plate"].astype(str)):
        (block,) = build_design("y ~ (1 | plate)", frame.assign(plate=plate)).groups
        assert list(block.levels) == order
        np.testing.assert_array_equal(np.array(block.levels)[block.index], frame["plate"].astype(str))
        names = build_design("y ~ C(plate)", frame.assign(plate=plate)).names
        assert list(names) == [f"C(plate)[{level}]" for level in order[1:]]
    (crossed,) = build_design("y ~ (1 | old:plate)", frame).groups
    pairs = sorted(set(zip(frame["old"], frame["plate"], strict=True)))
    assert list(crossed.levels) == [f"{a}:{b}" for a, b in pairs]
    (block,) = build_design("y ~ (1 | half)", frame.assign(half=frame["plate"] / 2)).groups
    assert block.levels[:3] == ("0.5", "1.0", "1.5")
    given = pd.Categorical(
        FRAME["g"], categories=["c", "a", "unused", "b"]
    )  # the user's own order, as read from parquet
    (block,) = build_design("y ~ (1 | g)", FRAME.assign(g=given)).groups
    assert block.levels == ("c", "a", "b")
    np.testing.assert_array_equal(np.array(block.levels)[block.index], FRAME["g"])


def test_dates_are_categories_only_where_asked():
    frame = FRAME.assign(day=[datetime.date(2020, 1, 1 + i % 3) for i in range(N)])
    with pytest.raises(InputError, match=r"holds dates.*C\(day\)"):
        build_design("y ~ day", frame)
    assert build_design("y ~ C(day)", frame).names == ("C(day)[2020-01-02]", "C(day)[2020-01-03]")
    assert build_design("y ~ (1 | day)", frame).groups[0].levels == ("2020-01-01", "2020-01-02", "2020-01-03")


@pytest.mark.parametrize(
    "text",
    [
        "y ~ x + w + g + x + x:g",
        "y ~ 0 + w + g + x",
        "y ~ w - 1 + x + g + yes",
        "y ~ x + w + g - x - 1",
        "y ~ (x + w) + (w + k) + g*yes + offset(w) + k",
        "y ~ x + (x + w) ** 2 + log(w) + k + log(w)",
    ],
)
def test_long_sums_are_formulaes(text):
    """Our own addition of terms against the library's, one term after another."""
    import formulae

    found = build_design(text, FRAME)
    theirs = formulae.design_matrices(
        text.replace("log", "np.log"), FRAME, env=formulae.environment.Environment([{"np": np}])
    )
    columns = theirs.common.as_dataframe().drop(columns=["Intercept", "offset(w)"], errors="ignore")
    assert found.intercept == ("Intercept" in theirs.common.terms)
    assert [name.replace("log", "np.log") for name in found.names] == list(columns.columns)
    np.testing.assert_array_equal(found.X, columns.to_numpy(float))


def test_a_thousand_columns_are_read_in_linear_time():
    frame = pd.DataFrame(RNG.normal(size=(50, 1001)), columns=[f"c{i}" for i in range(1001)]).assign(g=["a", "b"] * 25)
    start = time.process_time()
    design = build_design("c1000 ~ g + " + " + ".join(f"c{i}" for i in range(1000)), frame)
    assert time.process_time() - start < 3  # 0.4 s; comparing each pair of terms takes as many seconds more
    assert design.names == ("g[b]", *(f"c{i}" for i in range(1000)))
    np.testing.assert_array_equal(design.X[:, 1:], frame.iloc[:, :1000])
    with pytest.raises(InputError, match=">>c9999<<") as caught:
        build_design("c1000 ~ " + " + ".join(f"c{i}" for i in [*range(1000), 9999]), frame)
    assert len(str(caught.value)) < 600
    with pytest.raises(InputError, match="nested too deeply"):
        build_design("c1 ~ " + ":".join(f"c{i % 7}" for i in range(3000)), frame)


def test_default_formula_is_the_last_column_on_all_others():
    frame = FRAME[["my col", "x", "y"]]
    assert default_formula(list(frame.columns)) == "y ~ `my col` + x"
    assert set(formula_columns(None, frame)) == {"my col", "x", "y"}
    assert build_design(default_formula(list(frame.columns)), frame).names == ("my col", "x")
    with pytest.raises(InputError, match="one column only"):
        default_formula(["y"])

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.calibration import judge_ranks
from hsivi_cli.evaluation.posterior_plot import (
    Trace,
    _number,
    _shown,
    check_plot_path,
    density_curve,
    most_correlated,
    plot_fit,
    plot_sbc,
    shortened,
)

RNG = np.random.default_rng(0)
STEPS = np.arange(1, 301)
TRACE = Trace(STEPS, -50 - 1000 * np.exp(-STEPS / 20) + RNG.normal(size=300))


def names(p):
    return [f"beta[{j + 1}]" for j in range(p)]


@pytest.mark.parametrize("p", [1, 5, 1000])
def test_a_picture_of_any_number_of_parameters_is_legible(tmp_path, p):
    plot_fit(tmp_path / "fit.png", names(p), RNG.normal(size=(500, p)), TRACE)
    with Image.open(tmp_path / "fit.png") as image:
        width, height = image.size
        ink = np.asarray(image.convert("L"))
    assert 600 < width < 2700  # no more than a screen
    assert 500 < height < 1300
    assert 0.02 < (ink < 250).mean() < 0.6
    assert [file.name for file in tmp_path.iterdir()] == ["fit.png"]


def test_svg_names_what_it_shows_and_says_what_it_leaves_out(tmp_path):
    values = RNG.normal(size=(500, 100))
    values[:, 60] = values[:, 80] + 0.1 * RNG.normal(size=500)
    columns = names(100)
    columns[60] = "cost_$usd$_a"  # no formula for matplotlib to set
    plot_fit(tmp_path / "fit.svg", columns, values, TRACE, reference=values[:100], title="a verdict")
    import matplotlib

    assert matplotlib.rcParams["svg.fonttype"] == "path"  # text becomes outlines, but is kept in comments
    text = (tmp_path / "fit.svg").read_text()
    for said in ("a verdict", "12 of 100 parameters", "2 of 100 parameters", "cost_$usd$_a", "beta[81]", "beta[1]"):
        assert f"<!-- {said}" in text or said in text, said
    assert "reference outlined" in text
    assert "<!-- beta[50] -->" not in text


@pytest.mark.filterwarnings("error")
def test_columns_that_cannot_be_drawn_do_no_harm(tmp_path):
    values = RNG.normal(size=(300, 4))
    values[:, 1] = 2.0
    values[:, 2] = np.nan
    values[5, 3] = np.inf
    plot_fit(tmp_path / "a.png", names(4), values, Trace([1, 2, 3], [np.nan, np.inf, -1.0]), reference=values)
    plot_fit(tmp_path / "b.pdf", names(4), values, None)
    plot_fit(tmp_path / "c.png", names(1), np.zeros((10, 1)), Trace([], []))
    place, height = density_curve(np.array([1.0] * 999 + [2.0]))
    assert np.isfinite(height).all()
    assert place[0] >= 1
    plot_fit(tmp_path / "d.png", names(2), 1e-300 * values[:, [0, 3]], TRACE)
    assert (tmp_path / "b.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.parametrize("p", [1, 30])
def test_calibration_is_drawn(tmp_path, p):
    result = judge_ranks(names(p), RNG.integers(0, 100, (60, p)), 99)
    plot_sbc(tmp_path / "sbc.png", result)
    with Image.open(tmp_path / "sbc.png") as image:
        assert image.size[0] > 500


def test_bad_paths_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"unknown extension \.jpg: use \.png, \.pdf, \.svg"):
        check_plot_path(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="does not exist"):
        check_plot_path(tmp_path / "none" / "a.png")
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match="--force"):
        check_plot_path(tmp_path / "a.png")
    check_plot_path(tmp_path / "a.png", force=True)


def test_most_correlated_finds_the_pair_and_its_neighbours():
    values = RNG.normal(size=(2000, 50))
    values[:, 40] = values[:, 7] + 0.1 * RNG.normal(size=2000)
    values[:, 20] = values[:, 7] + 1.0 * RNG.normal(size=2000)
    values[:, 3] = 0  # constant
    assert most_correlated(values, 5) == [7, 20, 40]  # and no pair of noise
    assert most_correlated(values[:, :5], 5) == [0, 1, 2, 4]  # few parameters are all worth showing
    assert most_correlated(values[:, :1], 5) == []
    assert most_correlated(np.full((10, 3), np.nan), 5) == []


@given(p=st.integers(1, 60), seed=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_shown_are_at_most_twelve_and_hold_the_pairs(p, seed):
    paired = sorted(np.random.default_rng(seed).permutation(p)[: min(5, p)].tolist())
    shown = _shown(p, paired)
    assert shown == sorted(set(shown))
    assert len(shown) == min(p, 12)
    assert set(paired) <= set(shown)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_density_curves_are_densities(scale):
    x = scale * (3 + RNG.normal(size=4000))
    place, height = density_curve(x)
    assert np.trapezoid(height, place) == pytest.approx(0.996, abs=0.01)
    truth = np.exp(-0.5 * (place / scale - 3) ** 2) / np.sqrt(2 * np.pi)
    assert np.abs(height * scale - truth).max() < 0.04
    half = np.abs(RNG.normal(size=4000))  # a bound at 0: the density does not sag there
    assert density_curve(half)[1][0] == pytest.approx(2 / np.sqrt(2 * np.pi), rel=0.1)


def test_names_and_numbers_stay_short():
    assert shortened("beta[1]") == "beta[1]"
    assert len(shortened("scale(log(a_long_covariate))[17]")) == 26
    assert shortened("scale(log(a_long_covariate))[17]").endswith("[17]")
    assert [_number(v, 20.0) for v in (14.9, -0.01)] == ["15", "0"]
    assert [_number(v, 0.2) for v in (0.512, 0.6)] == ["0.51", "0.60"]
    assert _number(1.234e-7, 1e-7) == "1.2e-07"


def test_no_pyplot_and_no_figure_is_left_open(tmp_path):
    script = (
        "import sys, numpy as np; from pathlib import Path; from hsivi_cli.evaluation.posterior_plot import plot_fit; "
        f"plot_fit(Path({str(tmp_path)!r}) / 'a.png', ['a', 'b'], np.random.default_rng(0).normal(size=(50, 2))); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.amortised_calibration import coverage_curve
from hsivi_cli.evaluation.amortised_plot import _evenly, most_informed, plot_amortised, plot_encoder_check
from hsivi_cli.evaluation.calibration import judge_ranks

RNG = np.random.default_rng(0)
R, L = 60, 49
BLUE, RED, ORANGE = (0x1D, 0x4E, 0xD8), (0xB9, 0x1C, 0x1C), (0xC2, 0x41, 0x0C)


def names(p):
    return [f"beta[{j + 1}]" for j in range(p)]


def checked(p, columns=None, low=0):
    """Ranks of p parameters, a log likelihood, the density and TARP, and the curve of the density's; none below low."""
    ranks = RNG.integers(low, L + 1, (R, p + 3))
    columns = [*(columns or names(p)), "log_likelihood", "(density)", "(joint)"]
    return judge_ranks(columns, ranks, L), coverage_curve(torch.as_tensor(ranks[:, -2]), L)


def posteriors(b, p, n=200):
    centre = RNG.normal(size=(b, 1, p))
    return centre + 0.3 * RNG.normal(size=(b, n, p)), centre[:, 0]


def ink_of(path):
    with Image.open(path) as image:
        width, height = image.size
        return width, height, (np.asarray(image.convert("L")) < 250).mean()


def colours_in(path, *rgb):
    """The share of pixels that are this colour, or nearly."""
    with Image.open(path) as image:
        return (np.abs(np.asarray(image.convert("RGB")).astype(int) - rgb).max(2) < 12).mean()


def says(path, text):
    return f"<!-- {text}" in path.read_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("p", "b"), [(1, 2), (50, 100_000)])
def test_a_check_of_any_number_of_columns_and_observations_is_legible(tmp_path, p, b):
    plot_encoder_check(tmp_path / "check.png", *checked(p), RNG.normal(0.3, 0.2, b))
    width, height, ink = ink_of(tmp_path / "check.png")
    assert 900 < width < 2000  # no more than a screen
    assert 600 < height < 1600
    assert 0.02 < ink < 0.6
    assert [file.name for file in tmp_path.iterdir()] == ["check.png"]


def test_the_check_names_what_it_shows_and_says_what_it_leaves_out(tmp_path):
    columns = names(50)
    columns[7] = "cost_$usd$_a"  # no formula for matplotlib to set
    sbc, coverage = checked(50, columns)
    sbc.ranks[:, 7] = np.minimum(sbc.ranks[:, 7], 5)  # the worst, so that it is shown
    sbc = judge_ranks(sbc.columns, sbc.ranks, L)
    khats = np.array([0.1, 0.4, 0.6, 0.9, np.inf, np.nan])
    plot_encoder_check(tmp_path / "a.svg", sbc, coverage, khats)
    assert says(tmp_path / "a.svg", sbc.verdict[:30])
    for said in (
        "Regions of highest density",
        "All together (TARP)",
        "k-hat of the encoder",
        "Ranks of the truth among 49 draws: share below, minus expected (worst 12 of 51)",
        "cost_$usd$_a",
        f"largest deviation {coverage.deviation:+.2f}",
        "2 of 6 at most 0.5",
        "3 above 0.7",
        "2 above 2, or without a k-hat",
    ):
        assert says(tmp_path / "a.svg", said), said
    assert not says(tmp_path / "a.svg", "(density)")  # it has the first panel, and none of the others
    assert not says(tmp_path / "a.svg", "(joint)")
    plot_encoder_check(tmp_path / "b.svg", sbc, coverage, title="another line")
    assert says(tmp_path / "b.svg", "another line")
    assert not says(tmp_path / "b.svg", "k-hat")


def test_what_fails_is_red(tmp_path):
    for name, low, khat in (("good", 0, 0.3), ("bad", 25, 0.3), ("khat", 0, 0.9)):
        sbc, coverage = checked(1, low=low)
        alone = judge_ranks(["(density)"], sbc.ranks[:, 2:3], L)
        plot_encoder_check(tmp_path / f"{name}.png", alone, coverage, np.full(300, khat) if name != "bad" else None)
    assert colours_in(tmp_path / "good.png", *RED) == 0
    assert colours_in(tmp_path / "bad.png", *RED) > 0.001
    assert colours_in(tmp_path / "bad.png", *BLUE) == 0
    assert colours_in(tmp_path / "khat.png", *RED) > 0.0003
    assert colours_in(tmp_path / "khat.png", *BLUE) > 0.0003


@pytest.mark.filterwarnings("error")
def test_checks_that_cannot_be_drawn_do_no_harm(tmp_path):
    sbc, coverage = checked(1)
    alone = judge_ranks(["(density)"], sbc.ranks[:, :1], L)
    for number, khats in enumerate((np.zeros(0), np.array([np.nan]), np.array([-np.inf, 1e300]), np.full(500, np.inf))):
        plot_encoder_check(tmp_path / f"{number}.png", alone, coverage, khats)
    plot_encoder_check(tmp_path / "alone.png", alone, coverage)
    assert ink_of(tmp_path / "alone.png")[1] < 650  # no empty row of ranks
    other = coverage_curve(torch.as_tensor(RNG.integers(0, 20, 100)), 19)  # of other simulations than the ranks
    plot_encoder_check(tmp_path / "other.pdf", sbc, other)
    assert (tmp_path / "other.pdf").read_bytes()[:5] == b"%PDF-"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("b", "p"), [(1, 1), (2, 1), (7, 2), (150, 50)])
def test_posteriors_of_any_number_of_observations_and_parameters_are_legible(tmp_path, b, p):
    draws, truths = posteriors(b, p)
    if b > 100:
        truths[_evenly(b, 6)] = np.nan  # the others are beside them
    plot_amortised(tmp_path / "a.png", names(p), draws, "a verdict", truths)
    width, height, ink = ink_of(tmp_path / "a.png")
    assert 450 < width < 2200
    assert 350 < height < 1300
    assert 0.01 < ink < 0.6
    assert colours_in(tmp_path / "a.png", *ORANGE) > 0.0001  # truths


def test_posteriors_say_what_they_leave_out(tmp_path):
    draws, truths = posteriors(150, 50)
    draws[:, :, 40] += 10 * RNG.normal(size=(150, 1))
    plot_amortised(tmp_path / "a.svg", names(50), draws, "a verdict", truths)
    for said in (
        "a verdict; 6 of 150 observations, truths in orange",
        "Marginals with 90 % interval (4 of 50 parameters)",
        "100 of 150 observations",
        "beta[41]",
        "observation 150",
        "observation 31",
    ):
        assert says(tmp_path / "a.svg", said), said
    plot_amortised(tmp_path / "b.svg", ["a_$usd$_x", "b"], draws[:4, :, :2])
    for said in ("a_$usd$_x", "b", "observation 4"):
        assert says(tmp_path / "b.svg", said), said
    assert not says(tmp_path / "b.svg", "4 of 4")


@pytest.mark.filterwarnings("error")
def test_draws_that_cannot_be_drawn_do_no_harm(tmp_path):
    draws, truths = posteriors(5, 4)
    draws[:, :, 1] = 2.0
    draws[0], draws[1, 3, 2], truths[2, 0], truths[3] = np.nan, np.inf, np.nan, np.inf
    plot_amortised(tmp_path / "a.png", names(4), draws, truths=truths)
    plot_amortised(tmp_path / "b.png", names(2), draws[:, :, :2], truths=truths[:, :2])
    plot_amortised(tmp_path / "c.png", names(1), np.full((2, 10, 1), np.nan))
    plot_amortised(tmp_path / "d.png", names(2), np.zeros((2, 10, 2)))
    plot_amortised(tmp_path / "e.png", names(3), 1e-300 * posteriors(1, 3)[0])
    plot_amortised(tmp_path / "f.png", names(3), posteriors(2, 3, 1)[0])  # a single draw
    assert colours_in(tmp_path / "a.png", *ORANGE) > 0
    assert colours_in(tmp_path / "f.png", *ORANGE) == 0


def test_what_does_not_go_together_is_one_clear_line(tmp_path):
    draws, truths = posteriors(3, 2)
    for bad in (draws[0], draws[:, :, :1], draws[:0], draws[:, :0]):
        with pytest.raises(InputError, match="for 2 parameters"):
            plot_amortised(tmp_path / "a.png", names(2), bad)
    with pytest.raises(InputError, match="do not go with draws"):
        plot_amortised(tmp_path / "a.png", names(2), draws, truths=truths[:1])
    for plot in (
        lambda path: plot_amortised(path, names(2), draws),
        lambda path: plot_encoder_check(path, *checked(1)),
    ):
        with pytest.raises(InputError, match=r"unknown extension \.jpg"):
            plot(tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_the_parameters_that_data_tell_most_about_are_chosen():
    draws = RNG.normal(size=(40, 300, 6))
    draws[:, :, 4] = 1e-200 * (draws[:, :, 4] + 5 * RNG.normal(size=(40, 1)))  # whatever their scale
    draws[:, :, 1] += 2 * RNG.normal(size=(40, 1))
    draws[:, :, 5] = np.nan
    assert most_informed(draws, 2) == [1, 4]
    assert most_informed(draws, 1) == [4]
    assert most_informed(draws, 9) == [0, 1, 2, 3, 4, 5]
    assert most_informed(draws[:1], 3) == [0, 1, 2]


@pytest.mark.parametrize(("count", "most"), [(1, 6), (6, 6), (7, 6), (100_000, 100)])
def test_observations_are_taken_evenly_and_only_once(count, most):
    rows = _evenly(count, most)
    assert len(rows) == len(set(rows)) == min(count, most)
    assert (rows[0], rows[-1]) == (0, count - 1)


def test_no_pyplot(tmp_path):
    script = (
        "import sys, numpy as np; from pathlib import Path; "
        "from hsivi_cli.evaluation.amortised_plot import plot_amortised; "
        f"plot_amortised(Path({str(tmp_path)!r}) / 'a.png', ['a'], np.random.default_rng(0).normal(size=(2, 50, 1))); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""The map: categories and their legend, numbers, missing values, projections, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation import latent_plot
from hsivi_cli.evaluation.latent_plot import MISSING, MOST_CATEGORIES, categories, plot_map

RANDOM = np.random.default_rng(0)
Z = RANDOM.standard_normal((90, 2))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_categories_are_ordered_by_group_and_told_apart():
    column = np.array([f"p{i % 26}" for i in range(260)], object)
    groups = np.array(["EUR" if i % 26 < 10 else "AFR" for i in range(260)], object)
    found = categories(column, groups)
    assert len(found) == 26
    assert [kind.group for kind in found] == ["AFR"] * 16 + ["EUR"] * 10
    assert len({(kind.colour, kind.marker) for kind in found}) == 26
    assert sorted(np.concatenate([kind.at for kind in found])) == list(range(260))
    assert len({(kind.colour, kind.marker) for kind in categories(column)}) == 26


def test_numbers_as_labels_go_by_size_and_missing_ones_come_last_in_grey():
    column = np.array([10, 2, 1, np.nan, None, "", 2], object)
    found = categories(column)
    assert [kind.label for kind in found] == ["1", "2", "10", "missing"]
    assert found[-1].colour == MISSING
    assert list(found[-1].at) == [3, 4, 5]


def test_very_many_categories_are_summed_up():
    column = np.array([str(i % 100) for i in range(1000)] + ["big"] * 50, object)
    found = categories(column)
    assert len(found) == MOST_CATEGORIES + 1
    assert "big" in [kind.label for kind in found]
    assert found[-1].label == f"{101 - MOST_CATEGORIES} others"


def test_columns_of_the_legend_do_not_tear_groups_apart():
    column = np.array([f"g{i // 5}m{i % 5}" for i in range(40)], object)
    groups = np.array([f"group {i // 5}" for i in range(40)], object)
    columns = latent_plot._legend_columns(categories(column, groups))
    assert len(columns) >= 2
    assert len({len(lines) for lines in columns}) == 1
    assert all(lines[0][0].startswith("group") for lines in columns)
    assert sum(kind is not None for lines in columns for _, kind in lines) == 40


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("kind", ["none", "text", "numbers", "few", "missing"])
def test_every_kind_of_column_in_every_dimension(tmp_path, d, kind):
    column = {
        "none": None,
        "text": np.array(["a", "b$_x$", "c"] * 30, object),
        "numbers": np.where(np.arange(90) < 9, np.nan, np.linspace(0, 1, 90)),
        "few": np.arange(90) % 4,
        "missing": np.full(90, np.nan),
    }[kind]
    z = RANDOM.standard_normal((90, d))
    plot_map(tmp_path / "map.png", z, column, "column", sd=np.full((90, d), 0.1), title="a title")
    assert pixels(tmp_path / "map.png").std() > 5


@pytest.mark.parametrize("extension", ["pdf", "svg"])
def test_other_formats(tmp_path, extension):
    path = tmp_path / f"map.{extension}"
    plot_map(path, Z)
    assert path.stat().st_size > 1000


def test_missing_rows_are_grey_and_known_ones_are_not(tmp_path):
    plot_map(tmp_path / "a.png", Z, np.full(90, None), "x")
    plot_map(tmp_path / "b.png", Z, np.array(["a"] * 90), "x")
    grey, coloured = (pixels(tmp_path / name).astype(int) for name in ("a.png", "b.png"))
    assert np.ptp(grey, axis=2).max() < 40 < np.ptp(coloured, axis=2).max()


def test_projection_of_many_dimensions_keeps_the_largest_ones_and_says_so():
    z = np.column_stack([0.01 * Z[:, 0], 5 * Z[:, 1], 2 * Z[:, 0]])
    place, covariance, labels, note = latent_plot._project(z, np.full((90, 3), 0.1))
    assert abs(np.corrcoef(place[:, 0], Z[:, 1])[0, 1]) > 0.99
    assert np.allclose(covariance, 0.01 * np.eye(2))
    assert labels == ("component 1", "component 2")
    assert "3 latent dimensions, 100%" in note
    assert latent_plot._project(Z, None)[3] is None


def test_a_round_cloud_is_drawn_round():
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    latent_plot._limits(panel, np.array([[-1.0, -0.8], [1.0, 0.8]]), False)
    assert np.ptp(panel.get_xlim()) == pytest.approx(np.ptp(panel.get_ylim()))


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(latent_plot, "_draw", lambda *parts: told.append(parts))
    z = Z.copy()
    z[3, 0] = np.nan
    plot_map(tmp_path / "map.png", z, np.arange(90) / 7)
    assert len(told[0][1]) == 89
    assert "1 rows" in told[0][-1][0]


def test_one_row_and_a_constant_column(tmp_path):
    plot_map(tmp_path / "one.png", Z[:1], np.array([0.5]), "x")
    plot_map(tmp_path / "same.png", np.zeros((5, 3)), np.full(5, 2.5), "x")


@pytest.mark.parametrize(
    ("z", "column", "message"),
    [
        (Z, np.zeros(3), "one a row"),
        (np.zeros((0, 2)), None, "nothing to draw"),
        (np.full((3, 2), np.nan), None, "diverged"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, z, column, message):
    with pytest.raises(InputError, match=message):
        plot_map(tmp_path / "map.png", z, column)

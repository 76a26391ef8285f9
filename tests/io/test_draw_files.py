import csv
import errno
import io
import math
import warnings

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io import draw_files
from hsivi_cli.io.draw_files import DrawTable, csv_bytes, open_draws, read_draws, restore_arrays, write_draws

COLUMNS = ["Intercept", "beta[1]", "beta[2]", "Sigma[1,1]", "Sigma[1,2]", "Sigma[2,1]", "Sigma[2,2]", "b[log(a/b)]"]


def draws(n=50, p=len(COLUMNS)):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, p)) * 10.0 ** rng.integers(-300, 300, (n, p))
    return values, rng.normal(size=n), rng.normal(size=n)


def load_arviz(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        return arviz.from_netcdf(path)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_every_bit_comes_back(tmp_path, name):
    values, lp_approx, lp = draws()
    values[0, 0], values[1, 1], values[2, 2] = math.inf, -math.inf, 5e-324
    assert write_draws(open_draws(str(tmp_path / name)), COLUMNS, torch.from_numpy(values), lp_approx, lp) is None
    found = read_draws(tmp_path / name)
    assert found.columns == tuple(COLUMNS)
    for ours, theirs in ((values, found.values), (lp_approx, found.lp_approx), (lp, found.lp)):
        assert ours.tobytes() == np.ascontiguousarray(theirs).tobytes()


@given(st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_csv_keeps_any_number(numbers):
    column = np.array(numbers)
    text = csv_bytes(DrawTable(("x",), column[:, None], column, column)).decode()
    rows = [[float(cell) for cell in row] for row in list(csv.reader(io.StringIO(text)))[1:]]
    assert np.array(rows)[:, 2].tobytes() == column.tobytes()


def test_csv_is_stans_pathfinder_dialect(tmp_path):
    values, _, lp = draws(3)
    text = write_draws(open_draws("-"), COLUMNS, values, None, lp)
    header, first, *_ = text.decode().splitlines()
    assert header == (
        'lp_approx__,lp__,Intercept,beta[1],beta[2],"Sigma[1,1]","Sigma[1,2]","Sigma[2,1]","Sigma[2,2]",b[log(a/b)]'
    )
    assert first.startswith("nan,")  # unknown, not 0
    frame = pandas.read_csv(io.BytesIO(text), float_precision="round_trip")
    assert list(frame.columns) == ["lp_approx__", "lp__", *COLUMNS]
    assert frame["lp_approx__"].isna().all()
    np.testing.assert_array_equal(frame["Sigma[2,1]"], values[:, 5])
    (tmp_path / "a.csv").write_bytes(b"# stan_version_major = 2\n" + text + b"# Elapsed\n")
    np.testing.assert_array_equal(read_draws(tmp_path / "a.csv").values, values)


def test_netcdf_restores_vectors_matrices_and_chains(tmp_path):
    values, lp_approx, lp = draws(50)
    write_draws(open_draws(str(tmp_path / "a.nc")), COLUMNS, values, lp_approx, lp, chains=2, note="from a fit")
    data = load_arviz(tmp_path / "a.nc")
    posterior = data.posterior
    assert set(posterior.data_vars) == {"Intercept", "beta", "Sigma", "b[log(a∕b)]"}
    assert posterior["Sigma"].shape == (2, 25, 2, 2)
    np.testing.assert_array_equal(posterior["Sigma"].values[1, 3, 1, 0], values[28, 5])
    np.testing.assert_array_equal(posterior["beta"].values.reshape(50, 2), values[:, 1:3])
    assert posterior["beta_dim_0"].values.tolist() == [1, 2]
    np.testing.assert_array_equal(data.sample_stats["lp"].values.ravel(), lp)
    np.testing.assert_array_equal(data.sample_stats["lp_approx"].values.ravel(), lp_approx)
    assert data.attrs["note"] == "from a fit"
    assert data.posterior["Intercept"].dtype == np.float64


def test_incomplete_and_labelled_indices_stay_as_they_are():
    values = np.arange(12.0).reshape(2, 6)
    columns = ["a[1]", "a[3]", "b[x]", "c", "d[2]", "d[1]"]
    found = restore_arrays(columns, values)
    assert set(found) == {"a[1]", "a[3]", "b[x]", "c", "d"}
    np.testing.assert_array_equal(found["d"], values[:, [5, 4]])
    mixed = restore_arrays(["e", "e[1]", "f[0]"], values[:, :3])
    assert set(mixed) == {"e", "e[1]", "f[0]"}


def test_format_comes_from_the_name_or_the_option(tmp_path):
    assert open_draws(str(tmp_path / "a.CSV")).format == "csv"
    assert open_draws(str(tmp_path / "a.out"), "netcdf").format == "netcdf"
    assert open_draws("-").path is None
    with pytest.raises(InputError, match=r"\.txt: use \.csv, \.nc"):
        open_draws(str(tmp_path / "a.txt"))
    with pytest.raises(InputError, match="--format arrow"):
        open_draws(str(tmp_path / "a.txt"), "arrow")
    with pytest.raises(InputError, match="streams CSV only"):
        open_draws("-", "parquet")


def test_refuses_what_cannot_be_written_before_fitting(tmp_path):
    values, *_ = draws()
    path = str(tmp_path / "a.csv")
    write_draws(open_draws(path), COLUMNS, values)
    with pytest.raises(InputError, match="--force"):
        open_draws(path)
    write_draws(open_draws(path, force=True), COLUMNS, values[:5])
    assert len(read_draws(tmp_path / "a.csv").values) == 5
    with pytest.raises(InputError, match="is a folder"):
        open_draws(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        open_draws(str(tmp_path / "none" / "a.csv"))
    with pytest.raises(InputError, match="cannot be written"):
        open_draws("/proc/a.csv")


def test_names_and_shapes_that_do_not_fit(tmp_path):
    values, _, lp = draws()
    out = open_draws(str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="2 names"):
        write_draws(out, ["a", "b"], values)
    with pytest.raises(InputError, match='two parameters are called "a"'):
        write_draws(out, ["a", "a"], values[:, :2])
    with pytest.raises(InputError, match='"lp__", which the draws need'):
        write_draws(out, ["lp__"], values[:, :1])
    with pytest.raises(InputError, match="50 draws"):
        write_draws(out, COLUMNS, values, lp[:3], lp)
    with pytest.raises(InputError, match="3 chains"):
        write_draws(open_draws(str(tmp_path / "a.nc")), COLUMNS, values, chains=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "line"), [("", "empty"), ("a,b\n1,x\n", "no table"), ("a,b\n1\n2\n", "no table")])
def test_damaged_files_are_one_clear_line(tmp_path, content, line):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=line):
        read_draws(tmp_path / "a.csv")
    with pytest.raises(InputError, match="does not exist"):
        read_draws(tmp_path / "b.csv")


@pytest.mark.parametrize("name", ["a.csv", "a.nc", "a.parquet"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for writer in ("csv_bytes", "_write_netcdf", "_write_parquet"):
        monkeypatch.setattr(draw_files, writer, full)
    with pytest.raises(RunError, match="disk is full"):
        write_draws(open_draws(str(tmp_path / name)), COLUMNS, draws()[0])
    assert list(tmp_path.iterdir()) == []

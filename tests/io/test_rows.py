"""Rows from every kind of file, what is checked of them, and that a large table costs its own memory only."""

import gzip
import math
import struct
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from hsivi_cli.errors import InputError
from hsivi_cli.io import row_streams
from hsivi_cli.io.rows import Rows, batches, binarise, clean, name_columns, read_rows, require_complete, select


@pytest.fixture
def frame() -> pandas.DataFrame:
    made = np.random.default_rng(0)
    return pandas.DataFrame(
        {
            "sample": [f"s{i}" for i in range(6)],
            "a": made.normal(size=6),
            "n": [1, 2, 3, 4, 5, 6],
            "b": [1.5, np.nan, 2.5, 3.0, 1.0, 0.0],
            "population": ["YRI", "CEU", None, "CEU", "YRI", "CHB"],
            "yes": [True, False, True, True, False, False],
        }
    )


@pytest.fixture(params=["csv", "tsv", "parquet", "csv.gz"])
def table(request, frame, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    if request.param == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if request.param == "tsv" else ",")
    return str(path)


def write(tmp_path, text: str, name: str = "rows.csv") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_tables_of_every_format(table, frame):
    rows = read_rows(table)
    assert rows.columns == ("a", "n", "b", "yes")
    assert rows.values.dtype == np.float32
    assert np.allclose(rows.values, frame[["a", "n", "b", "yes"]].to_numpy(float), equal_nan=True, atol=1e-6)
    assert list(rows.other.columns) == ["sample", "population"]
    assert rows.kind == "numbers"


def test_large_tables_are_streamed_to_the_same_rows(table, frame, monkeypatch):
    whole = read_rows(table, labels=("n",))
    monkeypatch.setattr(row_streams, "LARGE", 1)
    parts = read_rows(table, labels=("n",))
    assert parts.columns == whole.columns == ("a", "b", "yes")
    assert np.array_equal(parts.values, whole.values, equal_nan=True)
    assert parts.other["population"].isna().tolist() == whole.other["population"].isna().tolist()
    assert parts.labels("population")[1] == whole.labels("population")[1]
    # a column of labels is what it was named as, even where it is numbers
    assert [str(value) for value in parts.other["n"]] == [str(value) for value in whole.other["n"]]
    assert read_rows(table, columns=["b", "a"]).columns == ("b", "a")
    with pytest.raises(InputError, match='no column "zzz"'):
        read_rows(table, columns=["zzz"])
    with pytest.raises(InputError, match='"sample"'):
        read_rows(table, columns=["sample"])


def test_text_in_a_streamed_column_of_numbers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(row_streams, "LARGE", 1)
    monkeypatch.setattr(row_streams, "BLOCK", 4096)
    monkeypatch.setattr(row_streams, "_HEAD", 4096)
    path = write(tmp_path, "a,b\n" + "1,2\n" * 5000 + "x,2\n" + "1,2\n" * 10)
    with pytest.raises(InputError, match=r"holds text.*'x'.*--labels") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)


def test_columns_are_chosen_and_labels_kept_beside(table):
    rows = read_rows(table, columns=("b", "a"), labels=("n",))
    assert rows.columns == ("b", "a")
    assert set(rows.other.columns) == {"sample", "n", "population", "yes"}
    codes, names = rows.labels("population")
    assert names == ("CEU", "CHB", "YRI")
    assert codes.tolist() == [2, 0, -1, 0, 2, 1]
    assert rows.labels("n")[0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match='no column "b" of labels'):
        rows.labels("b")


def test_labels_with_gaps_are_whole_numbers():
    rows = Rows(np.zeros((4, 1), np.float32), ("a",), pandas.DataFrame({"k": [3.0, np.nan, 1.0, 3.0], "e": [None] * 4}))
    codes, names = rows.labels("k")
    assert codes.tolist() == [1, -1, 0, 1]
    assert names == ("1", "3")
    with pytest.raises(InputError, match="every label"):
        rows.labels("e")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n3,x\n5,6\n", 'column "b", row 2 is "x", not a number'), ("", "empty"), ("a,b\n", "no rows"),
     ("s,t\nu,v\nw,x\n", "no column of numbers"), ("a,a\n1,2\n", "more than one column"),
     ("a,b\n1,2\n3\n", "unequal length")],
)  # fmt: skip
def test_bad_tables_are_one_clear_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        read_rows(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n", "one row only"), ("a,b\n1,2\n1,2\n", "none of the 2 columns of numbers moves"),
     ("a,b\n1,2\n3,inf\n2,1\n", 'column "b", row 2 is infinite'), ("a,b\n1,2\n3,1e60\n", "infinite")],
)  # fmt: skip
def test_rows_that_no_model_can_have_are_one_clear_line(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        clean(read_rows(write(tmp_path, text)))
    assert "\n" not in str(caught.value)


def test_constant_and_empty_columns_are_dropped_and_told(tmp_path):
    rows = clean(read_rows(write(tmp_path, "a,b,c,d\n1,2,,1\n3,2,,\n4,2,,2\n")))
    assert rows.columns == ("a", "d")
    assert rows.values.shape == (3, 2)
    assert any("2 of 4 columns are constant" in fact and "b, c" in fact for fact in rows.facts)
    assert np.isnan(rows.values[1, 1])
    with pytest.raises(InputError, match='column "d", row 2 is missing, and PCA'):
        require_complete(rows, "PCA")
    require_complete(select(rows, ["a"]), "PCA")


def test_a_row_without_any_value_is_told(tmp_path):
    rows = clean(read_rows(write(tmp_path, "a,b\n1,2\nNA,NA\n3,1\n")))
    assert any("1 of 3 rows have no value" in fact for fact in rows.facts)


def test_arrays(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3))
    path = tmp_path / "rows.npy"
    np.save(path, values)
    rows = read_rows(str(path))
    assert np.allclose(rows.values, values, atol=1e-6)
    assert rows.columns == ("x[0]", "x[1]", "x[2]")
    assert clean(read_rows(str(path), columns=["x[2]"])).values.shape == (5, 1)
    np.save(path, np.arange(3.0))
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        read_rows(str(path))
    np.save(path, np.array([[{}]], dtype=object))
    with pytest.raises(InputError, match="never unpickled"):
        read_rows(str(path))
    np.save(path, np.array([["a"]]))
    with pytest.raises(InputError, match="not numbers"):
        read_rows(str(path))
    path.write_bytes(b"junk")
    with pytest.raises(InputError):
        read_rows(str(path))
    with pytest.raises(InputError, match="does not exist"):
        read_rows(str(tmp_path / "no.npy"))


def test_images_from_folders_and_idx_files_with_their_labels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.png")
    wanted = pixels.reshape(4, 15) / np.float32(255)
    rows = clean(read_rows(str(folder)))
    assert rows.shape == (3, 5, 1)
    assert rows.kind == "images"
    assert np.allclose(rows.values, wanted)
    assert rows.columns[6] == "pixel[1,1]"
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 4, 3, 5) + pixels.tobytes()))
    assert np.allclose(read_rows(str(path)).values, wanted)
    beside = tmp_path / "train-labels-idx1-ubyte.gz"
    beside.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes([7, 1, 7, 0])))
    assert read_rows(str(path)).labels("label")[0].tolist() == [2, 1, 2, 0]
    beside.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes([7, 1, 7])))
    with pytest.raises(InputError, match="labels for the 4 images"):
        read_rows(str(path))
    with pytest.raises(InputError, match="single image"):
        read_rows(str(folder / "0.png"))


def test_digits_keep_pixels_that_never_move_and_can_be_made_binary():
    rows = clean(read_rows("digits"))
    assert rows.values.shape == (1797, 64)
    assert rows.shape == (8, 8, 1)
    assert len(rows.labels("label")[1]) == 10
    binary = binarise(rows)
    assert set(np.unique(binary.values)) == {0.0, 1.0}
    gaps = Rows(np.array([[np.nan, 0.9]], np.float32), ("a", "b"))
    assert np.array_equal(binarise(gaps).values, [[np.nan, 1.0]], equal_nan=True)


def test_batches_visit_every_row_once_a_round_and_copy_only_a_batch():
    rows = torch.arange(20.0).reshape(10, 2)
    stream = batches(rows, 4, torch.Generator().manual_seed(0))
    first = [next(stream) for _ in range(3)]
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(torch.cat(first)[:, 0].tolist()) == rows[:, 0].tolist()
    second = torch.cat([next(stream) for _ in range(3)])
    assert not torch.equal(torch.cat(first), second)
    again = batches(rows, 4, torch.Generator().manual_seed(0))
    assert torch.equal(first[0], next(again))
    values, labels = next(batches(rows, 10, torch.Generator().manual_seed(1), torch.arange(10)))
    assert torch.equal(values[:, 0], 2.0 * labels)
    with pytest.raises(InputError, match="batch-size 0"):
        next(batches(rows, 0, torch.Generator()))


def test_a_tensor_of_rows_shares_their_memory():
    rows = Rows(np.zeros((2, 2), np.float32), ("a", "b"))
    rows.tensor()[0, 0] = 5
    assert rows.values[0, 0] == 5
    assert math.isclose(len(rows), 2)


def test_a_large_table_costs_its_own_memory_only(tmp_path):
    """Peak memory above the interpreter's for 20 MB of float32 from 95 MB of text."""
    path = tmp_path / "large.csv"
    line = ",".join(["0.12345678901234567"] * 50) + "\n"
    with path.open("w") as file:
        file.write(",".join(f"c{j}" for j in range(50)) + "\n")
        for _ in range(100):
            file.write(line * 1000)
    script = (
        "import resource, sys, pyarrow.csv, torch, pandas; from hsivi_cli.io.rows import read_rows; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; rows = read_rows(sys.argv[1]); "
        "assert rows.values.shape == (100_000, 50), rows.values.shape; "
        "sys.stdout.write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20 + 100


def test_columns_are_named_one_by_one_or_as_a_range():
    assert name_columns("b, a") == ("b", "a")
    assert name_columns("age,PC9..PC11") == ("age", "PC9", "PC10", "PC11")
    assert name_columns("1:2345") == ("1:2345",)
    for text in ("PC3..PC1", "PC1..QC3", "a..b", "", "a,a", "PC1..PC3,PC2"):
        with pytest.raises(InputError, match="--columns"):
            name_columns(text)

"""Tables in: what is read, what is refused and in which words, and which rows are dropped."""

import gzip
import io
import pickle

import numpy as np
import pandas as pd
import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.io.tables import read_table, select_complete


def read(data):
    return read_table("-", io.BytesIO(data))


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_delimiters_types_and_gaps(delimiter):
    lines = ["x,name,flag,count", "1.5,a b,true,3", "NA,c,false,", "inf,é,true,5"]
    frame = read("\r\n".join(lines).replace(",", delimiter).encode())
    assert list(frame.columns) == ["x", "name", "flag", "count"]
    np.testing.assert_array_equal(frame["x"], [1.5, np.nan, np.inf])
    assert list(frame["name"]) == ["a b", "c", "é"]
    assert frame["flag"].dtype == bool
    np.testing.assert_array_equal(frame["count"], [3, np.nan, 5])


def test_parquet_gzip_bom_and_decimal_commas(tmp_path):
    frame = pd.DataFrame({"x": np.arange(4) / 3, "g": list("abca")})
    frame.to_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_table(str(tmp_path / "t.parquet")), frame, check_dtype=False)
    text = frame.to_csv(index=False).encode()
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text))
    pd.testing.assert_frame_equal(read_table(str(tmp_path / "t.csv.gz")), frame, check_dtype=False)
    pd.testing.assert_frame_equal(read(b"\xef\xbb\xbf" + text), frame, check_dtype=False)
    np.testing.assert_array_equal(read(b"a;b\n1,5;2,25\n")[["a", "b"]], [[1.5, 2.25]])


def test_a_type_that_shows_late_changes_the_whole_column():
    rows = ["1"] * 300_000 + ["2.5"]
    frame = read(("x\n" + "\n".join(rows)).encode())
    assert frame["x"].dtype == np.float64
    assert len(frame) == 300_001
    assert frame["x"].iloc[-1] == 2.5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"  \n\n", "empty"),
        (b"a,b\n", "no rows"),
        (b"1,2\n3,4\n", "no header"),
        (b"a,a\n1,2\n", 'more than one column named "a"'),
        (b",b\n1,2\n", "column 1 has no name"),
        (b"a,b\n1,2\n3\n", "unequal length"),
        (b"a,b\n1,2\n3,4,5\n", "Row #3"),
        (b"a,b\n1,caf\xe9\n", "line 2: not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "not UTF-8"),
        (pickle.dumps({"a": [1]}), "pickle"),
        (b"PAR1" + b"x" * 40, "damaged or no parquet"),
        (b"\x1f\x8b\x08garbage", "damaged"),
    ],
)
def test_bad_tables_are_refused_in_one_line(data, words):
    with pytest.raises(InputError) as caught:
        read(data)
    assert words in str(caught.value)
    assert "stdin" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_table(str(tmp_path / "none.csv"))
    with pytest.raises(InputError, match="cannot be read"):
        read_table(str(tmp_path))


def test_only_the_columns_in_use_are_judged():
    frame = pd.DataFrame({"x": [1.0, np.nan, 3.0, 4.0], "y": [1.0, 2.0, 3.0, np.nan], "z": [np.nan] * 4})
    kept, dropped = select_complete(frame, ["x"], "drop")
    assert dropped == 1
    assert list(kept["x"]) == [1, 3, 4]
    assert list(kept.index) == [0, 1, 2]
    kept, dropped = select_complete(frame, ["x", "y"], "drop")
    assert (list(kept["x"]), dropped) == ([1, 3], 2)
    with pytest.raises(InputError, match=r"2 of 4 rows have missing values, the first is row 2"):
        select_complete(frame, ["x", "y"], "error")
    with pytest.raises(InputError, match='every row has a missing value, most in "z"'):
        select_complete(frame, ["x", "z"], "drop")
    with pytest.raises(InputError, match='no column "w"'):
        select_complete(frame, ["w"], "drop")
    assert select_complete(frame[:1], ["x", "y"], "error")[1] == 0

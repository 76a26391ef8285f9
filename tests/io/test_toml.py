"""What we write, the standard library reads back."""

import math
import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hsivi_cli.errors import InputError
from hsivi_cli.io.toml import read_toml, toml_value

SCALARS = st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()


@given(SCALARS | st.lists(SCALARS))
@example('\x7f\\"\u2028\U0001f600\x00')
def test_values_survive_the_round_trip(value):
    read = tomllib.loads(f"key = {toml_value(value)}  # and a comment")["key"]
    assert read == value
    assert type(read) is type(value)


def test_not_a_number_too():
    assert math.isnan(tomllib.loads(f"key = {toml_value(math.nan)}")["key"])


def test_what_is_no_text_is_refused():
    with pytest.raises(UnicodeEncodeError):
        toml_value("\udc80")


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"a =", "cannot be read as TOML"), (b"\xff\xfe", "cannot be read as TOML"), (b"[" * 100_000, "cannot be read")],
)
def test_damaged_files_are_named_in_one_line(tmp_path, content, what):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        read_toml(tmp_path / "x.toml")
    assert "\n" not in str(caught.value)


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(InputError, match="is a directory: name a TOML file"):
        read_toml(tmp_path)


def test_a_number_that_python_does_not_write_is_refused(tmp_path):
    (tmp_path / "x.toml").write_text(f"steps = 0x{'f' * 5000}")
    with pytest.raises(InputError, match="cannot be read as TOML"):
        read_toml(tmp_path / "x.toml")

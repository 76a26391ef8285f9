"""The only door to stdout: every byte goes through it, however little the stream takes at a time."""

import io
import sys
from types import SimpleNamespace

import pytest

from hsivi_cli.cli import console
from hsivi_cli.errors import RunError


def test_all_bytes_arrive_when_a_stream_takes_a_part(monkeypatch):
    class Short(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    stream = Short()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=stream))
    for data in (b"abcdefgh", memoryview(b"ijklm"), b""):
        console.result_bytes(data)
    assert stream.getvalue() == b"abcdefghijklm"


def test_a_closed_stdout_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    for print_result in (
        lambda: console.result_line("x"),
        lambda: console.result_json({}),
        lambda: console.result_bytes(b"x"),
        lambda: console.result_table("x", [("a", "b")]),
    ):
        with pytest.raises(RunError, match="stdout is closed"):
            print_result()

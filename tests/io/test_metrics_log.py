"""What is read back of a log that was cut short or damaged."""

import json
import math

import pytest

from hsivi_cli.io.metrics_log import append_metrics, is_number, plot_metrics, read_metrics, rewind_metrics

DAMAGED = [
    b'{"stdp": 30, "loss": 1.0}',
    b'{"step": "30"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": NaN}',
    b'{"step": {}}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": 30, "x": ' + b"[" * 100_000,
    b'{"step": 30, "x": ' + b"[" * 500 + b"]" * 500 + b"}",
    b"[30]",
    b"30",
    b"\xff\xfe",
    b'{"step": 30, "lo',
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:20].decode(errors="replace"))
def test_a_log_is_read_and_rewound_without_a_damaged_line(tmp_path, line):
    log = tmp_path / "metrics.jsonl"
    for step in (10, 20):
        append_metrics(log, {"step": step, "loss": 0.5})
    with log.open("ab") as file:
        file.write(line + b"\n")
    append_metrics(log, {"step": 40, "loss": 0.5})
    assert [record["step"] for record in read_metrics(log)] == [10, 20, 40]
    rewind_metrics(log, 15)
    assert [json.loads(text) for text in log.read_text().splitlines()] == [{"step": 10, "loss": 0.5}]


@pytest.mark.parametrize("value", [None, "1", True, math.nan, -math.inf, 10**400, [1.0]])
def test_curves_leave_out_what_is_no_number(tmp_path, value):
    assert not is_number(value)
    plot_metrics([{"step": 1, "loss": 0.5}, {"step": 2, "loss": value}], ("loss",), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()

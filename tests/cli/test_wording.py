"""Paces and times read well at every size."""

import pytest

from hsivi_cli.cli.wording import duration, figure, pace


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (601, "10 min"),
        (3599, "60 min"),
        (3600, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3, "12 s/step"), (0.52, "0.52 s/step"), (0.01, "100 steps/s"), (0.0, "1000000000 steps/s")],
)
def test_paces(seconds, text):
    assert pace(seconds) == text


def test_figures_are_short():
    assert figure(1234.5678) == "1235"
    assert figure(1.2345678e-7) == "1.235e-07"

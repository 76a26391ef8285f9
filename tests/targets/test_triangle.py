"""The triangular factor against numpy's QR, on columns that are well apart and columns that depend on each other."""

import numpy as np
import pytest

from hsivi_cli.targets.triangle import independent, triangle

RNG = np.random.default_rng(0)
A = RNG.normal(size=(50, 6)) * 10.0 ** RNG.integers(-8, 8, 6)


@pytest.mark.parametrize(
    "matrix",
    [A, A[:4], A[:, :0], A + 1e3 * np.abs(A).max(0), np.c_[A, A @ np.arange(6)], np.c_[A, np.zeros(50)]],
    ids=["apart", "wide", "none", "far from 0", "dependent", "zero"],
)
def test_it_is_numpys_qr_up_to_signs(matrix):
    found, expected = triangle(matrix), np.linalg.qr(matrix, mode="r")
    assert found.shape == expected.shape
    signs = np.sign(np.diag(found)) * np.sign(np.diag(expected))
    length = np.sqrt((matrix**2).sum(0)) + 1e-300
    regular = np.abs(np.diag(expected)) > 1e-12 * length[: len(expected)]  # rounding decides the other rows' sign
    difference = found - np.where(signs == 0, 1, signs)[:, None] * expected
    assert np.abs(difference / length)[regular].max(initial=0) < 1e-7


def test_dependence_is_seen():
    unit = A / np.sqrt((A**2).sum(0))
    assert independent(unit.T @ unit) is not None
    twice = np.c_[unit, unit[:, 0]]
    assert independent(twice.T @ twice) is None

"""Triton's kernels compiled for GPUs that are not here: they assemble, spill nothing, and stay within a bound."""

import os

import pytest

from hsivi_cli.kernels import philox
from hsivi_cli.kernels.ahead_of_time import compile_for
from hsivi_cli.kernels.runtime import INTERPRETED, triton

pytestmark = pytest.mark.skipif(
    triton is None or INTERPRETED, reason="Triton cannot be imported here (it is published for Linux only)"
)
CAPABILITIES = (80, 90)
MOST_REGISTERS = 128  # of 255: half of an SM's threads can be resident


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def check(*arguments, bound=MOST_REGISTERS, **options):
    for capability in CAPABILITIES:
        used = compile_for(*arguments, capability=capability, **options)
        assert 0 < used.registers <= bound, used
        assert used.spill_stores == used.spill_loads == used.stack == 0, used


def test_normals():
    types = {"out": "*fp32", "streams": "*i64", "layer": "i32", "elements": "i32"}
    check(philox.normals_kernel, types, {"BLOCK": 256}, bound=64)

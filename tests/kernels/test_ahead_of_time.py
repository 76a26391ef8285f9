"""Triton's kernels compiled for GPUs that are not here: they assemble, within bounds on registers and spills."""

import os

import pytest
import torch

from hsivi_cli.kernels import group_norm_silu, group_norm_silu_backward, hsivi_step, philox
from hsivi_cli.kernels.ahead_of_time import compile_for
from hsivi_cli.kernels.choice import INTERPRETED
from hsivi_cli.kernels.runtime import triton
from hsivi_cli.kernels.tiles import make_plan

pytestmark = pytest.mark.skipif(
    triton is None or INTERPRETED, reason="Triton cannot be imported here (it is published for Linux only)"
)
CAPABILITIES = (80, 90)
MOST_REGISTERS = 128  # of 255: half of an SM's threads can be resident
MOST_SPILLED = 16  # bytes a thread: now and then ptxas itself spills an address, where that lets more threads in


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def check(*arguments, bound=MOST_REGISTERS, **options):
    for capability in CAPABILITIES:
        used = compile_for(*arguments, capability=capability, **options)
        assert 0 < used.registers <= bound, used
        assert max(used.spill_stores, used.spill_loads, used.stack) <= MOST_SPILLED, used


def test_normals():
    types = {"out": "*fp32", "streams": "*i64", "layer": "i32", "elements": "i32"}
    check(philox.normals_kernel, types, {"BLOCK": 256}, bound=64)


GROUP_NORM = dict.fromkeys(("weight", "bias", "stats", "sums"), "*fp32") | {"eps": "fp32"}
GROUP_NORM |= dict.fromkeys(["channels", "pixels", "groups", "per_group", "sums_stride", "sample_stride"], "i32")
GROUP_NORM |= dict.fromkeys(["channel_stride", "pixel_stride", "temb_stride", "scale_stride"], "i32")


@pytest.mark.parametrize(
    ("shape", "channels_last", "dtype"),
    [
        ((4, 128, 32, 32), False, "fp32"),
        ((4, 256, 32, 32), True, "bf16"),
        ((4, 256, 32, 32), True, "fp32"),
        ((4, 384, 32, 32), False, "bf16"),
    ],
)
def test_group_norm_silu(shape, channels_last, dtype):
    types = GROUP_NORM | dict.fromkeys(["x", "temb", "scale", "shift", "out", "grad", "dx"], f"*{dtype}")
    constant_stride = {"channel_stride" if channels_last else "pixel_stride": 1}
    for kernel, tile in [
        (group_norm_silu.forward_kernel, group_norm_silu.FORWARD_TILE),
        (group_norm_silu_backward.backward_kernel, group_norm_silu.BACKWARD_TILE),
    ]:
        plan = make_plan(torch.Size(shape), 32, channels_last, 2 if dtype == "bf16" else 4, tile)
        constants = plan.constants | constant_stride | {"HAS_TEMB": True, "HAS_SCALE": True}
        mine = {name: types[name] for name in kernel.arg_names if name not in constants}
        divisible = [name for name, kind in mine.items() if kind == "i32" and name != "per_group"]
        check(kernel, mine, constants, warps=plan.warps, divisible=divisible)


@pytest.mark.parametrize("quantise", [False, True])
def test_hsivi_step(quantise):
    kernel = hsivi_step.step_kernel
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(["a", "b", "c1"], "fp32")
    types |= {"x": "*fp32", "eps": "*bf16", "out": "*u8" if quantise else "*fp32"}
    types |= {"log_gamma": "*fp32", "streams": "*i64"}
    constants = {"NOISE": not quantise, "GAMMA": not quantise, "PER_ELEMENT": not quantise, "QUANTISE": quantise}
    constants |= {"BLOCK": hsivi_step.BLOCK, "x_p": 1, "eps_p": 1}
    mine = {name: kind for name, kind in types.items() if name not in constants}
    check(kernel, mine, constants, bound=96)

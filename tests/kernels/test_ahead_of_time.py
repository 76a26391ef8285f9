"""Triton's kernels compiled for GPUs that are not here: they assemble, within bounds on registers and spills."""

import os

import pytest
import torch

from hsivi_cli.kernels import comparison, critic_loss, group_norm_silu, group_norm_silu_backward, hsivi_step, philox
from hsivi_cli.kernels import student_loss as student
from hsivi_cli.kernels.ahead_of_time import compile_for
from hsivi_cli.kernels.choice import INTERPRETED
from hsivi_cli.kernels.runtime import triton
from hsivi_cli.kernels.samples import BLOCK
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
    constants |= {"BLOCK": BLOCK, "x_p": 1, "eps_p": 1}
    mine = {name: kind for name, kind in types.items() if name not in constants}
    check(kernel, mine, constants, bound=96)


FLOATS = ("out", "sums", "dgamma", "grad", "log_gamma", "numbers")
LOSS_KERNELS = {
    "comparison": (comparison.compare_kernel, {}),
    "its backward": (comparison.compare_backward_kernel, {}),
    "critic": (critic_loss.critic_kernel, {"BACKWARD": False}),
    "critic backward": (critic_loss.critic_kernel, {"BACKWARD": True}),
    "fisher": (student.student_kernel, {"SURROGATE": False}),
    "fisher backward": (student.fisher_backward_kernel, {}),
    "reverse KL": (student.student_kernel, {"SURROGATE": True}),
    "reverse KL backward": (student.surrogate_backward_kernel, {}),
}


@pytest.mark.parametrize("name", LOSS_KERNELS)
def test_losses(name):
    kernel, constants = LOSS_KERNELS[name]
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(FLOATS, "*fp32") | {"streams": "*i64"}
    # NCHW: the pixels of every image lie side by side; predictions in bfloat16
    images = [v.removesuffix("_p") for v in kernel.arg_names if v.endswith("_p")]
    types |= dict.fromkeys(images, "*bf16") | dict.fromkeys(["x", "y", "out", "grad"], "*fp32")
    constants |= {"BLOCK": BLOCK} | {f"{v}_p": 1 for v in images}
    constants |= {"PER_ELEMENT": True} if "PER_ELEMENT" in kernel.arg_names else {}
    mine = {v: types[v] for v in kernel.arg_names if v not in constants}
    check(kernel, mine, constants, bound=96)

"""In Triton's interpreter: a whole UNet with the kernels in it, output and gradients, against its own."""

import pytest
import torch
from diffusers import UNet2DModel

from hsivi_cli.cli.options import resolve_kernels
from hsivi_cli.kernels import comparison, convert, critic_loss, group_norm_silu
from hsivi_cli.kernels.agreement import agrees
from hsivi_cli.kernels.convert import fused

TINY = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (6,),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


def run(unet, channels_last):
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    unet.zero_grad()
    given = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    out = unet(given, torch.tensor([1, 300])).sample
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in unet.parameters())]


@pytest.mark.parametrize(("conditioning", "channels_last"), [("default", False), ("scale_shift", True)])
def test_a_unet_with_kernels(conditioning, channels_last, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(**TINY, resnet_time_scale_shift=conditioning).eval()
    before = run(unet, False)
    scale = torch.stack([gradient.norm() for gradient in before]).norm()  # some gradients are zero but for rounding
    calls = []
    real = group_norm_silu.GroupNormSiLU.apply
    monkeypatch.setattr(group_norm_silu.GroupNormSiLU, "apply", lambda *a: calls.append(1) or real(*a))
    unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    with fused(unet, "triton") as network:
        after = run(network, channels_last)
    assert len(calls) == sum("norm" in name and name.endswith("weight") for name, _ in unet.named_parameters())
    for got, want in zip(after, before, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm() + 1e-7 * scale


def test_auto_uses_a_kernel_that_agrees_and_declines_one_that_does_not(monkeypatch):
    cpu = torch.device("cpu")
    for way in (torch.no_grad, torch.inference_mode, torch.enable_grad):  # who asks first must not decide
        agrees.cache_clear()
        with way():
            assert agrees(cpu)
    assert resolve_kernels("auto", "cpu") == "triton"
    # a thousandth in any of them is seen
    for function in (group_norm_silu.GroupNormSiLU, comparison.Compare, critic_loss.CriticSums):
        agrees.cache_clear()
        with monkeypatch.context() as patch:
            real = function.apply
            patch.setattr(function, "apply", lambda *a, real=real: 1.001 * real(*a))
            with pytest.warns(UserWarning, match="left out: on cpu they fail their check"):
                assert not agrees(cpu)
    assert resolve_kernels("auto", "cpu") == "torch"  # the answer is kept
    assert resolve_kernels("triton", "cpu") == "triton"
    unet = UNet2DModel(**TINY).eval()
    convert.fuse(unet, "auto")
    assert unet.conv_norm_out.kernels == "torch"
    agrees.cache_clear()

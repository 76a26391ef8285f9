"""Swapping fused modules into a UNet: the same parameters, the same state dict, the same numbers; and back."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from hsivi_cli.kernels.convert import FusedResnetBlock2D, FusedUpsample2D, fuse, fused, unfuse

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
RESAMPLING = {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"}


def make(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(**SMALL | options).eval()
        for norm in (m for m in unet.modules() if isinstance(m, nn.GroupNorm)):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
    return unet


def run(unet):
    """Output, and the gradients of its square."""
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    unet.zero_grad()
    out = unet(x, torch.tensor([1, 300, 900])).sample
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in unet.parameters())]


@pytest.mark.parametrize("options", [{}, RESAMPLING, {"add_attention": False, "norm_num_groups": 2}])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_fused_unet_computes_the_same_and_can_be_undone(options, channels_last):
    unet = make(**options)
    before = run(unet)
    # some gradients are zero but for rounding (an attention's key bias): they are judged on the scale of the others
    scale = torch.stack([gradient.norm() for gradient in before]).norm()
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in unet.state_dict().items()}
    classes = [type(module) for module in unet.modules()]
    blocks = sum(isinstance(module, ResnetBlock2D) for module in unet.modules())
    assert fuse(unet) == 2 * blocks + 1
    assert fuse(unet) == 2 * blocks + 1  # twice is once
    assert list(unet.state_dict()) == list(state)
    assert all(unet.state_dict()[name].data_ptr() == pointer for name, (pointer, _) in state.items())
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    for got, want in zip(run(unet), before, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm() + 1e-7 * scale
    unfuse(unet)
    unet.to(memory_format=torch.contiguous_format)
    assert [type(module) for module in unet.modules()] == classes
    assert "kernels" not in vars(unet.conv_norm_out)
    for got, want in zip(run(unet), before, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_fused_unet_can_be_copied_and_saved(tmp_path):
    unet = make()
    before = run(unet)[0]
    fuse(unet)
    torch.testing.assert_close(run(copy.deepcopy(unet))[0], before)
    unet.save_pretrained(tmp_path, safe_serialization=True)
    torch.testing.assert_close(run(UNet2DModel.from_pretrained(tmp_path).eval())[0], before)


def test_blocks_it_does_not_know_are_left_alone():
    assert fuse(make(act_fn="gelu")) == 0 + 1  # diffusers' output activation is SiLU, whatever act_fn says
    unet = make()
    unet.mid_block.resnets[0].norm2 = nn.Identity()
    fuse(unet)
    assert type(unet.mid_block.resnets[0]) is ResnetBlock2D
    assert type(unet.mid_block.resnets[1]) is FusedResnetBlock2D


def test_a_network_without_such_blocks_is_left_alone():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.SiLU())
    before = [type(module) for module in network.modules()]
    with fused(network):
        assert [type(module) for module in network.modules()] == before


def test_the_context_gives_the_unet_back_whatever_happens():
    unet = make()
    with pytest.raises(RuntimeError, match="on purpose"), fused(unet):
        assert isinstance(unet.mid_block.resnets[0], FusedResnetBlock2D)
        raise RuntimeError("on purpose")
    assert type(unet.mid_block.resnets[0]) is ResnetBlock2D


def test_upsampling_is_one_transposed_convolution(monkeypatch):
    unet = make()
    x, calls = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), []
    transposed = nn.functional.conv_transpose2d
    count = lambda *given, **more: calls.append(given[0].shape) or transposed(*given, **more)  # noqa: E731
    monkeypatch.setattr(nn.functional, "conv_transpose2d", count)
    with torch.no_grad():
        want = unet(x, 5).sample
        assert not calls
        with fused(unet):
            (module,) = (m for m in unet.modules() if isinstance(m, FusedUpsample2D))
            assert module.kernel is not None
            torch.testing.assert_close(unet(x, 5).sample, want, rtol=0, atol=1e-5)
            assert calls == [(2, 16, 4, 4)]
            odd = module(torch.ones(1, 16, 4, 4), output_size=(7, 7))  # another size is diffusers' own business
        assert odd.shape == (1, 16, 7, 7)
        assert not hasattr(module, "kernel")
        assert len(calls) == 1


def test_in_training_the_summed_kernel_follows_the_weights():
    unet, plain = make(), make()
    fuse(unet)
    for network in (unet, plain):
        optimiser = torch.optim.SGD(network.parameters(), 1e-2)
        run(network)
        optimiser.step()
    torch.testing.assert_close(run(unet)[0], run(plain)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("break_it", [{"padding_mode": "reflect"}, {"dilation": (2, 2)}, {"kernel_size": (5, 5)}])
def test_upsampling_with_another_convolution_is_left_alone(break_it):
    unet = make()
    (module,) = (m for m in unet.modules() if type(m).__name__ == "Upsample2D")
    for name, value in break_it.items():
        setattr(module.conv, name, value)
    fuse(unet)
    assert not isinstance(module, FusedUpsample2D)

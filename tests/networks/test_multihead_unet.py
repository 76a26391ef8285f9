"""UNets with heads and time steps of their own: what they share with UNet2DModel, and where they differ."""

import inspect

import pytest
import torch
from diffusers import UNet2DModel

from hsivi_cli.networks.multihead_unet import MultiheadUNet

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attn_norm_num_groups": 32,
}


def pair(widths, plain, **more):
    """A MultiheadUNet and a UNet2DModel with the same weights"""
    torch.manual_seed(0)
    ours = MultiheadUNet(**TINY, attention_head_dim=widths, **more).eval()
    theirs = UNet2DModel(**TINY, attention_head_dim=plain).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def difference(ours, theirs, t_ours=5, t_theirs=5):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return (ours(x, t_ours).sample - theirs(x, t_theirs).sample).abs().max()


def test_equal_widths_and_steps_are_plain_unet2dmodel():
    assert difference(*pair([8, 8], 8)) == 0
    assert difference(*pair([32, 64], None)) == 0


def test_each_level_has_its_own_width():
    assert difference(*pair([8, 16], 8)) > 1e-4
    assert difference(*pair([8, 16], 16)) > 1e-4
    assert difference(*pair([8, 8], 8, up_attention_head_dim=[16, 16])) > 1e-4


@pytest.mark.parametrize("scale", [0.25, 1 / 3])
def test_steps_are_scaled(scale):
    ours, theirs = pair([8, 8], 8, timestep_scale=scale)
    assert difference(ours, theirs, 600, torch.tensor(600.0) * scale) == 0
    assert difference(ours, theirs, 600, 600) > 1e-4


def test_its_configuration_comes_back(tmp_path):
    ours, _ = pair([8, 16], 8, timestep_scale=0.25, up_attention_head_dim=[16, 16], num_class_embeds=None)
    ours.save_pretrained(tmp_path)
    again = MultiheadUNet.from_pretrained(tmp_path).eval()
    assert difference(ours, again) == 0
    assert again.config["attention_head_dim"] == [8, 16]
    assert set(inspect.signature(UNet2DModel).parameters) < set(inspect.signature(MultiheadUNet).parameters)
    assert difference(ours, MultiheadUNet.from_config(ours.config).eval(), 5) > 0  # other weights, but nothing unknown
    with pytest.raises(TypeError):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("widths", [[8], [8, 0], [8, 48]])
def test_widths_that_do_not_divide_are_refused(widths):
    with pytest.raises(ValueError, match="attention_head_dim"):
        MultiheadUNet(**TINY, attention_head_dim=widths)

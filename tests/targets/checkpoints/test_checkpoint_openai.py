"""OpenAI checkpoints: outputs as an independent forward pass has them, and no guess where the weights do not tell."""

import itertools

import pytest
import torch
from diffusers import UNet2DModel
from foreign_networks import Weights, openai

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.errors import InputError
from hsivi_cli.networks.multihead_unet import MultiheadUNet
from hsivi_cli.targets.checkpoints.openai_public import PUBLIC, published
from hsivi_cli.targets.checkpoints.openai_shapes import Architecture
from hsivi_cli.targets.checkpoints.registry import convert_checkpoint

SHAPE = (2, 8, 8)
BASE = {"width": 32, "channels": (32, 64), "attends": (True, True), "blocks": 1, "out": 2, "heads": (1, 1)}
# (network, JSON, times per step of the network, class)
CASES = {
    "one head": (BASE, {"num_heads": 1}, 1, UNet2DModel),
    "four heads, a quarter of the time": (
        BASE | {"heads": (4, 4), "scale_shift": True, "out": 4},
        {"num_heads": 4, "noise_schedule": "cosine", "diffusion_steps": 4000},
        0.25,
        MultiheadUNet,
    ),
    "a third of the time": (BASE, {"num_heads": 1, "diffusion_steps": 3000}, 1 / 3, MultiheadUNet),
    "head channels, classes, residual resampling": (
        BASE | {"heads": (2, 4), "scale_shift": True, "classes": 5, "resample": "resnet", "blocks": 2},
        {"num_head_channels": 16},
        1,
        UNet2DModel,
    ),
    "new order of attention": (
        BASE | {"heads": (2, 2), "new_order": True, "resample": "resnet", "attends": (False, True)},
        {"num_heads": 2, "use_new_attention_order": True},
        1,
        UNet2DModel,
    ),
    "three heads in the new order": (
        BASE
        | {
            "width": 96,
            "channels": (96, 96, 192),
            "heads": (3, 3, 3),
            "new_order": True,
            "attends": (False, True, True),
        },
        {"num_heads": 3, "use_new_attention_order": True},
        1,
        MultiheadUNet,
    ),
    "pooling": (BASE | {"resample": "pool", "attends": (False, False)}, {"num_heads": 1}, 1, UNet2DModel),
    "a narrower first level": (
        BASE | {"width": 64, "channels": (32, 64), "resample": "resnet", "heads": (2, 2), "attends": (False, True)},
        {"num_heads": 2},
        1,
        MultiheadUNet,
    ),
}


def written(tmp_path, network, steps=1000, scale=1.0):
    """(weights, images, times, labels, path of their state dict)"""
    weights, generator = Weights(3), torch.Generator().manual_seed(4)
    t = torch.tensor([0, 9, steps // 2, steps - 1])
    x, y = torch.randn(4, *SHAPE, generator=generator), torch.tensor([0, 1, 4, 2])
    openai(weights, x, t * scale, y, **network)
    torch.save(weights.tensors, tmp_path / "net.pt")
    return weights, x, t, y, tmp_path / "net.pt"


def outputs(converted, x, t, y):
    with torch.no_grad():
        return converted.network(x, t, y if converted.classes else None).sample


@pytest.mark.parametrize("name", CASES)
def test_the_same_outputs(tmp_path, name):
    network, fields, scale, kind = CASES[name]
    weights, x, t, y, path = written(tmp_path, network, fields.get("diffusion_steps", 1000), scale)
    converted = convert_checkpoint(path, fields, SHAPE)
    assert type(converted.network) is kind
    theirs = openai(weights, x, t * scale, y, **network)
    assert (outputs(converted, x, t, y) - theirs).abs().max() < 1e-5
    assert theirs.abs().max() > 0.5
    assert converted.classes == network.get("classes", 0)
    assert any("variance" in note for note in converted.notes) == (network["out"] == 4)


@pytest.mark.parametrize("name", ["four heads, a quarter of the time", "a narrower first level"])
def test_a_multihead_unet_opens_as_itself_and_never_as_a_plain_one(tmp_path, name):
    network, fields, scale, _ = CASES[name]
    _, x, t, y, path = written(tmp_path, network, fields.get("diffusion_steps", 1000), scale)
    converted = convert_checkpoint(path, fields, SHAPE)
    converted.network.save_pretrained(tmp_path / "unet")
    again = MultiheadUNet.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        assert torch.equal(again(x, t).sample, outputs(converted, x, t, y))
    with pytest.raises(TypeError):
        UNet2DModel.from_pretrained(tmp_path / "unet")


def test_heads_and_order_matter(tmp_path):
    """The negative control: the wrong JSON reads the same weights as another network."""
    network, fields, _, _ = CASES["new order of attention"]
    weights, x, t, y, path = written(tmp_path, network)
    theirs = openai(weights, x, t, y, **network)
    for wrong in ({"use_new_attention_order": False}, {"num_heads": 4}):
        converted = convert_checkpoint(path, fields | wrong, SHAPE)
        assert (outputs(converted, x, t, y) - theirs).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "steps"), itertools.product(("linear", "cosine"), (1000, 4000)))
def test_schedules_are_those_of_openai(tmp_path, kind, steps):
    *_, path = written(tmp_path, BASE)
    fields = {"num_heads": 1, "noise_schedule": kind, "diffusion_steps": steps}
    schedule = schedule_from_config(convert_checkpoint(path, fields, SHAPE).schedule)
    s = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = torch.cos((s + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * 1000 / steps
    abar = torch.cumprod(1 - betas if kind == "linear" else (level[1:] / level[:-1]).clamp(min=0.001), 0)
    torch.testing.assert_close(schedule.abar, abar, rtol=1e-9, atol=0)


def test_the_brief_names_of_the_json_are_known_too(tmp_path):
    *_, path = written(tmp_path, BASE)
    fields = {"format": "openai", "num_heads": 1, "beta_schedule": "cosine", "num_train_timesteps": 50}
    converted = convert_checkpoint(path, fields | {"predict_xstart": True, "dropout": 0.3}, SHAPE)
    assert converted.schedule["beta_schedule"] == "squaredcos_cap_v2"
    assert (converted.schedule["num_train_timesteps"], converted.prediction_type) == (50, "sample")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "do not tell its attention heads"),
        ({"num_heads": 5}, "num_heads 5 does not divide the 32 channels"),
        ({"num_head_channels": 64}, "num_head_channels 64 does not divide the 32 channels"),
        ({"num_heads": 0}, "at least 1"),
        ({"num_heads": "4"}, "must be an integer"),
        ({"num_heads": 1, "learn_sigma": True}, "learn_sigma is True, but"),
        ({"num_heads": 1, "num_res_blocks": 3}, "num_res_blocks is 3, but"),
        ({"num_heads": 1, "noise_schedule": "sigmoid"}, "must be one of linear, cosine"),
        ({"num_heads": 1, "heads": 4}, "unknown field 'heads'"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, fields, what):
    *_, path = written(tmp_path, BASE)
    with pytest.raises(InputError, match=what):
        convert_checkpoint(path, fields, SHAPE)


def test_classifiers_and_upsamplers_are_named(tmp_path):
    weights, _, _, _, path = written(tmp_path, BASE)
    torch.save({n: v for n, v in weights.tensors.items() if not n.startswith("output_blocks")}, path)
    with pytest.raises(InputError, match="a classifier or an encoder"):
        convert_checkpoint(path, {"num_heads": 1}, SHAPE)
    upsampler = Weights(0)
    openai(upsampler, torch.randn(1, 6, 8, 8), torch.zeros(1), **(BASE | {"out": 6}))
    torch.save(upsampler.tensors, path)
    with pytest.raises(InputError, match="an upsampler"):
        convert_checkpoint(path, {"num_heads": 1}, (6, 8, 8))


def test_published_checkpoints_are_told_apart_by_their_shapes():
    def shapes(public):
        return Architecture(
            width=public.width,
            in_channels=3,
            out_channels=6,
            channels=tuple(int(public.width * multiple) for multiple in public.multipliers),
            attends=tuple(level in public.attends for level in range(len(public.multipliers))),
            blocks=public.blocks,
            convolves=True,
            resblock_updown=public.resblock_updown,
            scale_shift=public.scale_shift,
            classes=public.classes,
        )

    assert [published(shapes(public)) for public in PUBLIC] == list(PUBLIC)

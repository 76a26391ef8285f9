"""Training in several processes takes the course of one: the same losses and weights, up to rounding."""

import numpy as np
import pytest
import torch
from several import in_processes

from hsivi_cli.engine import processes
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.methods import ddpm, hsivi_sm
from hsivi_cli.targets.score_net import load_score_net

STEPS = 6


def course(method, state, batch=lambda draws: None):
    """Metrics of every step, and the weights at the end."""
    metrics = []
    for step in range(STEPS):
        draws = generator(state.config.seed, Stream.TRAIN, step + 1)
        metrics.append(method.step(state, batch(draws), draws))
    network = state.ema_student if method is hsivi_sm else state.ema
    return metrics, torch.cat([p.reshape(-1) for p in network.parameters()]).numpy()


def distilled(teacher, settings):
    processes.start("cpu")
    settings = {"grid": (0, 50, 200, 800), "steps": 50, "batch": 7, "critic_steps": 2, "warmup": 2} | settings
    return course(hsivi_sm, hsivi_sm.init(load_score_net(teacher), hsivi_sm.DistillConfig(**settings)))


def trained(settings):
    processes.start("cpu")
    unet = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "layers_per_block": 1}
    unet |= {"norm_num_groups": 4, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    config = ddpm.DDPMConfig(
        unet | {"add_attention": False}, {"beta_schedule": "linear"}, steps=50, batch=7, **settings
    )
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return course(ddpm, ddpm.init(None, config), lambda draws: ddpm.draw_batch(images, 7, draws))


def same(several, one):
    for metrics, expected in zip(several[0], one[0], strict=True):
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # as a whole: where a gradient is zero but for rounding, Adam makes steps of full length out of the rounding
    assert np.linalg.norm(several[1] - one[1]) < 1e-5 * np.linalg.norm(one[1])


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {"objective": "diffused-kl"}),
        (2, {"objective": "diffused-fisher", "log_gamma": "layer", "rollout_cache": False}),
        (2, {"objective": "sm", "accumulate": 2}),
        (3, {"batch": 2, "rollout": 2}),  # more processes than rows and chains
    ],
)
def test_distillation(tiny_teacher, count, settings):
    one = distilled(tiny_teacher, settings | {"accumulate": 1})
    several = in_processes(count, distilled, tiny_teacher, settings)
    assert all(metrics == several[0][0] and (weights == several[0][1]).all() for metrics, weights in several)
    same(several[0], one)


def test_distillation_of_a_network_with_classes(make_teacher):
    teacher = make_teacher(num_class_embeds=3)
    one = distilled(teacher, {})
    same(in_processes(2, distilled, teacher, {"accumulate": 2})[1], one)


def test_training():
    settings = {"warmup": 2, "flip": True, "ema": 0.5}
    several = in_processes(2, trained, settings | {"accumulate": 2})
    assert several[0][0] == several[1][0]
    same(several[0], trained(settings))


def test_accumulation_and_fp16_keep_the_course(tiny_teacher):
    one = distilled(tiny_teacher, {})
    same(distilled(tiny_teacher, {"accumulate": 3}), one)
    half = distilled(tiny_teacher, {"precision": "fp16"})
    assert [m["critic_loss"] for m in half[0]] == pytest.approx([m["critic_loss"] for m in one[0]], rel=1e-2)

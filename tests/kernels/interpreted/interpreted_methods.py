"""In Triton's interpreter: the same images and the same training step with and without kernels."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.engine.seeds import PhiloxStreams, Stream, generator
from hsivi_cli.errors import RunError
from hsivi_cli.kernels import hsivi_step
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.sampling import draw_images, student_sampler
from hsivi_cli.methods.student import Student, sample_student
from hsivi_cli.targets.score_net import ScoreNet

# as small as a UNet gets: the interpreter takes 20 ms for each group of each sample
TINY = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4,),
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}
SCHEDULE = schedule_from_config({"num_train_timesteps": 1000})


def make_unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**TINY).eval().requires_grad_(False)


def test_a_student_draws_the_same_images():
    student = Student(make_unet(), torch.full((2, 1, 4, 4), 0.1), (0, 200, 800), 0.5, SCHEDULE, {})
    classes = [type(module) for module in student.unet.modules()]
    plain = sample_student(student, PhiloxStreams(3, [0, 5]))
    ours = sample_student(student, PhiloxStreams(3, [0, 5]), kernels="triton")
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()
    assert not torch.equal(ours, plain)  # or no kernel ran
    assert [type(module) for module in student.unet.modules()] == classes


def start(kernels, grid=(0, 800), **settings):
    """A critic that is no copy of the teacher any more: the student's loss is their difference, else mere rounding."""
    config = hsivi_sm.DistillConfig(grid, kernels=kernels, **settings)
    state = hsivi_sm.init(ScoreNet(make_unet(), SCHEDULE, Path(), ""), config)
    draws = torch.Generator().manual_seed(1)
    for parameter in state.critic.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draws)
    return state


def test_a_training_step_has_the_same_losses():
    metrics = {}
    for kernels in ("torch", "triton"):
        state = start(kernels, steps=2, batch=1, rollout=1, critic_steps=1, lr_critic=0.0)
        metrics[kernels] = hsivi_sm.step(state, None, generator(0, Stream.TRAIN, 1))
    for name, value in metrics["torch"].items():
        assert metrics["triton"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert metrics["triton"] != metrics["torch"]  # or no kernel ran


@pytest.mark.parametrize(
    ("objective", "log_gamma"), [("diffused-kl", "map"), ("diffused-fisher", "layer"), ("sm", "scalar")]
)
def test_losses_stay_the_same_over_steps(objective, log_gamma, monkeypatch):
    # the norms' kernels are left out: they take the interpreter a second each forward
    monkeypatch.setattr(hsivi_sm, "fuse", lambda *a: None)
    steps, metrics = 6, {}
    for kernels in ("torch", "triton"):
        settings = {"objective": objective, "log_gamma": log_gamma, "steps": steps, "batch": 3, "rollout": 2}
        state = start(kernels, (0, 100, 800), critic_steps=2, lr_schedule="constant", **settings)
        found = [hsivi_sm.step(state, None, generator(0, Stream.TRAIN, i + 1)) for i in range(steps)]
        metrics[kernels] = torch.tensor([list(m.values()) for m in found], dtype=torch.float64)
    torch.testing.assert_close(metrics["triton"], metrics["torch"], rtol=2e-4, atol=1e-6)
    assert not torch.equal(metrics["triton"], metrics["torch"])  # or no kernel ran


def test_pictures_come_from_the_last_kernel_and_broken_ones_are_found(monkeypatch):
    student = Student(make_unet(), torch.tensor(0.1), (0, 200, 800), 0.5, SCHEDULE, {})
    quantised = []
    last = hsivi_step.final_step
    monkeypatch.setattr(hsivi_step, "final_step", lambda *given: quantised.append(1) or last(*given))
    lots = [next(draw_images(student_sampler(student, kernels=kernels), 3, 1, 3)) for kernels in ("triton", "torch")]
    assert quantised == [1]
    assert abs(lots[0].astype(int) - lots[1]).max() <= 1
    student.unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(RunError, match="image 0 has values that are not finite"):
        next(draw_images(student_sampler(student, kernels="triton"), 3, 1, 3))
    assert quantised == [1]

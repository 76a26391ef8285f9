"""In Triton's interpreter: the same images and the same training step with and without kernels."""

import pytest
import torch

from hsivi_cli.engine.seeds import NoiseStreams, PhiloxStreams, Stream, generator
from hsivi_cli.methods import hsivi_sm
from hsivi_cli.methods.student import load_student, sample_student
from hsivi_cli.targets.score_net import load_score_net


@pytest.mark.parametrize("streams", [NoiseStreams, PhiloxStreams])
def test_a_student_draws_the_same_images(streams, tiny_student):
    student = load_student(tiny_student)
    classes = [type(module) for module in student.unet.modules()]
    plain = sample_student(student, streams(3, [0, 5]))
    ours = sample_student(student, streams(3, [0, 5]), kernels="triton")
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()
    assert not torch.equal(ours, plain)  # or no kernel ran
    assert [type(module) for module in student.unet.modules()] == classes


def test_a_training_step_has_the_same_losses(tiny_teacher):
    metrics = {}
    for kernels in ("torch", "triton"):
        config = hsivi_sm.DistillConfig((0, 800), steps=2, batch=1, rollout=1, critic_steps=1, kernels=kernels)
        state = hsivi_sm.init(load_score_net(tiny_teacher), config)
        metrics[kernels] = hsivi_sm.step(state, None, generator(0, Stream.TRAIN, 1))
    for name, value in metrics["torch"].items():
        assert metrics["triton"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name

"""The graphed chain with a plain call in place of the capture: the same images, in the same memory, of a copy."""

import dataclasses

import pytest
import torch

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.kernels import convert
from hsivi_cli.methods.graphed import GraphedChain, GraphedSampler
from hsivi_cli.methods.student import Student, load_student, sample_student
from hsivi_cli.targets.score_net import load_score_net


class Recorded:
    """As a CUDA graph does it: what was captured runs again on the same memory and overwrites its output."""

    def __init__(self):
        self.modules, self.walks = [], 0

    def __call__(self, walk, device):
        assert device.type == "cpu"
        out = self.count(walk)

        def replay():
            return out.copy_(self.count(walk))

        return replay

    def count(self, walk):
        self.walks += 1
        return walk()


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_replay_draws_the_images_of_its_streams(tiny_student, channels_last):
    student = load_student(tiny_student)
    capture = Recorded()
    chain = GraphedChain(student, 3, channels_last=channels_last, capture=capture)
    first = None
    for seed, indices in ((5, [2, 0, 2**40]), (0, range(3)), (5, [2, 0, 2**40])):
        noise = PhiloxStreams(seed, indices)
        images = chain.run(noise.streams)
        torch.testing.assert_close(images, sample_student(student, noise), rtol=1e-5, atol=1e-5)
        assert first is None or images.data_ptr() == first  # one memory, overwritten
        first = images.data_ptr()
    assert capture.walks == 4
    assert not images.requires_grad


def test_the_chain_owns_a_copy_of_the_network(tiny_student):
    student = load_student(tiny_student)
    chain = GraphedChain(student, 2, capture=Recorded())
    streams = PhiloxStreams(1, range(2)).streams
    before = chain.run(streams).clone()
    for parameter in student.unet.parameters():
        parameter.data += 0.1
    assert torch.equal(chain.run(streams), before)


def test_the_network_is_fused_while_it_is_captured_and_its_own_again_afterwards(tiny_student, monkeypatch):
    calls, norm = [], convert.group_norm_silu
    monkeypatch.setattr(convert, "group_norm_silu", lambda *a, **k: calls.append(1) or norm(*a, **k))
    student, noise = load_student(tiny_student), PhiloxStreams(0, range(2))
    chain = GraphedChain(student, 2, capture=Recorded())
    fused = len(calls)
    assert fused == student.nfe * 11  # five blocks of two norms, and the output's
    chain.run(noise.streams)
    sample_student(student, noise)
    assert len(calls) == fused


def test_learned_variances_are_left_out(make_teacher):
    teacher = load_score_net(make_teacher({}, out_channels=2))
    student = Student(teacher.unet, torch.tensor(-0.5), (0, 200, 800), 0.5, teacher.schedule, {})
    noise = PhiloxStreams(4, range(2))
    images = GraphedChain(student, 2, capture=Recorded()).run(noise.streams)
    torch.testing.assert_close(images, sample_student(student, noise), rtol=1e-5, atol=1e-5)


def test_a_sampler_graphs_the_size_that_comes_first(tiny_student):
    student, capture = load_student(tiny_student), Recorded()
    sampler = GraphedSampler(student, kernels="torch", capture=capture)
    for n, walks in ((4, 2), (4, 3), (3, 3), (4, 4)):
        noise = PhiloxStreams(1, range(n))
        torch.testing.assert_close(sampler(noise), sample_student(student, PhiloxStreams(1, range(n))))
        assert capture.walks == walks


def test_bfloat16_is_the_whole_network(tiny_student):
    student = load_student(tiny_student)
    chain = GraphedChain(student, 2, "bf16", capture=Recorded())
    assert {p.dtype for p in chain.unet.parameters()} == {torch.bfloat16}
    noise = PhiloxStreams(1, range(2))
    images = chain.run(noise.streams)
    assert images.dtype == torch.float32
    plain = sample_student(student, noise)
    assert (images - plain).norm() < 0.05 * plain.norm()


def test_another_batch_size_or_kind_of_student_is_refused(tiny_student):
    student = load_student(tiny_student)
    chain = GraphedChain(student, 2, capture=Recorded())
    with pytest.raises(RuntimeError):
        chain.run(PhiloxStreams(1, range(3)).streams)
    odd = dataclasses.replace(student, schedule=schedule_from_config({"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="predicts eps"):
        GraphedChain(odd, 2, capture=Recorded())

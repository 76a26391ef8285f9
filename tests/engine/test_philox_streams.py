import pytest
import torch

from hsivi_cli.engine.seeds import ROWS, PhiloxStreams, StepDraws, Stream, generator
from hsivi_cli.kernels.philox import normals


def test_draws_are_the_numbered_noise_of_each_sample():
    noise = PhiloxStreams(7, [4, 9])
    draws = [noise.draw((2, 3)), noise.draw((2, 3))]
    assert len(noise) == 2
    assert noise.take() == 2
    for number, draw in enumerate(draws):
        assert torch.equal(draw, normals(noise.streams, number, (2, 3)))
    assert not torch.equal(draws[0], draws[1])
    alone = PhiloxStreams(7, [9])
    for draw in draws:
        assert torch.equal(alone.draw((2, 3))[0], draw[1])


def test_streams_follow_the_device():
    noise = PhiloxStreams(7, [4])
    assert torch.equal(noise.draw((3,), "cpu"), PhiloxStreams(7, [4]).draw((3,)))
    assert noise.draw((3,), "meta").device.type == noise.streams.device.type == "meta"


def make_draws(step, seed=5):
    return StepDraws(seed, step, generator(seed, Stream.TRAIN, step))


def test_a_steps_noise_is_named_by_seed_step_row_and_draw():
    whole, shard = make_draws(3), make_draws(3)
    for number in range(3):  # a shard of the rows draws what the whole batch draws for them
        draw = whole.take(range(6)).normals((2, 5))
        assert torch.equal(shard.take(range(2, 5)).normals((2, 5)), draw[2:5])
        assert torch.equal(draw[1], normals(PhiloxStreams(5, [3 * ROWS + 1]).streams, number, (2, 5))[0])
    first = make_draws(3).take(range(6)).normals((2, 5))
    others = [make_draws(4).take(range(6)), make_draws(3, seed=6).take(range(6)), make_draws(3).take(range(6, 12))]
    second = make_draws(3)
    second.take(range(6))
    for other in [*others, second.take(range(6))]:
        assert (other.normals((2, 5)) == first).float().mean() < 0.05
    assert first.unique().numel() == first.numel()


@pytest.mark.parametrize("step", [1, 2**31 - 1])
def test_no_step_shares_a_stream_with_the_images_of_its_seed(step):
    streams = make_draws(step).take(range(128)).streams
    assert bool((streams[:, 1] >= 2**32).all())
    assert streams[:, 1].tolist() == [step * 2**32 + row for row in range(128)]


@pytest.mark.parametrize("shape", [(3,), (1, 28, 28), (3, 150, 150)])  # many ahead, a few, none
def test_what_is_drawn_ahead_is_the_noise_of_its_number(shape):
    noise = PhiloxStreams(3, [1, 5])
    for number in range(18):
        if number in (2, 9):  # a kernel takes this one
            assert noise.take() == number
        else:
            assert torch.equal(noise.draw(shape), normals(noise.streams, number, shape))
    other = noise.draw((2, 2))
    assert torch.equal(other, normals(noise.streams, 18, (2, 2)))
    noise.streams.copy_(PhiloxStreams(4, [0, 2]).streams)  # as a graph does it
    noise.rewind()
    assert torch.equal(noise.draw(shape), normals(noise.streams, 0, shape))

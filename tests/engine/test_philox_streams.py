import torch

from hsivi_cli.engine.seeds import PhiloxStreams
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

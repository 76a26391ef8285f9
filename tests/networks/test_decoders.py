"""Decoders and trunks: shapes, seeds, scales, and gaps."""

import math

import pytest
import torch

from hsivi_cli.networks import decoders
from hsivi_cli.networks.decoders import ConvDecoder, ConvTrunk, MlpDecoder, column_scales, mlp_trunk


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (7, 5, 3), (1, 3, 1)])
def test_convolutional_shapes(shape):
    size = math.prod(shape)
    decoder = ConvDecoder(2, shape, 2, generator())
    assert decoder(torch.randn(4, 3, 2)).shape == (4, 3, 2 * size)
    trunk = ConvTrunk(shape, 9, generator())
    assert trunk(torch.rand(6, size)).shape == (6, 9)


def test_images_are_channels_last():
    """A change of one colour of one pixel far away leaves the other end of the image's first layer alone."""
    trunk = ConvTrunk((6, 6, 3), 4, generator())
    x = torch.zeros(2, 6, 6, 3)
    x[1, 5, 5, 2] = 1.0
    seen = []
    trunk.first.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    trunk(x.flatten(1))
    assert seen[0][1, 2, 5, 5] == 1
    assert seen[0][1].sum() == 1
    # outputs of one entry lie next to each other, entries of a pixel next, as in rows
    decoder = ConvDecoder(2, (4, 4, 3), 2, generator())
    z = torch.randn(1, 2)
    images = decoder.net(decoder.first(z).reshape(1, *decoder.small))
    assert decoder(z).reshape(4, 4, 3, 2)[1, 2, 2, 1] == images[0, 5, 1, 2]


def test_weights_depend_on_the_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for make in (
        lambda g: MlpDecoder(2, (5, 6), 7, g),
        lambda g: ConvDecoder(2, (8, 8, 1), 1, g),
        lambda g: mlp_trunk(4, (5,), 3, g),
        lambda g: ConvTrunk((8, 8, 1), 3, g),
    ):
        first, again, other = (list(make(generator(seed)).parameters()) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
        assert all(torch.isfinite(p).all() for p in first)
    assert torch.equal(mlp_trunk(4, (), 3, generator()).first.weight, mlp_trunk(4, (), 3, generator()).first.weight)
    # of one layer too, torch's own start of the mask's weights must not touch the global stream
    assert torch.equal(state, torch.get_rng_state())


def test_scales_are_those_of_the_columns_without_the_gaps(monkeypatch):
    monkeypatch.setattr(decoders, "NUMBERS_AT_ONCE", 3 * 70)  # several blocks, the last smaller
    x = torch.randn(500, 3, generator=generator()) * torch.tensor([1.0, 30.0, 0.0]) + torch.tensor([5.0, -100.0, 2.0])
    x[::3, 0] = math.nan
    mean, sd = column_scales(x)
    there = x[:, 0][~x[:, 0].isnan()]
    assert float(mean[0]) == pytest.approx(float(there.mean()), abs=1e-5)
    assert float(sd[0]) == pytest.approx(float(there.std(unbiased=False)), abs=1e-5)
    assert float(sd[2]) == 1  # does not move
    assert float(mean[1]) == pytest.approx(float(x[:, 1].mean()), rel=1e-5)
    assert float(sd[1]) == pytest.approx(float(x[:, 1].std(unbiased=False)), rel=1e-5)
    x[:140, 1] = math.nan  # whole blocks without a number
    mean, sd = column_scales(x)
    assert float(mean[1]) == pytest.approx(float(x[140:, 1].mean()), rel=1e-5)
    assert float(sd[1]) == pytest.approx(float(x[140:, 1].std(unbiased=False)), rel=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_features_do_not_know_the_unit_of_the_data(kind):
    x = torch.randn(50, 12, generator=generator())

    def features(x: torch.Tensor) -> torch.Tensor:
        trunk = mlp_trunk(12, (8,), 5, generator(1)) if kind == "mlp" else ConvTrunk((4, 3, 1), 5, generator(1))
        trunk.fit_scales(x)
        return trunk(x)

    assert torch.allclose(features(x), features(1000 * x + 7), atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_a_missing_number_is_the_mean_and_the_mask_learns_which(kind):
    x = torch.randn(40, 12, generator=generator()) + 3
    trunk = mlp_trunk(12, (8,), 5, generator(1)) if kind == "mlp" else ConvTrunk((4, 3, 1), 5, generator(1))
    trunk.fit_scales(x)
    filled, gaps = x.clone(), x.clone()
    filled[0, 4] = trunk.mean[4] if kind == "mlp" else trunk.mean[0]
    gaps[0, 4] = math.nan
    assert torch.allclose(trunk(gaps), trunk(filled), atol=1e-6)
    trunk(gaps).square().sum().backward()
    gradient = trunk.mask.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert all(torch.isfinite(p.grad).all() for p in trunk.parameters())
    if kind == "mlp":
        assert (gradient[:, :4] == 0).all()
    with torch.no_grad():
        trunk.mask.weight.fill_(1.0)
    assert not torch.allclose(trunk(gaps)[0], trunk(filled)[0], atol=1e-3)
    assert torch.allclose(trunk(gaps)[1:], trunk(filled)[1:], atol=1e-6)


def test_float64_works_and_batches_do_not_matter():
    trunk, decoder = mlp_trunk(6, (8,), 4, generator()).double(), MlpDecoder(2, (8,), 6, generator()).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.allclose(trunk(x)[3:5], trunk(x[3:5]), atol=1e-12)
    assert decoder(torch.randn(5, 9, 2, dtype=torch.float64)).dtype == torch.float64
    assert MlpDecoder(2, (), 6, generator()).net[0].weight.shape == (6, 2)

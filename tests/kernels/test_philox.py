"""The PyTorch side of the noise: published answers, independence of batch and order, and that it is standard normal."""

import math

import pytest
import torch
from scipy.stats import kstest

from hsivi_cli.kernels.philox import START, box_muller, make_streams, normals, philox4x32

# Random123's kat_vectors for philox4x32-10: four words of counter, two of key, four of answer
KNOWN = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", KNOWN)
def test_published_answers(line):
    words = [torch.tensor([int(word, 16)]) for word in line.split()]
    assert [int(w) for w in philox4x32(tuple(words[:4]), tuple(words[4:6]))] == [int(w) for w in words[6:]]


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in():
    shape, indices = (3, 7, 5), [11, 2, 2**40 + 1, 7]
    whole = normals(make_streams(9, indices), 4, shape)
    for row, index in zip(whole, indices, strict=True):
        torch.testing.assert_close(normals(make_streams(9, [index]), 4, shape)[0], row, rtol=0, atol=0)
    backwards = normals(make_streams(9, indices[::-1]), 4, shape)
    torch.testing.assert_close(backwards.flip(0), whole, rtol=0, atol=0)


def test_seed_index_and_layer_all_name_other_noise():
    base = normals(make_streams(1, [5]), START, (64,))
    for seed, index, layer in [(2, 5, 0), (1, 6, 0), (1, 5, 1), (1 + 2**32, 5, 0), (1, 5 + 2**32, 0), (5, 1, 0)]:
        other = normals(make_streams(seed, [index]), layer, (64,))
        assert (base == other).float().mean() < 0.05, (seed, index, layer)


def test_a_million_draws_are_standard_normal():
    n, per = 1000, 1001  # not a multiple of four, so that a lane is cut
    z = normals(make_streams(3, range(n)), 1, (per,)).double()
    count = n * per
    assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    moments = [(z**k).mean().item() for k in (1, 2, 3, 4)]
    # the variance of z^k under N(0, 1) is E z^2k - (E z^k)^2
    for got, want, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(got - want) < 4 * math.sqrt(variance / count)
    # correlation between neighbouring elements, lanes of one block, and samples
    blocks = (per + 3) // 4
    for a, b in [(z[:, 1:], z[:, :-1]), (z[:, blocks:], z[:, :-blocks]), (z[1:], z[:-1])]:
        assert abs((a * b).mean().item()) < 4 / math.sqrt(a.numel())


def test_tails_reach_beyond_five_and_stay_finite():
    z = normals(make_streams(0, range(400)), 0, (10_000,))
    assert 4.5 < z.abs().max().item() < 6.8
    assert bool(z.isfinite().all())


def test_the_word_zero_is_a_number():
    """No logarithm of zero: u is half a word's step above it."""
    for dtype in (torch.float32, torch.float64):
        x, y = box_muller(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), dtype)
        assert x.item() == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)
        assert y.item() == 0


def test_float32_is_the_reference_to_rounding():
    streams = make_streams(2, range(50))
    reference = normals(streams, 2, (997,), torch.float64)
    assert (normals(streams, 2, (997,)) - reference).norm() < 2e-7 * reference.norm()

"""In Triton's interpreter: the kernel's noise is the reference's."""

import pytest
import torch

from hsivi_cli.kernels.philox import make_streams, normals, normals_triton


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 28, 28), (3, 5, 7), (1027,)])
def test_normals_are_the_reference(shape):
    streams = make_streams(2**40 + 5, [0, 3, 2**35 + 1])
    got = normals_triton(streams, 3, shape)
    reference = normals(streams, 3, shape, torch.float64)
    assert got.shape == reference.shape
    assert (got - reference).norm() < 2e-7 * reference.norm()
    assert (got - normals(streams, 3, shape)).abs().max() < 2e-6


def test_noise_does_not_depend_on_the_block_size():
    streams = make_streams(1, [2])
    torch.testing.assert_close(
        normals_triton(streams, 1, (501,), block=16), normals_triton(streams, 1, (501,)), rtol=0, atol=0
    )


def test_no_samples_is_no_work():
    assert normals_triton(make_streams(1, []), 1, (4,)).shape == (0, 4)

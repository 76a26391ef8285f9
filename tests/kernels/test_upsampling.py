"""Upsampling and its convolution as one transposed convolution: the same sums and gradients, in float64 to rounding."""

import pytest
import torch

from hsivi_cli.kernels.upsampling import summed_kernel, upsample_convolve, upsample_convolve_reference


@pytest.mark.parametrize(("n", "c", "out", "height", "width"), [(2, 3, 5, 4, 6), (1, 1, 1, 1, 1), (3, 7, 2, 5, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("biased", [True, False])
def test_the_same_sums_and_gradients(n, c, out, height, width, memory_format, biased):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, height, width, generator=generator, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn(out, c, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(out, generator=generator, dtype=torch.float64) if biased else None
    given = [v.requires_grad_() for v in (x, weight, bias) if v is not None]
    got, want = upsample_convolve(x, summed_kernel(weight), bias), upsample_convolve_reference(x, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    cotangent = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(got, given, cotangent), torch.autograd.grad(want, given, cotangent), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_every_weight_goes_into_four_taps():
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert summed_kernel(weight).sum() == 4 * weight.sum()
    assert summed_kernel(weight)[0, 0, 0, 0] == weight[0, 0, 2, 2]  # turned round, as transposed convolutions are

"""In Triton's interpreter: the fused layer against its float64 reference, and against the chain's own formula."""

import pytest
import torch

from hsivi_cli.bridges.schedule import NoiseSchedule
from hsivi_cli.kernels import hsivi_step as module
from hsivi_cli.kernels.hsivi_step import final_step, hsivi_step, quantise, step_reference
from hsivi_cli.kernels.philox import make_streams, normals
from hsivi_cli.transitions.gaussian_layer import layer_coefficients, layer_mean, layer_std

A, B, C1 = 1.02, -0.31, 0.17


def make(shape, dtype=torch.float32, memory_format=torch.contiguous_format, gamma="map"):
    generator = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format) for _ in range(2))
    log_gamma = {"map": 0.3 * torch.randn(shape[1:], generator=generator), "scalar": torch.tensor(0.2), "": None}[gamma]
    return x, eps, log_gamma, make_streams(2**33 + 5, [4, 2, 2**40][: shape[0]])


def error(got, reference):
    return ((got.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("gamma", ["map", "scalar", ""])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 1, 28, 28), (1, 2, 3, 1)])
def test_step(shape, memory_format, gamma):
    x, eps, log_gamma, streams = make(shape, memory_format=memory_format, gamma=gamma)
    got = hsivi_step(x, eps, A, B, C1, log_gamma, streams, 3, kernels="triton")
    assert got.stride() == torch.empty_like(x).stride()
    reference = step_reference(x.double(), eps.double(), A, B, C1, log_gamma, streams, 3)
    assert error(got, reference) < 1e-6
    mean = hsivi_step(x, eps, A, B, kernels="triton")
    assert error(mean, A * x.double() + B * eps.double()) < 1e-6


def test_it_is_the_layer_of_the_chain():
    x, eps, log_gamma, streams = make((3, 2, 6, 6))
    layers = layer_coefficients((0, 100, 400, 800), 0.3, NoiseSchedule(torch.linspace(0.99, 0.01, 1000).double()))
    for layer in (1, 2, 3):
        k = torch.full((3,), layer)
        a, b, c1 = (float(v[layer]) for v in (layers.A, layers.B, layers.c1))
        chain = layer_mean(x, eps, k, layers) + layer_std(log_gamma, k, layers, x) * normals(streams, layer, (2, 6, 6))
        got = hsivi_step(x, eps, a, b, c1, log_gamma, streams, layer, kernels="triton")
        assert error(got, chain.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x, eps, log_gamma, streams = make((2, 3, 5, 5), dtype)
    got = hsivi_step(x, eps, A, B, C1, log_gamma, streams, 2, kernels="triton")
    assert got.dtype == dtype
    assert error(got, step_reference(x.double(), eps.double(), A, B, C1, log_gamma, streams, 2)) < 1e-2


def test_an_image_does_not_depend_on_batch_or_memory_format():
    x, eps, log_gamma, streams = make((3, 3, 5, 5))
    whole = hsivi_step(x, eps, A, B, C1, log_gamma, streams, 2, kernels="triton")
    one = hsivi_step(x[1:2], eps[1:2], A, B, C1, log_gamma, streams[1:2], 2, kernels="triton")
    assert torch.equal(one[0], whole[1])
    last = hsivi_step(x.to(memory_format=torch.channels_last), eps, A, B, C1, log_gamma, streams, 2, kernels="triton")
    assert torch.equal(last, whole)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_last_layer_writes_the_picture(memory_format):
    x, eps, _, _ = make((2, 3, 5, 7))
    # ties between two levels, the ends, beyond the ends, and what is no number
    values = [(level + 0.5) / 127.5 - 1 for level in (0, 1, 126, 127)] + [-1.0, 1.0, 3.0, -float("inf"), float("nan")]
    x.view(-1)[: len(values)] = torch.tensor(values)
    assert ((x + 1) * 127.5).frac().view(-1)[3] == 0.5  # the tie at x = 0 is exact, and goes to 128
    eps.view(-1)[: len(values)] = 0
    x, eps = x.contiguous(memory_format=memory_format), eps.contiguous(memory_format=memory_format)
    got = final_step(x, eps, 1.0, B, kernels="triton")
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    assert torch.equal(got, quantise(1.0 * x + B * eps).permute(0, 2, 3, 1))
    assert got.permute(0, 3, 1, 2).reshape(-1)[3 : len(values)].tolist() == [128, 0, 255, 255, 0, 0]


def test_nan_and_infinity_stay_where_they_are():
    x, eps, log_gamma, streams = make((2, 1, 4, 4))
    x[0, 0, 1, 1], eps[1, 0, 2, 3] = float("nan"), float("inf")
    got = hsivi_step(x, eps, A, B, C1, log_gamma, streams, 1, kernels="triton")
    assert (~got.isfinite()).sum() == 2
    assert bool(got[0, 0, 1, 1].isnan())
    assert got[1, 0, 2, 3] == -float("inf")


def test_poisoned_outputs_are_overwritten(monkeypatch):
    x, eps, log_gamma, streams = make((3, 3, 5, 3))
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda v, **k: real(v, **k).fill_(float("nan")))
    assert bool(hsivi_step(x, eps, A, B, C1, log_gamma, streams, 1, kernels="triton").isfinite().all())


def test_views_are_read_right():
    x, eps, log_gamma, streams = make((2, 2, 4, 10))
    got = hsivi_step(x[..., ::2], eps[..., 1::2], A, B, C1, log_gamma[..., ::2], streams, 1, kernels="triton")
    want = step_reference(x[..., ::2].double(), eps[..., 1::2].double(), A, B, C1, log_gamma[..., ::2], streams, 1)
    assert error(got, want) < 1e-6


def test_a_transposed_view_is_read_and_written_right():
    x, eps, log_gamma, streams = make((2, 2, 5, 4))
    got = hsivi_step(x.transpose(2, 3), eps.transpose(2, 3), A, B, C1, log_gamma.transpose(1, 2), streams, 1, "triton")
    given = [v.transpose(2, 3) for v in (x.double(), eps.double())]
    assert error(got, step_reference(*given, A, B, C1, log_gamma.transpose(1, 2), streams, 1)) < 1e-6


def test_the_stride_of_a_single_column_means_nothing():
    x, eps, _, _ = make((2, 2, 5, 1))
    odd = torch.as_strided(x, x.shape, (10, 5, 1, 999))
    assert torch.equal(hsivi_step(odd, eps, A, B, kernels="triton"), hsivi_step(x, eps, A, B, kernels="triton"))


def test_shapes_that_do_not_fit_are_refused():
    x, eps, log_gamma, streams = make((2, 2, 4, 4))
    for broken in [(x, eps[:1], None, None), (x, eps, log_gamma[:1], streams), (x, eps, None, streams[:1])]:
        with pytest.raises(ValueError, match="do not fit"):
            hsivi_step(broken[0], broken[1], A, B, C1, broken[2], broken[3], 1)


def test_the_step_uses_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "launch", lambda *a: calls.append(a))
    x, eps, _, _ = make((1, 1, 2, 2))
    hsivi_step(x, eps, A, B, kernels="torch")
    assert not calls
    hsivi_step(x, eps, A, B, kernels="auto")
    assert calls

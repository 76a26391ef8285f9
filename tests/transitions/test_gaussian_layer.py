"""The layer against its test vector, DDIM of diffusers, and its own diffusion."""

import pytest
import torch

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.kernels.comparison import compare_reference, comparison_target
from hsivi_cli.transitions.gaussian_layer import (
    comparison_rows,
    diffusion_times,
    layer_coefficients,
    layer_mean,
    layer_std,
)

SCHEDULE = schedule_from_config({})
GRID = make_grid("quad", 10, SCHEDULE)
LAYERS = layer_coefficients(GRID, 0.2, SCHEDULE)


@pytest.mark.parametrize(
    ("k", "A", "B", "c1", "gamma"),
    [
        (10, 3.0421, -2.0648, 0.18771, 0.1890),
        (8, 1.7321, -0.7935, 0.15075, 0.1692),
        (5, 1.1295, -0.2639, 0.06397, 0.1586),
        (2, 1.0061, -0.0784, 0.00756, 0.1880),
        (1, 1.0008, -0.0304, 0.00194, 0.1937),
    ],
)
def test_vector_of_the_published_recipe(k, A, B, c1, gamma):
    found = [LAYERS.A[k], LAYERS.B[k], LAYERS.c1[k], LAYERS.gamma[k]]
    for value, expected, digits in zip(found, (A, B, c1, gamma), (4, 4, 5, 4), strict=True):
        assert abs(value.item() - expected) <= 0.5 * 10**-digits + 1e-12


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
def test_layer_is_ddim_of_diffusers(eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = SCHEDULE.abar
    layers = layer_coefficients(GRID, eta, SCHEDULE)
    draws = torch.Generator().manual_seed(1)
    for k in range(1, 11):
        # DDIMScheduler steps back by T // num_inference_steps only; tell it this layer's two times instead
        scheduler.num_inference_steps = 1
        scheduler.config.num_train_timesteps = GRID[k] - GRID[k - 1]
        x, eps, z = (torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=draws) for _ in range(3))
        theirs = scheduler.step(eps, GRID[k], x, eta=eta, variance_noise=z).prev_sample
        which = torch.full((4,), k)
        ours = layer_mean(x, eps, which, layers) + layer_std(torch.zeros(()), which, layers, x) * z
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_log_gamma_shapes_agree_and_act_per_layer():
    x = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    k = torch.tensor([2, 7])
    scalar = layer_std(torch.tensor(0.5), k, LAYERS, x).expand_as(x)
    shared = layer_std(torch.full((1, 3, 3), 0.5), k, LAYERS, x)
    torch.testing.assert_close(scalar, shared)
    per_layer = torch.zeros(10, 1, 3, 3)
    per_layer[6] = 1.0
    std = layer_std(per_layer, k, LAYERS, x)[:, 0, 0, 0]
    torch.testing.assert_close(std, LAYERS.c1[k] * torch.tensor([1.0, torch.e], dtype=torch.float64))


def test_comparing_at_the_layers_own_time_adds_nothing():
    x, eps, zeta = (torch.randn(6, 1, 2, 2, dtype=torch.float64) for _ in range(3))
    k = torch.tensor([1, 2, 3, 5, 8, 10])
    log_gamma = torch.tensor(0.3)
    std = layer_std(log_gamma, k, LAYERS, x)
    rows = comparison_rows(k, LAYERS.times[k - 1], LAYERS, SCHEDULE)
    y = compare_reference(x, eps, log_gamma, rows, zeta)
    torch.testing.assert_close(y, layer_mean(x, eps, k, LAYERS) + std * zeta)
    gamma = (LAYERS.gamma[k] * torch.e**0.3).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(comparison_target(log_gamma, rows, zeta), zeta / gamma, rtol=1e-7, atol=1e-7)


def test_diffusion_turns_a_bridge_marginal_into_the_later_one():
    # x_0 = 0 exactly: the marginal at t_{k-1} is N(0, s^2), so its diffusion must be N(0, s'^2)
    k, t = torch.tensor([3, 6]), torch.tensor([500, 700])
    zero = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    # a layer of mean 0 whose own noise is the whole bridge's: log_gamma = log(s / c1), one map a layer
    log_gamma = (LAYERS.noise_scale[:-1] / LAYERS.c1[1:]).log().reshape(-1, 1, 1, 1)
    rows = comparison_rows(k, t, LAYERS, SCHEDULE)
    y = compare_reference(zero, zero, log_gamma, rows, torch.ones_like(zero))
    torch.testing.assert_close(y.flatten(), (1 - SCHEDULE.abar[t]).sqrt())
    torch.testing.assert_close(comparison_target(log_gamma, rows, torch.ones_like(zero)), torch.ones_like(zero))


def test_comparison_times_stay_between_the_layer_and_the_end():
    k = torch.arange(1, 11).repeat(500)
    u = torch.rand(len(k), generator=torch.Generator().manual_seed(0))
    t = diffusion_times(k, u, LAYERS, 900.0)
    earliest = LAYERS.times[k - 1]
    assert bool((t >= earliest).all())
    assert bool((t < 900).all())
    shares = (t - earliest).double() / (900 - earliest)
    assert abs(shares.mean() - 0.5) < 5 * (1 / 12 / len(k)) ** 0.5
    # edge: u just below 1, a layer whose own time lies beyond t_max
    assert int(diffusion_times(torch.tensor([10]), torch.tensor([0.999]), LAYERS, 600.0)) == GRID[9]

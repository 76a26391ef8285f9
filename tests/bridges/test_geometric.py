"""The geometric bridge: its schedule, its Gaussian end, and products with the Hessian of the other end."""

import numpy as np
import pytest
import torch

from hsivi_cli.bridges.geometric import DiagonalGaussian, geometric_bridge, increment_count, schedule


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("bridges", [1, 2, 8, 32, 33, 64, 256])
def test_equal_increments_give_equidistant_bridges(bridges):
    betas = schedule(torch.full((increment_count(bridges),), 3.0, dtype=torch.float64), bridges)
    expected = torch.arange(1, bridges + 1, dtype=torch.float64) / (bridges + 1)
    torch.testing.assert_close(betas, expected, atol=1e-14, rtol=0)


def test_increments_are_shares_of_the_way():
    torch.testing.assert_close(schedule(vector(1, 2, 3), 2), vector(1 / 6, 1 / 2))


@pytest.mark.parametrize("bridges", [5, 40, 100])
def test_schedule_interpolates_between_its_knots(bridges):
    increments = torch.rand(increment_count(bridges), dtype=torch.float64) + 0.01
    knots = np.concatenate([[0], np.cumsum(increments) / increments.sum().item()])
    at = np.arange(1, bridges + 1) / (bridges + 1)
    expected = np.interp(at, np.linspace(0, 1, len(knots)), knots)
    betas = schedule(increments, bridges)
    np.testing.assert_allclose(betas, expected, atol=1e-13)
    assert (betas[0] > 0) & (betas.diff() > 0).all() & (betas[-1] < 1)


def test_schedule_wants_the_right_number_of_increments():
    with pytest.raises(ValueError, match="8 bridges need 9 increments"):
        schedule(vector(1, 1), 8)


def test_gaussian_agrees_with_torch_distributions():
    mean, log_scale, noise = torch.randn(3, dtype=torch.float64), vector(-1, 0.5, 0), torch.randn(7, 3).double()
    gaussian = DiagonalGaussian(mean, log_scale)
    z = gaussian.draw(noise).requires_grad_(True)
    expected = torch.distributions.Normal(mean, log_scale.exp()).log_prob(z).sum(1)
    torch.testing.assert_close(gaussian.log_prob(z), expected)
    torch.testing.assert_close(gaussian.log_prob_of_noise(noise), expected)
    torch.testing.assert_close(gaussian.gradient(z), torch.autograd.grad(expected.sum(), z)[0])


def test_bridge_gradient_and_hessian_products():
    def gradient(z):
        return -(z**3) + z.flip(1)  # of -|z|^4 / 4 + z_1 z_2

    gaussian = DiagonalGaussian(vector(1, -1), vector(0.3, 0))
    bridge = geometric_bridge(gaussian, gradient, vector(0.25, 0.75))
    z, v = torch.randn(5, 2).double(), torch.randn(5, 2).double()
    torch.testing.assert_close(bridge.gradient(1, z), 0.25 * gaussian.gradient(z) + 0.75 * gradient(z))
    with torch.no_grad():  # products are wanted inside a backward pass, where gradients are off
        value, product = bridge.linearise(z.numpy())
        alone = geometric_bridge(gaussian, gradient, vector(0.25, 0.75)).linearise(z.numpy())[0]
    np.testing.assert_allclose(value, gradient(z))
    np.testing.assert_allclose(alone, gradient(z))
    np.testing.assert_allclose(product(v.numpy()), -3 * z**2 * v + v.flip(1))

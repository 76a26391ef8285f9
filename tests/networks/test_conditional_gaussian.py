"""The layer at its start, its seed, and the published shape."""

import math

import pytest
import torch

from hsivi_cli.networks.conditional_gaussian import ConditionalGaussian, flatten_parameters, mlp


def layer(inputs, dim, seed=0, **kwargs):
    return ConditionalGaussian(inputs, dim, (8, 8), torch.Generator().manual_seed(seed), **kwargs)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("inputs", [2, 4, 6])
def test_an_untrained_residual_layer_leaves_the_base_as_it_is(inputs, varying):
    # mean = skip x, var = skip^2 + sigma^2 = 1 exactly, whether the input is shorter or longer than the output
    found = layer(inputs, 4, sigma=0.3, varying=varying).requires_grad_(False)
    x = torch.eye(inputs, dtype=torch.float64)
    mean, log_sigma = found(x)
    assert log_sigma.shape == (inputs if varying else 1, 4)
    jacobian = mean - found(torch.zeros_like(x))[0]  # rows: the response to each input coordinate
    variance = (jacobian**2).sum(0) + (2 * log_sigma[0]).exp()
    torch.testing.assert_close(variance, torch.ones(4, dtype=torch.float64), rtol=1e-13, atol=0)
    cross = jacobian.T @ jacobian
    assert float((cross - torch.diag(cross.diag())).abs().max()) == 0


def test_plain_layer_is_the_published_relu_network():
    found = layer(3, 2, residual=False)
    kinds = [type(part).__name__ for part in found.net]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    x = torch.randn(5, 3, dtype=torch.float64)
    mean, log_sigma = found(x)
    assert torch.equal(mean, found.net(x))
    assert mean.abs().max() > 0
    assert torch.equal(log_sigma, found.log_sigma.unsqueeze(0))


def test_noise_varies_with_the_input_within_its_limits():
    found = layer(3, 2, varying=True, sigma=0.3).requires_grad_(False)
    found.net.net[-1].weight.normal_(std=30.0, generator=torch.Generator().manual_seed(1))
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ratio = found(x)[1] - math.log(0.3)
    assert float(ratio.abs().max()) <= 2
    assert float(ratio.std()) > 1


def test_flattened_parameters_are_views_of_the_vector():
    found = layer(3, 2)
    before = [parameter.detach().clone() for parameter in found.parameters()]
    vector = flatten_parameters(found)
    assert all(torch.equal(a, b) for a, b in zip(before, found.parameters(), strict=True))
    vector.add_(1.0)
    assert all(torch.equal(a + 1, b) for a, b in zip(before, found.parameters(), strict=True))
    found.load_state_dict(layer(3, 2, seed=1).state_dict())  # in place: they stay views
    assert torch.equal(vector[:24], found.net.net[0].weight.flatten()) or torch.equal(vector[:2], found.log_sigma)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = layer(3, 2, seed=5)
    torch.manual_seed(2)
    two, other = layer(3, 2, seed=5), layer(3, 2, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.net.net[0].weight, other.net.net[0].weight)


def test_mlp_with_a_silent_end_returns_zero_and_still_learns():
    net = mlp((3, 8, 2), torch.Generator().manual_seed(0), last=0.0)
    out = net(torch.randn(4, 3, dtype=torch.float64))
    assert float(out.detach().abs().max()) == 0
    (out - 1).pow(2).sum().backward()
    assert float(net[-1].weight.grad.abs().max()) > 0

"""EDM networks as modules of diffusers: calls, labels, dtypes, gradients, and the map onto the schedule."""

import pytest
import torch

from hsivi_cli.bridges.schedule import schedule_from_config
from hsivi_cli.networks.edm_layers import Resample
from hsivi_cli.networks.edm_unet import EDMUNet

TINY = {"sample_size": 8, "in_channels": 1, "model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return EDMUNet(**TINY, num_class_embeds=3).eval()


def test_called_like_a_unet_of_diffusers(network):
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 2])
    with torch.no_grad():
        batch = network(x, torch.full((4,), 5), labels).sample
        torch.testing.assert_close(network(x, 5, labels).sample, batch)
        torch.testing.assert_close(network(x, torch.tensor(5), labels, return_dict=False)[0], batch)
    assert (network.config["in_channels"], network.config["out_channels"], network.config["sample_size"]) == (1, 1, 8)


def test_its_own_configuration_builds_it_again(network):
    fields = {name: value for name, value in network.config.items() if not name.startswith("_")}
    again = EDMUNet(**fields)
    again.load_state_dict(network.state_dict())
    assert dict(again.config)["schedule"] is None
    with pytest.raises(ValueError, match="out_channels 2 must be in_channels 1"):
        EDMUNet(**TINY, out_channels=2)


def test_labels_are_asked_for_unless_it_was_trained_without_them(network):
    x = torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="class_labels should be provided"):
        network(x, 5)
    with pytest.raises(ValueError, match="without classes"):
        EDMUNet(**TINY)(x, 5, torch.zeros(2))
    assert EDMUNet(**TINY, num_class_embeds=3, label_dropout=0.1)(x, 5).sample.shape == x.shape


def test_noise_levels_are_those_of_the_schedule():
    fields = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}
    network = EDMUNet(**TINY, schedule=fields)
    abar = schedule_from_config(fields).abar
    torch.testing.assert_close(1 / (1 + network.sigma.double() ** 2), abar, rtol=1e-6, atol=0)
    assert torch.equal(network.half().sigma, network.bfloat16().sigma)  # a rounded sigma is another time
    assert network.sigma.dtype == torch.float32


def test_an_output_of_zero_is_the_posterior_mean_of_gaussian_data(network):
    """With F = 0, D = c_skip x: the denoiser of N(0, sigma_data^2), whose noise is known in closed form."""
    torch.nn.init.zeros_(network.dec["8x8_aux_conv"].weight)
    torch.nn.init.zeros_(network.dec["8x8_aux_conv"].bias)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999])
    abar = schedule_from_config({}).abar[t][:, None, None, None]
    expected = x * (1 - abar).sqrt() / (1 - abar + 0.25 * abar)  # Cov(eps, x_t) / Var(x_t)
    torch.testing.assert_close(network(x, t, torch.zeros(3)).sample, expected.float(), rtol=1e-5, atol=1e-6)


def test_half_precision_stays_near_and_gradients_reach_every_weight(network):
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 1, 2])
    network(x, t, labels).sample.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        full = network(x, t, labels).sample
        half = network.bfloat16()(x, t, labels).sample
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.1 * full.abs().max()


def test_built_without_memory():
    with torch.device("meta"):
        network = EDMUNet(**TINY, embedding_type="fourier", resample_filter=(1, 3, 3, 1))
    assert network.map_layer0.weight.is_meta
    assert not network.sigma_bits.is_meta


@pytest.mark.parametrize("up", [False, True])
def test_the_box_filter_is_pooling_and_repeating(up):
    """The shortcut for (1, 1) and the general path are one operation."""
    x, layer = torch.randn(2, 3, 4, 4), Resample((1, 1), up)
    short = layer(x)
    layer.box = False
    torch.testing.assert_close(layer(x), short)

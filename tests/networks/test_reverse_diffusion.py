"""The reverse net: one parameterisation by two ways of computing it, its start, and what is learned at which time."""

import pytest
import torch

from hsivi_cli.bridges.latent_noise import make_noise
from hsivi_cli.networks.decoders import MlpTrunk
from hsivi_cli.networks.reverse_diffusion import DiffusionEncoder, ReverseConfig, ReverseDiffusion
from hsivi_cli.objectives.ddvi_bound import pathwise_bound


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def shaken(module, seed=7):
    """All parameters moved off their start, so that nothing is zero."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64))
    return module


def network(times=6, shake=True, **options):
    noise = make_noise("cosine", times)
    net = ReverseDiffusion(noise, 2, 5, ReverseConfig(hidden=16, **options), seeded())
    return noise, shaken(net) if shake else net.double()


@pytest.mark.parametrize("variance", ["learned", "beta", "btilde"])
@pytest.mark.parametrize("mean", ["direct", "noise"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_both_ways_of_calling_it_agree(mean, variance, layers):
    noise, net = network(mean=mean, variance=variance, layers=layers)
    y, context = normals(7, 2), net.context(normals(7, 5, seed=1))
    step = net.kernel(context)
    for t in range(1, noise.times + 1):
        for one, other in zip(step(t, y), net.at(y, context, torch.full((7,), t)), strict=True):
            assert torch.allclose(one, other.expand_as(one), atol=1e-11)
    times = torch.tensor([1, 2, 3, 4, 5, 6, 1])
    mean_each, _ = net.at(y, context, times)
    for i, t in enumerate(times.tolist()):
        assert torch.allclose(mean_each[i], step(t, y)[0][i], atol=1e-11)


@pytest.mark.parametrize("name", ["cosine", "linear", "unscaled"])
def test_an_untrained_chain_walks_from_the_normal_to_itself(name):
    """F = 0 and variances beta_t are the exact reverse of noising N(0, I); the bound of an empty likelihood is 0."""
    noise = make_noise(name, 10)
    trunk = MlpTrunk(3, (8,), 5, seeded())
    encoder = DiffusionEncoder(trunk, 5, noise, 2, ReverseConfig(hidden=16), seeded()).double()
    chain = encoder.run(encoder.encode(normals(4, 3)), normals(11, 40, 2))
    log_prior = (-0.5 * chain.z**2 - 0.9189385332046727).sum(-1)
    assert float(pathwise_bound(log_prior, chain, noise).detach().abs().max()) < 1e-5  # tables are float32


def test_the_noise_form_is_the_public_codes():
    noise, net = network(mean="noise", shake=False)
    with torch.no_grad():
        net.head_bias[:, :2] = torch.tensor([0.3, -0.8], dtype=torch.float64)
    y = normals(5, 2)
    for t in range(1, 7):
        eps = torch.tensor([0.3, -0.8], dtype=torch.float64)
        expected = (y - noise.beta[t] / (1 - noise.abar[t]).sqrt() * eps) / noise.alpha[t].sqrt()
        found, _ = net.at(y, net.context(normals(5, 5)), torch.full((5,), t))
        assert torch.allclose(found, expected, rtol=1e-5)


def test_the_variance_is_between_the_two_bounds_and_beyond_them():
    noise, net = network(shake=False)
    y, context = normals(3, 2), net.context(normals(3, 5))
    low, high = 0.5 * noise.btilde.log(), 0.5 * noise.beta.log()

    def log_sd(t):
        return float(net.at(y, context, torch.full((3,), t))[1].detach().mean())

    for t in range(1, 7):
        assert log_sd(t) == pytest.approx(float(high[t]), abs=1e-5)
    with torch.no_grad():
        net.head_bias[:, 2:4] = -1.0
    for t in range(2, 7):
        assert log_sd(t) == pytest.approx(float(low[t]), abs=1e-5)
    assert log_sd(1) == pytest.approx(float(high[1]), abs=1e-5)  # btilde_1 = 0: there is no such bound
    with torch.no_grad():
        net.head_bias[:, 4:] = 0.7
    for t in range(1, 7):
        assert log_sd(t) == pytest.approx(float((high if t == 1 else low)[t]) + 0.7, abs=1e-5)


@pytest.mark.parametrize("kind", ["beta", "btilde"])
def test_fixed_variances_are_fixed_but_for_the_last_step(kind):
    noise, net = network(variance=kind)
    y, context = normals(3, 2), net.context(normals(3, 5))
    table = getattr(noise, kind)
    for t in range(2, 7):
        log_sd = net.at(y, context, torch.full((3,), t))[1]
        assert torch.allclose(log_sd, 0.5 * table[t].log().expand(3, 2), atol=1e-5)
    assert float(net.at(y, context, torch.ones(3).long())[1].detach().std()) > 0.01


def test_x_and_the_class_are_seen_and_rows_do_not_mix():
    noise = make_noise("cosine", 5)
    encoder = shaken(
        DiffusionEncoder(MlpTrunk(3, (8,), 5, seeded()), 5, noise, 2, ReverseConfig(16, 4, classes=3), seeded())
    )
    x, shocks = normals(4, 3), normals(6, 8, 2)
    encoded = encoder.encode(x)
    assert encoded.logits.shape == (4, 3)
    both = encoder.run(encoded, shocks).z
    for i in range(4):
        alone = encoder.run(encoder.encode(x[i : i + 1]), shocks[:, i::4]).z
        assert torch.allclose(both[i::4], alone, atol=1e-12)
    assert torch.equal(both, encoder.draw(encoded, shocks))
    y = normals(4, 2)
    seen = [encoder.reverse.with_class(encoded.context, torch.full((4,), k)) for k in range(3)]
    means = [encoder.reverse.at(y, context, torch.full((4,), 3))[0] for context in seen]
    assert float((means[0] - means[1]).detach().abs().min()) > 1e-4
    features = encoder.trunk(x)
    assert torch.allclose(seen[2], encoder.reverse.context(features, torch.full((4,), 2)))
    assert torch.isfinite(both).all()
    with torch.no_grad():
        encoder.reverse.head.add_(100.0)
    assert torch.isfinite(encoder.draw(encoded, shocks)).all()
    far = encoder.encode(1e6 * torch.ones(1, 3, dtype=torch.float64))
    assert torch.isfinite(far.start_log_sd).all()

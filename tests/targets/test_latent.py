"""The latent-variable model: its joint, its fantasies, how it begins, and what it refuses."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from hsivi_cli.errors import InputError
from hsivi_cli.targets.latent import LatentModel, ModelConfig, build_model
from hsivi_cli.targets.latent_priors import Normal
from hsivi_cli.targets.likelihoods import Likelihood


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(name: str, n: int = 60, columns: int = 6) -> torch.Tensor:
    base = torch.randn(n, columns, generator=generator(9))
    return {
        "gaussian": 100 + 7 * base,
        "bernoulli": (base > 0.3).float(),
        "binomial": (base > 0).float() + (base > 0.8).float(),
        "categorical": (base > 0).float() + (base > 0.8).float(),
    }[name]


def linear_gaussian() -> tuple[LatentModel, torch.Tensor, torch.Tensor]:
    """x = W z + b + sd e, for which p(x) is known."""
    decoder = nn.Linear(2, 4).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.randn(4, 2, generator=generator(1)))
        decoder.bias.copy_(torch.randn(4, generator=generator(2)))
    log_sd = torch.tensor([-0.2, 0.1, 0.0, -0.7], dtype=torch.float64)
    return LatentModel(Normal(2), decoder, Likelihood("gaussian"), log_sd), decoder.weight.detach(), log_sd.exp()


def test_the_joint_is_that_of_a_linear_gaussian_model():
    """log p(x, z) = log p(x) + log p(z | x), all three Gaussian and exact."""
    model, weight, sd = linear_gaussian()
    _, x = model.fantasies(5, generator(3))
    z = torch.randn(3, 5, 2, generator=generator(4), dtype=torch.float64)
    covariance = weight @ weight.T + torch.diag(sd**2)
    bias = model.decoder.bias.detach()
    evidence = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x)
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ torch.diag(sd**-2) @ weight
    mean = (x - bias) @ torch.diag(sd**-2) @ weight @ precision.inverse()
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(z)
    assert torch.allclose(model.log_joint(x, z), evidence + posterior, atol=1e-9)
    assert torch.allclose(model.log_joint(x, z), model.log_likelihood(x, z) + model.prior.log_prob(z))
    # with a gap, p(x) is the marginal of what is there
    x = x.clone()
    x[:, 1] = math.nan
    there = [0, 2, 3]
    part = torch.distributions.MultivariateNormal(bias[there], covariance[there][:, there]).log_prob(x[:, there])
    some = weight[there]
    inverse = torch.diag(sd[there] ** -2)
    precision = torch.eye(2, dtype=torch.float64) + some.T @ inverse @ some
    mean = (x[:, there] - bias[there]) @ inverse @ some @ precision.inverse()
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(z)
    assert torch.allclose(model.log_joint(x, z), part + posterior, atol=1e-9)


def test_fantasies_are_samples_not_means():
    model, weight, sd = linear_gaussian()
    z, x = model.fantasies(40_000, generator(5))
    assert not x.requires_grad
    noise = x - model.reconstruct(z).detach()
    assert torch.allclose(noise.std(0), sd, rtol=0.03)
    wanted = weight @ weight.T + torch.diag(sd**2)
    assert torch.allclose(x.T.cov(), wanted, atol=0.15)
    assert torch.equal(x, model.fantasies(40_000, generator(5))[1])


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "binomial", "categorical"])
@pytest.mark.parametrize("prior", ["normal", "pinwheel", "clusters"])
def test_a_built_model_has_all_its_parts(likelihood, prior):
    x = rows(likelihood)
    config = ModelConfig(prior="normal" if prior == "clusters" else prior, likelihood=likelihood, hidden=(16,))
    config = replace(config, clusters=3 if prior == "clusters" else 0)
    model = build_model(config, x)
    z, draws = model.fantasies(11, generator())
    assert z.shape == (11, 2)
    assert draws.shape == (11, 6)
    model.likelihood.check(draws)
    latents = torch.randn(4, 60, 2, generator=generator(1))
    assert model.log_joint(x, latents).shape == (4, 60)
    assert model.reconstruct(latents).shape == (4, 60, 6)
    model.log_likelihood(x, latents).sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    assert (model.log_sd is not None) == (likelihood == "gaussian")
    again = build_model(config, x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = build_model(replace(config, seed=1), x)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    model.double().log_joint(x.double(), latents.double())


def test_a_model_begins_where_the_data_are():
    """Rows of another unit have the same start, up to the change of variables."""
    x = rows("gaussian")
    z = torch.randn(60, 2, generator=generator())
    config = ModelConfig(hidden=(16,))
    first = build_model(config, x).log_likelihood(x, z)
    scaled = build_model(config, 1000 * x).log_likelihood(1000 * x, z)
    assert torch.allclose(first, scaled + 6 * math.log(1000), atol=1e-3)


def test_shared_noise_and_the_floor():
    x = rows("gaussian")
    model = build_model(ModelConfig(noise="shared", hidden=()), x)
    assert model.log_sd is not None
    assert model.log_sd.shape == (1,)
    with torch.no_grad():
        model.log_sd.fill_(-100.0)
    assert float(model.noise_log_sd().detach().exp()) == pytest.approx(7e-4, rel=0.3)


def test_images_have_a_convolutional_decoder():
    x = torch.rand(10, 7 * 5 * 3, generator=generator())
    model = build_model(ModelConfig(shape=(7, 5, 3)), x)
    assert model.fantasies(2, generator())[1].shape == (2, 105)
    with pytest.raises(InputError, match="have 64 numbers, the rows 105"):
        build_model(ModelConfig(shape=(8, 8, 1)), x)


def test_configurations_are_plain_json():
    config = ModelConfig(hidden=(3, 4), shape=(8, 8, 1), likelihood="bernoulli")
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert asdict(config) == config.to_json()


@pytest.mark.parametrize(
    ("config", "words"),
    [(ModelConfig(latent=7), "--latent 7 is more than the 6 columns"), (ModelConfig(latent=0), "--latent 0"),
     (ModelConfig(latent=3, prior="pinwheel"), "two dimensions"), (ModelConfig(clusters=1), "--clusters 1"),
     (ModelConfig(likelihood="bernoulli"), "bernoulli"), (ModelConfig(prior="ring"), "no prior"),
     (ModelConfig(noise="none"), "no noise")],
)  # fmt: skip
def test_what_is_refused(config, words):
    with pytest.raises(InputError, match=words) as caught:
        build_model(config, rows("gaussian"))
    assert "\n" not in str(caught.value)


def test_empty_rows_are_refused():
    with pytest.raises(InputError, match="shape"):
        build_model(ModelConfig(), torch.zeros(0, 4))

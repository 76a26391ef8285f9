"""Models, starts and gradients that the tests of DDVI share."""

import math

import torch
from torch import nn

from hsivi_cli.methods import ddvi
from hsivi_cli.targets.latent import LatentModel, LatentTask, ModelConfig, build_model
from hsivi_cli.targets.likelihoods import Likelihood

LOG_2PI = math.log(2 * math.pi)
SMALL = ddvi.Config(steps=50, hidden=(12,), features=10, width=12, layers=3, times=5, batch=16, lr=1e-3, warmup=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_model(prior, weight=(1.0,), sd=0.5):
    """x = W z + sd e, in float64."""
    decoder = nn.Linear(prior.dim, len(weight), bias=False).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor(weight, dtype=torch.float64)[:, None].expand(-1, prior.dim))
    log_sd = torch.full((len(weight),), math.log(sd), dtype=torch.float64)
    return LatentModel(prior, decoder, Likelihood("gaussian"), log_sd)


def shaken(state, scale=0.1):
    """All parameters of the posterior off their start, where heads are zero and their inputs have no gradient."""
    with torch.no_grad():
        for parameter in state.encoder.parameters():
            noise = torch.randn(parameter.shape, generator=seeded(5), dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))
    return state


def digits_like(**options):
    rows = (torch.rand(64, 6, generator=seeded(1)) < 0.4).float()
    model = build_model(ModelConfig(likelihood="bernoulli", hidden=(8,), **options), rows)
    return LatentTask(rows, model)


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return dict(zip([name for name, _ in module.named_parameters()], found, strict=True))

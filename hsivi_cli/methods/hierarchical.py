"""`--method hierarchical`: a VAE whose posterior has a level of auxiliary variables above it.

`q(u)` and `q(z | u, x)` are diagonal Gaussians, so that q(z | x) is a mixture of infinitely many (a Gaussian q(u | x)
would be no wider a family: q(z | u, x) can do its shift and scale); `r(u | z, x)` stands in for u's posterior, and

    log p(x) >= E[log p(x, z) + log r(u | z, x) - log q(u) - log q(z | u, x)]

(Ranganath, Tran, Blei 2016, arXiv 1511.02386; Maaloe et al. 2016, arXiv 1602.05473). The bracket is a log weight with
`E exp = p(x)` exactly, whatever r is, so that its mean is a true ELBO of the model, not of the approximation alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.engine.flat_adam import FlatAdam
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.methods import latent_training
from hsivi_cli.methods.flow_posterior import sampled_draws
from hsivi_cli.methods.latent_training import (
    State,
    TrainingConfig,
    begin_step,
    descend,
    gaussian_log_prob,
    make_state,
    warmed,
)
from hsivi_cli.methods.vae import PLAIN
from hsivi_cli.networks.decoders import mlp_trunk
from hsivi_cli.networks.random_function import HIGHEST_LOG_SD, LOWEST_LOG_SD, RandomEncoder
from hsivi_cli.targets.latent import LatentTask

COUPLED = 0.7
"""Correlation of u and z at the start."""

state_dict, load_state_dict = latent_training.state_dict, latent_training.load_state_dict


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Plain JSON fields; `auxiliary` is the dimension of u (0: as many as z), its networks have a layer of `width`."""

    auxiliary: int = 0
    width: int = 128


class _Conditional(nn.Module):
    """A diagonal Gaussian of `outputs` numbers given a vector of them and the features of x.

    It starts at N(c value, 1 - c^2) with c = COUPLED, the conditional of a pair of standard normals.
    """

    def __init__(self, inputs: int, features: int, outputs: int, width: int, start: torch.Generator) -> None:
        super().__init__()
        self.trunk = mlp_trunk(inputs + features, (width,), width, start)
        self.straight = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
        self.head = nn.utils.skip_init(nn.Linear, width, 2 * outputs)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.1 / width**0.5, generator=start)
            self.head.bias.zero_()
            self.head.bias[outputs : outputs + min(inputs, outputs)] = 0.5 * math.log(1 - COUPLED**2)
            self.straight.weight.copy_(COUPLED * torch.eye(outputs, inputs))

    def forward(self, value: Float[Tensor, "k n i"], psi: Float[Tensor, "n p"]) -> tuple[Tensor, Tensor]:
        """Mean and log sd, each (k, n, outputs)."""
        both = torch.cat([value, psi.expand(*value.shape[:-1], -1)], -1)
        mean, log_sd = self.head(self.trunk(both)).chunk(2, -1)
        return mean + self.straight(value), log_sd


class TwoLevels(nn.Module):
    """The Gaussian encoder's mean and sd, q(z | u, x) in their units, and r(u | z, x) with z in their units.

    At the start u and z are a pair of Gaussians, r is exact and the bound a VAE's: with z independent of u the bound
    would be stationary in both networks, and u remain unused.
    """

    def __init__(self, base: RandomEncoder, lower: _Conditional, reverse: _Conditional) -> None:
        super().__init__()
        self.base, self.lower, self.reverse = base, lower, reverse

    def forward(
        self, x: Float[Tensor, "n D"], u: Float[Tensor, "k n a"], noise: Float[Tensor, "k n d"]
    ) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"]]:
        """z, and `log q(u) + log q(z | u, x) - log r(u | z, x)`: what takes the place of log q(z | x)."""
        psi = self.base.features(x)
        mean, log_unit = self.base.mean_head(psi)[0], _bounded(self.base.log_sd_head(psi)[0])
        own = psi * self.base.norm.root
        moved, log_sd = self.lower(u, own)
        sd = _bounded(log_sd).exp()
        v = moved + sd * noise
        r_mean, r_log_sd = self.reverse(v, own)
        log_r = gaussian_log_prob(u, r_mean, _bounded(r_log_sd).exp())
        log_u = gaussian_log_prob(u, torch.zeros_like(u), torch.ones_like(u))
        log_q = gaussian_log_prob(v, moved, sd) - log_unit.sum(-1)
        return mean + log_unit.exp() * v, log_u + log_q - log_r


def init(target: LatentTask, config: Config) -> State:
    """A fresh run on a copy of the target's model. Raises InputError for numbers out of their range."""
    if config.auxiliary < 0 or config.width < 1:
        raise InputError(f"auxiliary is {config.auxiliary}, width {config.width}: use 0 or more, and 1 or more")
    state = make_state(target, config, PLAIN, PLAIN)
    dim, like = state.model.prior.dim, state.model.like()
    auxiliary = config.auxiliary or dim
    begin = generator(config.seed, Stream.INIT, 1)
    features = state.encoder.norm.width
    lower = _Conditional(auxiliary, features, dim, config.width, begin)
    reverse = _Conditional(dim, features, auxiliary, config.width, begin)
    encoder = TwoLevels(state.encoder, lower, reverse).to(like.device, like.dtype)
    learnt = [p for p in state.model.parameters() if p.requires_grad]
    parameters = [p for p in (*encoder.parameters(), *learnt) if p.requires_grad]
    return replace(state, encoder=cast(Any, encoder), optimiser=FlatAdam([(parameters, 1.0)]), parameters=parameters)


def step(state: State, batch: Tensor | tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
    """One Adam step on a minibatch of rows; labels, where there are any, are left aside."""
    config: Config = state.config
    begin_step(state)
    x = latent_training.as_rows(state, batch if isinstance(batch, Tensor) else batch[0])
    z, log_q = state.encoder(x, *_noise(state, len(x), config.samples, generator))
    log_likelihood = state.model.log_likelihood(x, z).mean()
    prior_kl = (log_q - state.model.prior.log_prob(z)).mean()
    loss = warmed(config, state.step) * prior_kl - log_likelihood
    metrics = {"elbo": float((log_likelihood - prior_kl).detach()), "prior_kl": float(prior_kl.detach())}
    metrics["grad_norm"] = descend(state, loss)
    return metrics


def _bounded(log_sd: Tensor) -> Tensor:
    # with the gradient of the identity: a row beyond the edge must find its way back
    return log_sd + (log_sd.clamp(LOWEST_LOG_SD, HIGHEST_LOG_SD) - log_sd).detach()


def _noise(state: State, rows: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    dim = state.model.prior.dim
    auxiliary = state.config.auxiliary or dim
    noise = torch.randn(k, rows, auxiliary + dim, generator=generator, dtype=state.parameters[0].dtype)
    above, below = noise.to(state.parameters[0].device).split([auxiliary, dim], -1)
    return above, below


@dataclass(frozen=True)
class HierarchicalPosterior:
    """The mixture q(z | x) (LatentPosterior)."""

    state: State

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k draws a row, weights with the exact auxiliary ratio."""

        def some(part: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.state.encoder(part, *_noise(self.state, len(part), k, generator))
            return found

        return sampled_draws(self.state, x, k, weigh, some)


def posterior(state: State) -> HierarchicalPosterior:
    """Both levels as they are now."""
    return HierarchicalPosterior(state)

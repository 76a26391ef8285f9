"""`--method iaf` and `--method nsf`: a VAE whose posterior is a normalising flow of zuko.

`z = m(x) + h(x) T(noise; x)`, T autoregressive in the direction of sampling: affine, the inverse autoregressive flow of
Kingma et al. (2016, arXiv 1606.04934), or a rational-quadratic spline (Durkan et al. 2019, arXiv 1906.04032).
A draw and its density are one pass; densities of other points, which need T's inverse, are never asked for. Trunk and
heads are those of `vae`, and T starts near the identity, so that the start is a VAE's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from hsivi_cli.engine.flat_adam import FlatAdam
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.methods import latent_training
from hsivi_cli.methods.latent_training import State, TrainingConfig, begin_step, descend, log_joint, make_state, warmed
from hsivi_cli.methods.vae import PLAIN
from hsivi_cli.networks.random_function import HIGHEST_LOG_SD, LOWEST_LOG_SD, RandomEncoder
from hsivi_cli.objectives.vae_bounds import importance_weighted_bound
from hsivi_cli.targets.latent import LatentTask

DRAWS_AT_ONCE = 50_000
START = 0.1
"""The last layer of a flow's networks begins at this share of its usual size."""

state_dict, load_state_dict = latent_training.state_dict, latent_training.load_state_dict


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Plain JSON fields; `flow` transforms of networks with layers of `flow_hidden`, told of x by its features."""

    flow: Literal["iaf", "nsf"] = "iaf"
    transforms: int = 4
    flow_hidden: tuple[int, ...] = (64, 64)
    bins: int = 8
    objective: Literal["elbo", "iwae"] = "elbo"


class FlowEncoder(nn.Module):
    """q(z | x): the Gaussian encoder's mean and sd around a flow of the noise."""

    def __init__(self, base: RandomEncoder, flow: nn.Module) -> None:
        super().__init__()
        self.base, self.flow = base, flow

    def forward(
        self, x: Float[Tensor, "n D"], noise: Float[Tensor, "k n d"]
    ) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"]]:
        """z and log q(z | x), one pass over the noise."""
        psi = self.base.features(x)
        mean, log_sd = self.base.mean_head(psi)[0], self.base.log_sd_head(psi)[0]
        # with the gradient of the identity: a row beyond the edge must find its way back
        log_sd = log_sd + (log_sd.clamp(LOWEST_LOG_SD, HIGHEST_LOG_SD) - log_sd).detach()
        u, log_det = self.flow(psi * self.base.norm.root).transform.call_and_ladj(noise)
        log_base = latent_training.gaussian_log_prob(noise, torch.zeros_like(noise), torch.ones_like(noise))
        return mean + log_sd.exp() * u, log_base - log_det - log_sd.sum(-1)


def init(target: LatentTask, config: Config) -> State:
    """A fresh run on a copy of the target's model. Raises InputError for numbers out of their range."""
    for name, value, least in (
        ("transforms", config.transforms, 1),
        ("bins", config.bins, 2),
        *(("flow_hidden", width, 1) for width in config.flow_hidden),
    ):
        if value < least:
            raise InputError(f"{name} is {value}: it must be {least} or more")
    if config.flow not in ("iaf", "nsf"):
        raise InputError(f'there is no flow "{config.flow}": choose iaf or nsf')
    state = make_state(target, config, PLAIN, PLAIN)
    like = state.model.like()
    flow = build_flow(config, state.encoder.norm.width, state.model.prior.dim).to(like.device, like.dtype)
    encoder = FlowEncoder(state.encoder, flow)
    learnt = [p for p in state.model.parameters() if p.requires_grad]
    parameters = [p for p in (*encoder.parameters(), *learnt) if p.requires_grad]
    return replace(state, encoder=cast(Any, encoder), optimiser=FlatAdam([(parameters, 1.0)]), parameters=parameters)


def build_flow(config: Config, features: int, dim: int) -> nn.Module:
    """Autoregressive transforms given `features` numbers, orders turning; weights depend on `config.seed` alone."""
    checking = Distribution._validate_args
    import zuko  # here, because only these methods need it

    Distribution.set_default_validate_args(checking)  # zuko turns torch's checks off for the whole process
    options: dict[str, Any] = {"transforms": config.transforms, "hidden_features": config.flow_hidden}
    start = int(torch.randint(2**31, (1,), generator=generator(config.seed, Stream.INIT, 1)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        flow: nn.Module
        if config.flow == "nsf":
            flow = zuko.flows.NSF(dim, features, bins=config.bins, **options)
        else:
            flow = zuko.flows.MAF(dim, features, **options)
    with torch.no_grad():
        for module in flow.modules():
            hyper = getattr(module, "hyper", None)
            if isinstance(hyper, nn.Sequential):
                for parameter in hyper[-1].parameters():
                    parameter.mul_(START)
    return flow


def step(state: State, batch: Tensor | tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
    """One Adam step on a minibatch of rows; labels, where there are any, are left aside."""
    config: Config = state.config
    begin_step(state)
    x = latent_training.as_rows(state, batch if isinstance(batch, Tensor) else batch[0])
    z, log_q = state.encoder(x, _noise(state, len(x), config.samples, generator))
    if config.objective == "iwae":
        bound = importance_weighted_bound(state.model.log_joint(x, z) - log_q).mean()
        metrics, loss = {"bound": float(bound.detach())}, -bound
    else:
        log_likelihood = state.model.log_likelihood(x, z).mean()
        prior_kl = (log_q - state.model.prior.log_prob(z)).mean()
        loss = warmed(config, state.step) * prior_kl - log_likelihood
        metrics = {"elbo": float((log_likelihood - prior_kl).detach()), "prior_kl": float(prior_kl.detach())}
    metrics["grad_norm"] = descend(state, loss)
    return metrics


def _noise(state: State, rows: int, k: int, generator: torch.Generator) -> Float[Tensor, "k n d"]:
    noise = torch.randn(k, rows, state.model.prior.dim, generator=generator, dtype=state.parameters[0].dtype)
    return noise.to(state.parameters[0].device)


def sampled_draws(
    state: State,
    x: Float[Tensor, "n D"],
    k: int,
    weigh: bool,
    some: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> LatentDraws:
    """k draws a row of a posterior whose moments have no closed form: they are those of the draws.

    `some(rows)` gives draws (k, n, d) and their log densities (k, n).
    """
    draws, weights = [], []
    for part in latent_training.as_rows(state, x).split(max(1, DRAWS_AT_ONCE // k)):
        z, log_q = some(part)
        draws.append(z)
        if weigh:
            weights.append(log_joint(state.model, part, z) - log_q.double())
    z = torch.cat(draws, 1)
    return LatentDraws(z, torch.cat(weights, 1) if weigh else None, z.mean(0), z.std(0, correction=min(1, k - 1)))


@dataclass(frozen=True)
class FlowPosterior:
    """`q(z | x)` of the flow (LatentPosterior)."""

    state: State

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k draws a row with their unbiased weights."""

        def some(part: Tensor) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = self.state.encoder(part, _noise(self.state, len(part), k, generator))
            return found

        return sampled_draws(self.state, x, k, weigh, some)


def posterior(state: State) -> FlowPosterior:
    """The flow as it is now."""
    return FlowPosterior(state)

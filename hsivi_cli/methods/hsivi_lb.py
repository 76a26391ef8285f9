"""HSIVI-LB for a log density: every layer maximises its semi-implicit lower bound (arXiv 2310.17153).

With one layer it is SIVI (arXiv 1805.11183). The J further components of a pair are the next J chains of the same
rollout: independent of the pair, as the bound asks, and free of gradients, see `objectives.hsivi_bound`.

The bound sees at most log(J + 1) nats of what a layer knows of its input. In a few dimensions that is plenty; in sixty
correlated ones it is what can be gained over a diagonal Gaussian (sonar, from mean field: 6.2 nats of 29, J = 511):
fit in coordinates whitened by a full covariance, or by HSIVI-SM.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods import hsivi_posterior
from hsivi_cli.methods.hsivi_posterior import Chain, Pass, PosteriorConfig
from hsivi_cli.objectives.hsivi_bound import mixture_at, surrogate_bound
from hsivi_cli.targets.density import Density


@dataclass(frozen=True)
class Config(PosteriorConfig):
    """A resolved HSIVI-LB fit."""


published_settings = hsivi_posterior.published_settings


@dataclass
class State:
    """The chain and its optimiser."""

    step: int
    density: Density
    config: Config
    chain: Chain
    optimiser: torch.optim.Optimizer


def init(target: Density, config: Config) -> State:
    """A fresh fit; raises InputError for numbers that make none."""
    hsivi_posterior.check_config(config)
    chain = hsivi_posterior.make_chain(target.dim, config)
    return State(0, target, config, chain, hsivi_posterior.make_optimiser(chain.vectors, config, config.lr))


def step(state: State, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """One ascent of the bounds of the active layers.

    `elbo` is the bound of the layer nearest to the target, against the target itself.
    """
    state.step += 1
    config, chain = state.config, state.chain
    active = hsivi_posterior.active_layers(state.step, config)
    passes = hsivi_posterior.roll_out(chain, active, max(config.batch, config.inner + 1), generator)
    zeta = torch.randn((len(active), config.batch, state.density.dim), generator=generator, dtype=torch.float64)
    ascent = ascent_at(state, passes, zeta)
    gradients = [hsivi_posterior.move_along(chain, *each) for each in zip(passes, zeta, ascent.direction, strict=True)]
    rate = hsivi_posterior.rate_at(config.lr, state.step, config)
    vectors = [chain.vectors[k] for k in active]
    norm = hsivi_posterior.ascend(state.optimiser, vectors, gradients, rate, config.clip)
    hsivi_posterior.update_averages(chain, active, state.step, config.ema)
    return {"elbo": ascent.elbo.item(), "bound": ascent.bounds.sum().item(), "grad_norm": norm, "lr": rate}


@dataclass(frozen=True)
class Ascent:
    """The bound of each active layer against its bridge, that of the first against the target, and the way up.

    `direction` is the gradient of `log p_k - log mixture` at each output: the bound's, see `objectives.hsivi_bound`.
    """

    bounds: Float[Tensor, " k"]
    elbo: Float[Tensor, ""]
    direction: Float[Tensor, "k n d"]


@torch.no_grad()
def ascent_at(state: State, passes: list[Pass], zeta: Float[Tensor, "k n d"]) -> Ascent:
    """What the active layers gain at the outputs that `zeta` makes."""
    x = torch.stack([done.draw(rows) for done, rows in zip(passes, zeta, strict=True)])
    mixtures = [
        mixture_at(rows, done.means, done.log_sigma, state.config.inner) for done, rows in zip(passes, x, strict=True)
    ]
    score, log_p, log_target = hsivi_posterior.bridge_gradient(
        state.chain, state.density, state.config, state.step, passes, x
    )
    bounds = [surrogate_bound(value, mixture.log_density) for value, mixture in zip(log_p, mixtures, strict=True)]
    elbo = surrogate_bound(log_target[0], mixtures[0].log_density)
    return Ascent(torch.stack(bounds), elbo, score - torch.stack([mixture.score for mixture in mixtures]))


def sample(state: State, noise: NoiseStreams) -> Draws:
    """One draw a noise stream, with the J-component estimate of its log density; there is no exact weight."""
    return hsivi_posterior.sample_chain(state.chain, state.density, state.config, noise)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON of a fit."""
    return {
        "step": state.step,
        "chain": hsivi_posterior.chain_state_dict(state.chain),
        "optimiser": state.optimiser.state_dict(),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a fit, in place."""
    state.step = tree["step"]
    hsivi_posterior.load_chain_state_dict(state.chain, tree["chain"])
    state.optimiser.load_state_dict(tree["optimiser"])

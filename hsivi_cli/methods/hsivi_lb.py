"""HSIVI-LB for a log density: every layer maximises its semi-implicit lower bound (arXiv 2310.17153).

With one layer it is SIVI (arXiv 1805.11183). The J further components of a pair are the next J chains of the same
rollout: independent of the pair, as the bound asks, and free.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsivi_cli.engine.optimisation import apply_step
from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.errors import InputError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods import hsivi_posterior
from hsivi_cli.methods.hsivi_posterior import Chain, PosteriorConfig
from hsivi_cli.objectives.hsivi_bound import log_mixture, surrogate_bound
from hsivi_cli.targets.density import Density


@dataclass(frozen=True)
class Config(PosteriorConfig):
    """A resolved HSIVI-LB fit. `inner` is J, the further components of the bound; 0 means batch - 1."""

    inner: int = 0

    @property
    def extra(self) -> int:
        """J."""
        return self.inner or self.batch - 1


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
    if config.inner < 0:
        raise InputError(f"--inner {config.inner}: must be at least 1, or 0 for the batch less one")
    chain = hsivi_posterior.make_chain(target.dim, config)
    optimiser = torch.optim.Adam(chain.parameters(), config.lr, amsgrad=config.amsgrad)
    return State(0, target, config, chain, optimiser)


def step(state: State, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """One ascent of the bounds of the active layers.

    `elbo` is the bound of the layer nearest to the target, against the target itself.
    """
    state.step += 1
    config, chain = state.config, state.chain
    active = hsivi_posterior.active_layers(state.step, config)
    bounds, elbo = layer_bounds(state, active, generator)
    rate = hsivi_posterior.rate_at(config.lr, state.step, config)
    norm = apply_step(-bounds.sum(), state.optimiser, chain.parameters(), rate, config.clip)
    hsivi_posterior.update_averages(chain, active, state.step, config.ema)
    return {"elbo": elbo.item(), "bound": bounds.sum().item(), "grad_norm": norm, "lr": rate}


def layer_bounds(state: State, active: range, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The bound of each active layer against its bridge, shape (layers,), and that of the first against the target."""
    config, dim = state.config, state.density.dim
    rollout = hsivi_posterior.roll_out(state.chain, active, max(config.batch, config.extra + 1), generator)
    zeta = torch.randn((len(active), config.batch, dim), generator=generator, dtype=torch.float64)
    x = rollout.draw(zeta)
    log_target = state.density.log_prob(x.reshape(-1, dim)).reshape(x.shape[:2])
    power = hsivi_posterior.powers_at(state.chain, state.step, config)[rollout.numbers].unsqueeze(-1)
    log_p = (1 - power) * hsivi_posterior.log_base(x) + power * log_target
    log_mix = log_mixture(x, rollout.means, rollout.log_sigma, config.extra)
    return surrogate_bound(log_p, log_mix), surrogate_bound(log_target[0], log_mix[0]).detach()


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

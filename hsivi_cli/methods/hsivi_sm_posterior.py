"""HSIVI-SM for a log density: every layer minimises the Fisher divergence that a critic measures (arXiv 2310.17153).

Only the score of the target is asked for. The critic f_k of layer k learns `S_k - grad log q(x_k)`; between two updates
of q the means do not change, so one rollout serves all critic updates, each with fresh noise.

`divergence` "fisher" is the paper's minimax objective. The default, "kl", moves a layer's output along the critic
instead: the gradient of the reverse KL divergence is the difference of scores, so nothing needs the second derivatives
of the target, and q cannot lower its loss by running to where the critic is wrong. In 61 dimensions "fisher" did so at
our learning rates, and needed a third of them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hsivi_cli.engine.optimisation import apply_step
from hsivi_cli.engine.seeds import NoiseStreams, Stream
from hsivi_cli.engine.seeds import generator as seeded
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods import hsivi_posterior
from hsivi_cli.methods.hsivi_posterior import Chain, PosteriorConfig, Rollout
from hsivi_cli.networks.conditional_gaussian import mlp
from hsivi_cli.objectives.hsivi_bound import fisher_minimax, log_mixture, surrogate_bound
from hsivi_cli.targets.density import Density

FARTHEST = 1e4  # a coordinate of a bridge's draws; they are about N(0, I) in whitened coordinates
Divergence = Literal["fisher", "kl"]


@dataclass(frozen=True)
class Config(PosteriorConfig):
    """A resolved HSIVI-SM fit; the critic must learn faster than the chain, which else runs ahead of it."""

    steps: int = 3000
    lr: float = 3e-3
    critic_hidden: tuple[int, ...] = (128, 128)
    critic_steps: int = 2
    lr_critic: float = 1e-2
    divergence: Divergence = "kl"


# The critics that go with `hsivi_posterior.published_settings`.
_PUBLISHED_CRITICS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"critic_hidden": (128, 128), "lr_critic": 2e-3}),
    (100, {"critic_hidden": (256, 256), "lr_critic": 3e-3}),
    (2**62, {"critic_hidden": (16, 16), "lr_critic": 1e-2}),
)


def published_settings(dim: int) -> dict[str, Any]:
    """Settings of `Config` for this dimension as published: the Fisher divergence, one critic step a step."""
    found = next(settings for most, settings in _PUBLISHED_CRITICS if dim <= most)
    return hsivi_posterior.published_settings(dim) | found | {"critic_steps": 1, "divergence": "fisher"}


@dataclass
class State:
    """The chain, one critic a layer, and their optimisers."""

    step: int
    density: Density
    config: Config
    chain: Chain
    critics: nn.ModuleList
    optimiser: torch.optim.Optimizer
    critic_optimiser: torch.optim.Optimizer


def init(target: Density, config: Config) -> State:
    """A fresh fit, its critics at zero; raises InputError for numbers that make none."""
    hsivi_posterior.check_config(config)
    if config.critic_steps < 1:
        raise InputError(f"--critic-steps {config.critic_steps}: must be at least 1")
    chain = hsivi_posterior.make_chain(target.dim, config)
    draws = seeded(config.seed, Stream.INIT, 2)
    sizes = (target.dim, *config.critic_hidden, target.dim)
    critics = nn.ModuleList(mlp(sizes, draws, last=0.0) for _ in range(config.layers))
    return State(
        0,
        target,
        config,
        chain,
        critics,
        torch.optim.Adam(chain.parameters(), config.lr, amsgrad=config.amsgrad),
        torch.optim.Adam(critics.parameters(), config.lr_critic, amsgrad=config.amsgrad),
    )


def step(state: State, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """`critic_steps` critic updates on one rollout, then one update of q.

    `elbo` is a lower bound of the log evidence as in HSIVI-LB, J = batch - 1: a measure, not what is trained.
    """
    state.step += 1
    active = hsivi_posterior.active_layers(state.step, state.config)
    rollout = hsivi_posterior.roll_out(state.chain, active, state.config.batch, generator)
    for _ in range(state.config.critic_steps):
        critic_metrics = critic_step(state, rollout, generator)
    metrics = critic_metrics | chain_step(state, rollout, active, generator)
    return metrics | {"elbo": _elbo(state, rollout, generator)}


def critic_step(state: State, rollout: Rollout, generator: torch.Generator) -> dict[str, float]:
    """Raise the critics' side of the minimax value; nothing reaches q."""
    config = state.config
    with torch.no_grad():
        x, difference = _difference(state, rollout, generator)
    value = fisher_minimax(_critics(state, x, rollout), difference).sum()
    rate = hsivi_posterior.rate_at(config.lr_critic, state.step, config)
    norm = apply_step(-value, state.critic_optimiser, state.critics.parameters(), rate, config.clip)
    return {"critic_value": value.item(), "critic_grad_norm": norm}


def chain_step(state: State, rollout: Rollout, active: range, generator: torch.Generator) -> dict[str, float]:
    """Move q along the objective's gradient; the critics are left as they are."""
    config = state.config
    state.critics.requires_grad_(False)
    if config.divergence == "fisher":
        x, difference = _difference(state, rollout, generator)
        loss = fisher_minimax(_critics(state, x, rollout), difference).sum()
    else:
        x = rollout.draw(_noise(rollout, generator))
        with torch.no_grad():
            direction = _critics(state, x, rollout)
        loss = -(direction * x).sum(-1).mean(-1).sum()
    state.critics.requires_grad_(True)
    rate = hsivi_posterior.rate_at(config.lr, state.step, config)
    norm = apply_step(loss, state.optimiser, state.chain.parameters(), rate, config.clip)
    hsivi_posterior.update_averages(state.chain, active, state.step, config.ema)
    return {"chain_loss": loss.item(), "grad_norm": norm, "lr": rate}


@torch.no_grad()
def _elbo(state: State, rollout: Rollout, generator: torch.Generator) -> float:
    x = rollout.draw(_noise(rollout, generator))[0]
    if not float(x.abs().max()) < FARTHEST:
        raise RunError("diverged: the chain ran ahead of its critic; use a lower --lr, or --method hsivi-lb")
    log_mix = log_mixture(x, rollout.means[0], rollout.log_sigma[0], len(x) - 1)
    return float(surrogate_bound(state.density.log_prob(x), log_mix))


def _noise(rollout: Rollout, generator: torch.Generator) -> Tensor:
    return torch.randn(rollout.means.shape, generator=generator, dtype=torch.float64)


def _difference(state: State, rollout: Rollout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Outputs `x_k` of the active layers, and `S_k(x_k) - grad log q(x_k | x_{k+1})` there."""
    zeta = _noise(rollout, generator)
    x = rollout.draw(zeta)
    target_score = state.density.gradient(x.reshape(-1, state.density.dim)).reshape(x.shape)
    power = hsivi_posterior.powers_at(state.chain, state.step, state.config)[rollout.numbers].reshape(-1, 1, 1)
    score = (1 - power) * -x + power * target_score
    return x, score + zeta * (-rollout.log_sigma).exp().unsqueeze(1)


def _critics(state: State, x: Tensor, rollout: Rollout) -> Tensor:
    numbers = rollout.numbers.tolist()
    return torch.stack([state.critics[k](rows) for k, rows in zip(numbers, x, strict=True)])


def sample(state: State, noise: NoiseStreams) -> Draws:
    """One draw a noise stream, with the J-component estimate of its log density; there is no exact weight."""
    return hsivi_posterior.sample_chain(state.chain, state.density, state.config, noise)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON of a fit."""
    return {
        "step": state.step,
        "chain": hsivi_posterior.chain_state_dict(state.chain),
        "critics": dict(state.critics.state_dict()),
        "optimiser": state.optimiser.state_dict(),
        "critic_optimiser": state.critic_optimiser.state_dict(),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a fit, in place."""
    state.step = tree["step"]
    hsivi_posterior.load_chain_state_dict(state.chain, tree["chain"])
    state.critics.load_state_dict(tree["critics"])
    state.optimiser.load_state_dict(tree["optimiser"])
    state.critic_optimiser.load_state_dict(tree["critic_optimiser"])

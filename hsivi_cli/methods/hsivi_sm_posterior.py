"""HSIVI-SM for a log density: every layer minimises the Fisher divergence that a critic measures (arXiv 2310.17153).

Only the score of the target is asked for. The critic of layer k is `f_k = S_k - s_k`: the bridge's score, which is
known, less a network that learns `grad log q(x_k)`, a smooth thing that does not change with the bridge. Between two
updates of q the means do not change, so one rollout serves all critic updates, each with fresh noise.

`divergence` "fisher" is the paper's minimax objective. The default, "kl", moves a layer's output along the critic
instead: the gradient of the reverse KL divergence is the difference of scores, so nothing needs the second derivatives
of the target, and q cannot lower its loss by running to where the critic is wrong. In 61 dimensions "fisher" did so at
our learning rates, and needed a third of them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hsivi_cli.engine.seeds import NoiseStreams, Stream
from hsivi_cli.engine.seeds import generator as seeded
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods import hsivi_posterior
from hsivi_cli.methods.hsivi_posterior import Chain, Pass, PosteriorConfig
from hsivi_cli.networks.conditional_gaussian import SkipNetwork, flatten_parameters
from hsivi_cli.objectives.hsivi_bound import Mixture, fisher_minimax, mixture_at, surrogate_bound
from hsivi_cli.targets.density import Density

FARTHEST = 1e4  # a coordinate of a bridge's draws; they are about N(0, I) in whitened coordinates
Divergence = Literal["fisher", "kl"]


@dataclass(frozen=True)
class Config(PosteriorConfig):
    """A resolved HSIVI-SM fit; the critic must learn faster than the chain, which else runs ahead of it.

    Noise that varies with the input asks more of the critic, and is off.
    """

    steps: int = 2000
    varying: bool = False
    inner: int = 127
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
    critic_vectors: list[Tensor]


def init(target: Density, config: Config) -> State:
    """A fresh fit, its critics at zero; raises InputError for numbers that make none."""
    hsivi_posterior.check_config(config)
    if config.critic_steps < 1:
        raise InputError(f"--critic-steps {config.critic_steps}: must be at least 1")
    chain = hsivi_posterior.make_chain(target.dim, config)
    draws = seeded(config.seed, Stream.INIT, 2)
    sizes = (target.dim, *config.critic_hidden, target.dim)
    critics = nn.ModuleList(SkipNetwork(sizes, draws) for _ in range(config.layers))
    vectors = [flatten_parameters(critic) for critic in critics]
    return State(
        0,
        target,
        config,
        chain,
        critics,
        hsivi_posterior.make_optimiser(chain.vectors, config, config.lr),
        hsivi_posterior.make_optimiser(vectors, config, config.lr_critic),
        vectors,
    )


def step(state: State, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """`critic_steps` critic updates on one rollout, then one update of q.

    `elbo` is a lower bound of the log evidence as in HSIVI-LB, with the same J: a measure, not what is trained. In many
    correlated dimensions it can be loose by a hundred nats; the draws of a finished fit come with a closer estimate.
    """
    state.step += 1
    config = state.config
    active = hsivi_posterior.active_layers(state.step, config)
    passes = hsivi_posterior.roll_out(state.chain, active, max(config.batch, config.inner + 1), generator)
    for _ in range(config.critic_steps):
        metrics = critic_step(state, passes, generator)
    return metrics | chain_step(state, passes, generator)


def critic_step(state: State, passes: list[Pass], generator: torch.Generator) -> dict[str, float]:
    """Raise the critics' side of the minimax value; nothing reaches q.

    With `f = S - s` the value is `|S - m|^2 - |s - m|^2`, m being the score of the mixture: a regression of s on m,
    for which the target is not asked.
    """
    config = state.config
    x = _outputs(state, passes, generator)
    mixed = torch.stack([mixture.score for mixture in _mixtures(state, x, passes)])
    loss = (_scores(state, x, passes) - mixed).square().sum(-1).mean(-1).sum()
    parameters = [list(state.critics[done.number].parameters()) for done in passes]
    flat = iter(torch.autograd.grad(-loss, [parameter for many in parameters for parameter in many]))
    gradients = [[next(flat) for _ in many] for many in parameters]
    rate = hsivi_posterior.rate_at(config.lr_critic, state.step, config)
    vectors = [state.critic_vectors[done.number] for done in passes]
    norm = hsivi_posterior.ascend(state.critic_optimiser, vectors, gradients, rate, config.clip)
    return {"critic_loss": loss.item(), "critic_grad_norm": norm}


def chain_step(state: State, passes: list[Pass], generator: torch.Generator) -> dict[str, float]:
    """Move q along the objective's gradient; the critics are left as they are."""
    config = state.config
    zeta = _noise(state, passes, generator)
    x = torch.stack([done.draw(rows) for done, rows in zip(passes, zeta, strict=True)])
    score, _, log_target = hsivi_posterior.bridge_gradient(state.chain, state.density, config, state.step, passes, x)
    with torch.no_grad():
        direction = score - _scores(state, x, passes)
    elbo = surrogate_bound(log_target[0], _mixtures(state, x[:1], passes[:1])[0].log_density)
    if config.divergence == "fisher":
        gradients = _fisher_gradients(state, passes, zeta)
    else:
        each = zip(passes, zeta, direction, strict=True)
        gradients = [hsivi_posterior.move_along(state.chain, *one) for one in each]
    rate = hsivi_posterior.rate_at(config.lr, state.step, config)
    vectors = [state.chain.vectors[done.number] for done in passes]
    norm = hsivi_posterior.ascend(state.optimiser, vectors, gradients, rate, config.clip)
    active = hsivi_posterior.active_layers(state.step, config)
    hsivi_posterior.update_averages(state.chain, active, state.step, config.ema)
    divergence = float(direction.square().sum(-1).mean(-1).sum())
    return {"elbo": elbo.item(), "fisher_divergence": divergence, "grad_norm": norm, "lr": rate}


def _fisher_gradients(state: State, passes: list[Pass], zeta: Tensor) -> list[list[Tensor]]:
    """Of minus the minimax value: through x into the target's score and the critic, and through sigma."""
    dim = state.density.dim
    outputs = [hsivi_posterior.redraw(state.chain, done, rows) for done, rows in zip(passes, zeta, strict=True)]
    x = torch.stack([output.x for output in outputs])
    power = hsivi_posterior.powers_at(state.chain, state.step, state.config)[[done.number for done in passes]]
    target_score = state.density.gradient(x.reshape(-1, dim)).view(x.shape)
    conditional = torch.stack([-rows / output.sigma for rows, output in zip(zeta, outputs, strict=True)])
    score = torch.lerp(-x, target_score, power.reshape(-1, 1, 1))
    value = fisher_minimax(score - _scores(state, x, passes), score - conditional).sum()
    layers = [list(state.chain.layers[done.number].parameters()) for done in passes]
    flat = iter(torch.autograd.grad(-value, [parameter for many in layers for parameter in many]))
    return [[next(flat) for _ in many] for many in layers]


def _noise(state: State, passes: list[Pass], generator: torch.Generator) -> Tensor:
    shape = (len(passes), state.config.batch, state.density.dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _outputs(state: State, passes: list[Pass], generator: torch.Generator) -> Tensor:
    zeta = _noise(state, passes, generator)
    x = torch.stack([done.draw(rows) for done, rows in zip(passes, zeta, strict=True)])
    if not float(x[0].abs().max()) < FARTHEST:
        raise RunError("diverged: the chain ran ahead of its critic; use a lower --lr, or --method hsivi-lb")
    return x


def _scores(state: State, x: Tensor, passes: list[Pass]) -> Tensor:
    """What the critics' networks say of `grad log q(x_k)`; untrained, the score of N(0, I)."""
    return torch.stack([state.critics[done.number](rows) - rows for done, rows in zip(passes, x, strict=True)])


def _mixtures(state: State, x: Tensor, passes: list[Pass]) -> list[Mixture]:
    each = zip(passes, x, strict=True)
    return [mixture_at(rows, done.means, done.log_sigma, state.config.inner) for done, rows in each]


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

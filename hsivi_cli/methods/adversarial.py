"""`--method aae`: the adversarial autoencoder (Makhzani et al. 2016, arXiv 1511.05644), a peer.

Each step has three phases with an optimiser each: encoder and decoder raise `E log p(x | z)`; a discriminator learns to
tell encoded rows from draws of the prior; the encoder learns to deceive it. Encoded rows as a whole come to look like
the prior; the encoder of one row is a point, so there is neither a posterior density nor a bound, and draws have no
weight. With `noise="gaussian"` the encoder is a Gaussian that no bound was fitted to, but its weights are exact.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.engine.optimisation import LearningRate
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.methods.latent_training import TrainingConfig, begin_step, gaussian_draws, make_state
from hsivi_cli.methods.vae import PLAIN
from hsivi_cli.networks.decoders import MlpDecoder
from hsivi_cli.networks.random_function import RandomEncoder
from hsivi_cli.targets.latent import LatentModel, LatentTask

PHASES = ("rebuild", "judge", "deceive")


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Plain JSON fields; `adversary_rate` multiplies the learning rate in the phases of the discriminator."""

    noise: Literal["none", "gaussian"] = "none"
    judge_hidden: tuple[int, ...] = (256, 256)
    adversary_rate: float = 0.5


@dataclass
class State:
    """A run: model, encoder, discriminator, and one optimiser for each of the three phases."""

    step: int
    task: LatentTask
    config: Config
    model: LatentModel
    encoder: RandomEncoder
    judge: MlpDecoder
    optimisers: dict[str, torch.optim.Adam]
    parameters: list[nn.Parameter]


def init(target: LatentTask, config: Config) -> State:
    """A fresh run on a copy of the target's model. Raises InputError for numbers out of their range."""
    if config.noise not in ("none", "gaussian"):
        raise InputError(f'there is no noise "{config.noise}" of the encoder: choose none or gaussian')
    if config.adversary_rate <= 0 or min(config.judge_hidden, default=1) < 1:
        raise InputError("the discriminator needs a rate above 0 and layers of 1 or more")
    base = make_state(target, config, PLAIN, PLAIN)
    like = base.model.like()
    judge = MlpDecoder(base.model.prior.dim, config.judge_hidden, 1, generator(config.seed, Stream.INIT, 1))
    judge = judge.to(like.device, like.dtype)
    own = [p for p in base.encoder.parameters() if p.requires_grad]
    prior = {id(p) for p in base.model.prior.parameters()} if isinstance(base.model.prior, nn.Module) else set()
    # the prior is what codes are made to look like: here it stays as it begins
    learnt = [p for p in base.model.parameters() if p.requires_grad and id(p) not in prior]
    members = {"rebuild": [*own, *learnt], "judge": list(judge.parameters()), "deceive": own}
    for parameter in (*own, *learnt):
        parameter.data = parameter.data.clone()  # out of the shared vector of `make_state`'s optimiser
    optimisers = {phase: torch.optim.Adam(members[phase], lr=config.lr) for phase in PHASES}
    return State(0, target, config, base.model, base.encoder, judge, optimisers, [*own, *learnt])


def step(state: State, batch: Tensor | tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
    """The three phases on a minibatch of rows; labels, where there are any, are left aside."""
    config = state.config
    begin_step(state)
    x = _as_rows(state, batch if isinstance(batch, Tensor) else batch[0])
    rate = LearningRate(config.lr, 1, config.schedule).at(min(state.step, config.steps), config.steps)
    log_likelihood = state.model.log_likelihood(x, encode(state, x, generator)).mean()
    norm = _descend(state, "rebuild", -log_likelihood, rate)
    genuine = state.model.prior.sample(len(x), generator).to(x).detach()
    with torch.no_grad():
        forged = encode(state, x, generator)
    judged = 0.5 * (_entropy(state.judge(genuine), True) + _entropy(state.judge(forged), False))
    _descend(state, "judge", judged, config.adversary_rate * rate)
    deceived = _entropy(state.judge(encode(state, x, generator)), True)
    _descend(state, "deceive", deceived, config.adversary_rate * rate)
    values = {"log_likelihood": log_likelihood, "discriminator": judged, "deception": deceived}
    return {name: float(value.detach()) for name, value in values.items()} | {"grad_norm": norm}


def encode(state: State, x: Float[Tensor, "n D"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """A code of each row: the encoder's mean, or a draw of its Gaussian."""
    at = state.encoder(x)
    if state.config.noise == "none":
        mean: Tensor = at.mean
        return mean
    noise = torch.randn(at.mean.shape, generator=generator, dtype=at.mean.dtype).to(at.mean.device)
    drawn: Tensor = at.mean + at.log_sd.exp() * noise
    return drawn


@dataclass(frozen=True)
class AdversarialPosterior:
    """The encoder (LatentPosterior): all draws of a row are the same point unless it is Gaussian."""

    state: State

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k codes a row; `log_weight` is None where the encoder has no density."""
        state = self.state
        x = _as_rows(state, x)
        at = state.encoder(x)
        if state.config.noise == "gaussian":
            return gaussian_draws(state.model, x, at.mean, at.log_sd.exp(), k, generator, weigh)
        return LatentDraws(at.mean.expand(k, -1, -1).clone(), None, at.mean, torch.zeros_like(at.mean))


def posterior(state: State) -> AdversarialPosterior:
    """The encoder as it is now."""
    return AdversarialPosterior(state)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON; the rows are not part of it."""
    tree: dict[str, Any] = {"step": state.step}
    for name in ("encoder", "model", "judge"):
        tree[name] = dict(getattr(state, name).state_dict())
    return tree | {phase + "_optimiser": state.optimisers[phase].state_dict() for phase in PHASES}


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step = tree["step"]
    for name in ("encoder", "model", "judge"):
        getattr(state, name).load_state_dict(tree[name])
    for phase in PHASES:
        state.optimisers[phase].load_state_dict(tree[phase + "_optimiser"])


def _as_rows(state: State, x: Tensor) -> Tensor:
    return x.to(state.parameters[0].device, state.parameters[0].dtype)


def _entropy(logit: Tensor, genuine: bool) -> Tensor:
    """Cross entropy of "drawn from the prior"."""
    return nn.functional.softplus(-logit if genuine else logit).mean()


def _descend(state: State, phase: str, loss: Tensor, rate: float) -> float:
    """A clipped Adam step of the phase's own parameters; a gradient that is not finite is passed over."""
    optimiser = state.optimisers[phase]
    (group,) = optimiser.param_groups
    gradients = torch.autograd.grad(loss, group["params"], allow_unused=True)
    norm = float(nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))
    if not math.isfinite(norm):
        return norm
    share = min(1.0, state.config.clip / (norm + 1e-30))
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = None if gradient is None else gradient * share
    group["lr"] = rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm

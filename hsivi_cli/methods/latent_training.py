"""What Gaussian encoders of latent-variable models have in common: state, bound terms, the Adam step, draws.

VAE, its semi-amortised and importance-weighted kin and GPVAE differ in the loss alone; network, optimiser, noise and
draws are the same ones, so that a difference between two of them is not one of plumbing.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.engine.flat_adam import FlatAdam, flatten
from hsivi_cli.engine.optimisation import LearningRate, ScheduleName
from hsivi_cli.engine.seeds import Stream, generator
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.networks.decoders import ConvTrunk, MlpTrunk, mlp_trunk
from hsivi_cli.networks.random_function import FunctionPrior, Normalise, RandomEncoder
from hsivi_cli.objectives.gpvae_bound import (
    LOG_TWO_PI,
    Moments,
    draw_latent,
    expected_entropy,
    expected_prior_kl,
)
from hsivi_cli.targets.latent import LatentModel, LatentTask

NUMBERS_AT_ONCE = 20_000_000
"""Of decoder outputs; more draws are weighed in several passes."""


@dataclass(frozen=True)
class TrainingConfig:
    """Plain JSON fields. The trunk is `hidden` layers and `features` wide at its end; with `shape` it is convolutional.

    `lr` decays by `schedule` over `steps`; over `kl_warmup` steps the prior's KL gets its weight, and over the share
    `narrow` of the steps a thin prior becomes itself (`targets/latent_priors.Narrowing`); a row has `samples` draws.
    """

    steps: int = 5000
    seed: int = 0
    lr: float = 1e-3
    schedule: ScheduleName = "cosine"
    clip: float = 100.0
    hidden: tuple[int, ...] = (256,)
    features: int = 128
    shape: tuple[int, int, int] | None = None
    normalise: Normalise = "layer"
    kl_warmup: int = 0
    narrow: float = 0.75
    samples: int = 1
    freeze_decoder: bool = False


@dataclass
class State:
    """A run: its own copy of the model, the encoder, and the optimiser of both. `groups` have their own rates."""

    step: int
    task: LatentTask
    config: Any
    model: LatentModel
    encoder: RandomEncoder
    optimiser: FlatAdam
    parameters: list[nn.Parameter]


def make_state(
    task: LatentTask, config: TrainingConfig, mean: FunctionPrior, log_sd: FunctionPrior, q_rate: float = 1.0
) -> State:
    """A fresh run; the encoder's weights depend on `config.seed` alone, q(W) learns `q_rate` times as fast.

    Raises InputError for a shape that the rows do not have, and for numbers out of their range.
    """
    for name, value in (
        ("samples", config.samples),
        ("features", config.features),
        *(("hidden", h) for h in config.hidden),
    ):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be 1 or more")
    if config.clip <= 0 or q_rate <= 0:
        raise InputError(f"clip is {config.clip:g} and q_rate {q_rate:g}: both must be above 0")
    if min(mean.tau, log_sd.tau) <= 0:
        raise InputError(f"tau is {min(mean.tau, log_sd.tau):g}: a prior standard deviation must be above 0")
    columns = task.rows.shape[1]
    begin = generator(config.seed, Stream.INIT)
    trunk: MlpTrunk | ConvTrunk
    if config.shape is None:
        trunk = mlp_trunk(columns, config.hidden, config.features, begin)
    elif math.prod(config.shape) != columns:
        raise InputError(f"images of shape {config.shape} have {math.prod(config.shape)} numbers, the rows {columns}")
    else:
        trunk = ConvTrunk(config.shape, config.features, begin)
    trunk.fit_scales(task.rows)
    model = copy.deepcopy(task.model)
    latent = model.prior.dim
    encoder = RandomEncoder(trunk, config.features, latent, mean, log_sd, begin, config.normalise)
    like = model.like()
    encoder = encoder.to(like.device, like.dtype)
    quick = encoder.q_parameters()
    quick_ids = {id(parameter) for parameter in quick}
    slow = [p for p in encoder.parameters() if p.requires_grad and id(p) not in quick_ids]
    learnt = [] if config.freeze_decoder else [p for p in model.parameters() if p.requires_grad]
    if config.freeze_decoder:
        model.requires_grad_(False)
    parameters = [*slow, *learnt, *quick]
    groups = [([*slow, *learnt], 1.0), (quick, q_rate)]
    return State(0, task, config, model, encoder, FlatAdam([group for group in groups if group[0]]), parameters)


def row_noise(samples: int, at: Moments, generator: torch.Generator) -> Float[Tensor, "3 k n d"]:
    """Noise for equation (8), drawn on the CPU."""
    noise = torch.randn(3, samples, *at.mean.shape, generator=generator, dtype=at.mean.dtype)
    return noise.to(at.mean.device)


def has_normal_prior(model: LatentModel) -> bool:
    """Whether the prior is N(0, I), so that its KL is known in closed form."""
    return getattr(model.prior, "name", "") == "normal"


def bound_terms(
    model: LatentModel, x: Float[Tensor, "n D"], at: Moments, noise: Float[Tensor, "3 k n d"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`E log p(x | z)` from k draws a row, and `E KL(q || p(z))`, in closed form where the prior is N(0, I)."""
    z = draw_latent(at, noise)
    log_likelihood = model.log_likelihood(x, z).mean(0)
    if has_normal_prior(model):
        return log_likelihood, expected_prior_kl(at)
    return log_likelihood, -expected_entropy(at) - model.prior.log_prob(z).mean(0)


def warmed(config: TrainingConfig, step: int) -> float:
    """The weight of the prior's KL in this step."""
    return min(1.0, step / config.kl_warmup) if config.kl_warmup else 1.0


def begin_step(state: Any) -> None:
    """Count the step, and bring a thin prior as far as it should be by now."""
    state.step += 1
    narrow = state.config.narrow * state.config.steps
    state.model.narrow(state.step / narrow if narrow > 0 else 1.0)


def descend(state: State, loss: Tensor) -> float:
    """One Adam step; a gradient that is not finite is passed over. Returns the gradient's norm."""
    config = state.config
    gradients = torch.autograd.grad(loss, state.parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(state.parameters, gradients, strict=True)]
    gradient = flatten(whole)
    norm = float(gradient.norm())
    if math.isfinite(norm):
        rate = LearningRate(config.lr, 1, config.schedule).at(min(state.step, config.steps), config.steps)
        state.optimiser.ascend(gradient * -min(1.0, config.clip / (norm + 1e-30)), rate)
    return norm


@torch.no_grad()
def decay_weights(state: State, parameters: Sequence[nn.Parameter], share: float) -> None:
    """Shrink weight matrices by `share` of this step's learning rate (decoupled decay; Loshchilov & Hutter 2019)."""
    config = state.config
    rate = LearningRate(config.lr, 1, config.schedule).at(min(state.step, config.steps), config.steps)
    for parameter in parameters:
        if parameter.ndim > 1:
            parameter.mul_(1 - rate * share)


def gaussian_log_prob(z: Float[Tensor, "... d"], mean: Tensor, sd: Tensor) -> Float[Tensor, "..."]:
    """Log density of a diagonal Gaussian."""
    return (-0.5 * ((z - mean) / sd) ** 2 - sd.log() - 0.5 * LOG_TWO_PI).sum(-1)


def log_joint(model: LatentModel, x: Float[Tensor, "n D"], z: Float[Tensor, "k n d"]) -> Float[Tensor, "k n"]:
    """`log p(x, z)` in float64, so many draws at a time that the decoder's outputs stay within bounds."""
    many = max(1, NUMBERS_AT_ONCE // max(x.numel(), 1))
    return torch.cat([model.log_joint(x, part) for part in z.split(many)]).double()


def gaussian_draws(
    model: LatentModel,
    x: Float[Tensor, "n D"],
    mean: Tensor,
    sd: Tensor,
    k: int,
    generator: torch.Generator,
    weigh: bool = True,
) -> LatentDraws:
    """k draws a row of `N(mean, sd^2)`, weighed by that same density."""
    noise = torch.randn(k, *mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    z = mean + sd * noise
    if not weigh:
        return LatentDraws(z, None, mean, sd)
    log_q = gaussian_log_prob(z.double(), mean.double(), sd.double())
    return LatentDraws(z, log_joint(model, x, z) - log_q, mean, sd)


def as_rows(state: State, x: Tensor) -> Tensor:
    """Rows in the encoder's type, on its device."""
    parameter = state.parameters[0]
    return x.to(parameter.device, parameter.dtype)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON; the rows are not part of it."""
    return {
        "step": state.step,
        "encoder": dict(state.encoder.state_dict()),
        "model": dict(state.model.state_dict()),
        "optimiser": state.optimiser.state_dict(),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step = tree["step"]
    state.encoder.load_state_dict(tree["encoder"])
    state.model.load_state_dict(tree["model"])
    state.optimiser.load_state_dict(tree["optimiser"])

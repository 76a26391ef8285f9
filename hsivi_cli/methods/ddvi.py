"""DDVI: a diffusion model as the posterior of a latent-variable model (Piriyakulkij et al., arXiv 2401.02739).

Each step has two phases. Wake: the exact auxiliary bound of rows of data (`objectives/ddvi_bound.py`), by estimator (a)
or (b), upwards for decoder, prior and posterior together. Sleep: pairs (z, x) from the model, x sampled, are noised and
the posterior learns to walk them back, which puts mass on every mode; the model gets no gradient. Each phase has an
optimiser of its own. `gamma` multiplies the sleep phase's learning rate: Adam does not see a loss's scale.

With labels (-1: unknown) the classes of the prior are classes of rows, and the posterior is q(k | x) q(z | x, k):
`methods/ddvi_classes.py`. With a `ClusterPrior` the heads of the prior learn along. The public code's recipe, whose
"bound" is none, is `methods/ddvi_paper.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hsivi_cli.bridges.latent_noise import LatentNoise, NoiseName, make_noise
from hsivi_cli.engine.optimisation import LearningRate
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.methods import ddvi_classes
from hsivi_cli.methods.ddvi_draws import Posterior, normals
from hsivi_cli.methods.latent_training import begin_step
from hsivi_cli.networks.decoders import ConvTrunk, MlpTrunk
from hsivi_cli.networks.reverse_diffusion import DiffusionEncoder, MeanKind, ReverseConfig, VarianceKind
from hsivi_cli.objectives.ddvi_bound import pathwise_bound, per_step_bound, sleep_loss, sleep_start, sleep_step
from hsivi_cli.targets.latent import LatentModel, LatentTask

MOST_LOST = 20  # steps in a row without a finite gradient
LABELLED_SHARE = 0.25  # of a minibatch that is drawn here


@dataclass(frozen=True)
class Config:
    """Plain JSON fields.

    The posterior walks T = `times` steps of `schedule`. A step sees `batch` rows, `samples` chains each, and
    `sleep_batch` fantasies (0: as many) at `sleep_times` of the T times each; `gamma` 0 leaves sleep out. `wake` False
    leaves the bound out, and with it the model as it is; `sleep_first` does so for that share of the steps, for priors
    so thin that the bound would start at thousands of nats. Over the share `warm` of steps that follow, what the bound
    charges for latents comes in little by little: a chain that knows nothing of x is a saddle, from which a decoder
    that leaves latents alone is the shortest way. (Not with labels.)

    The trunk has layers of `hidden`, or is convolutional for images of `shape`, and gives `features`; the steps'
    network has `layers` of `width`. The learning rate is `lr` after `warmup` steps and then falls to 0 at `steps`;
    `head_rate` multiplies it for the prior's parameters, `clip` bounds gradients' norms. Labelled rows add
    `class_weight` times the mean cross entropy of their class. `spread` keeps the heads of clusters apart.
    """

    steps: int = 10_000
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 100
    batch: int = 128
    samples: int = 1
    estimator: Literal["a", "b"] = "a"
    times: int = 20
    schedule: NoiseName = "cosine"
    mean: MeanKind = "direct"
    variance: VarianceKind = "learned"
    gamma: float = 1.0
    sleep_batch: int = 0
    sleep_times: int = 4
    sleep_first: float = 0.0
    narrow: float = 0.75
    warm: float = 0.0
    wake: bool = True
    freeze_decoder: bool = False
    hidden: tuple[int, ...] = (256, 256)
    shape: tuple[int, int, int] | None = None
    features: int = 128
    width: int = 128
    layers: int = 4
    head_rate: float = 1.0
    clip: float = 10.0
    class_weight: float = 10.0
    spread: float = 0.0


@dataclass
class State:
    """A run: the model p, the posterior q, an optimiser a phase. `lost` counts steps in a row that were not finite.

    `known` are the indices of labelled rows.
    """

    step: int
    task: LatentTask
    config: Config
    model: LatentModel
    encoder: DiffusionEncoder
    noise: LatentNoise
    wake: torch.optim.Optimizer
    sleep: torch.optim.Optimizer
    lost: int = 0
    known: Tensor | None = None


def init(target: LatentTask, config: Config) -> State:
    """A fresh state; weights depend on `config.seed` alone. The model of `target` is trained in place.

    Raises InputError where labels and the prior's classes do not fit, or a number is out of its range.
    """
    _check(config)
    model, rows = target.model, target.rows
    noise = make_noise(config.schedule, config.times)
    generator = torch.Generator().manual_seed(config.seed)
    classes = 1 if target.labels is None else ddvi_classes.check_labels(target)
    trunk: MlpTrunk | ConvTrunk
    if config.shape is None:
        trunk = MlpTrunk(rows.shape[1], config.hidden, config.features, generator)
    elif math.prod(config.shape) != rows.shape[1]:
        raise InputError(f"images of {config.shape} have {math.prod(config.shape)} numbers, the rows {rows.shape[1]}")
    else:
        trunk = ConvTrunk(config.shape, config.features, generator)
    trunk.fit_scales(rows)
    steps = ReverseConfig(config.width, config.layers, config.mean, config.variance, classes)
    encoder = DiffusionEncoder(trunk, config.features, noise, model.prior.dim, steps, generator)
    like = model.like()
    encoder.to(device=like.device, dtype=like.dtype)
    own = list(encoder.parameters())
    groups = [{"params": own, "scale": 1.0}]
    if not config.freeze_decoder:
        heads = list(model.prior.parameters()) if isinstance(model.prior, nn.Module) else []
        known = {id(parameter) for parameter in heads}
        groups.append({"params": [p for p in model.parameters() if id(p) not in known], "scale": 1.0})
        groups.append({"params": heads, "scale": config.head_rate})
    groups = [group for group in groups if group["params"]]
    # one kernel for all parameters: a step of many small tensors costs what its arithmetic does
    wake = torch.optim.Adam(groups, lr=config.lr, fused=True)
    sleep = torch.optim.Adam(own, lr=config.lr, fused=True)
    labelled = None if target.labels is None else (target.labels >= 0).nonzero()[:, 0]
    return State(0, target, config, model, encoder, noise.to(like), wake, sleep, known=labelled)


def step(state: State, batch: Tensor | Sequence[Tensor] | None, generator: torch.Generator) -> dict[str, float]:
    """One wake and one sleep step, in place; the batch is rows, or rows and labels, or None for a draw of the task's.

    Raises RunError where the gradient stays infinite.
    """
    config = state.config
    begin_step(state)
    rows, labels = _batch(state, batch, generator)
    rate = LearningRate(config.lr, config.warmup, "cosine").at(min(state.step, config.steps), config.steps)
    metrics: dict[str, float] = {}
    if config.wake and state.step > config.sleep_first * config.steps:
        bound, loss = wake_loss(state, rows, labels, generator)
        metrics["elbo"] = float(bound.detach())
        metrics["gradient"] = _descend(state, state.wake, loss, rate)
    if config.gamma > 0:
        loss = asleep_loss(state, config.sleep_batch or len(rows), generator, rows.isnan())
        metrics["sleep"] = float(loss.detach())
        _descend(state, state.sleep, loss, config.gamma * rate)
    return metrics


def wake_loss(
    state: State, rows: Float[Tensor, "b D"], labels: Tensor | None, generator: torch.Generator
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean bound (1) of the rows in nats a row, and what is to be minimised."""
    config = state.config
    if state.encoder.classes > 1:
        bound, penalty = ddvi_classes.wake(state, rows, labels, generator)
        return bound, -bound + config.class_weight * penalty
    share = _warmed(state)
    bounds, rebuilt = chain_bound(state, rows, config.samples, generator)
    bound = bounds.mean()
    loss = -bound if share == 1 else -(share * bound + (1 - share) * rebuilt.mean())
    if config.spread > 0:
        loss = loss + config.spread * ddvi_classes.head_spread(state.model.prior)
    return bound, loss


def _warmed(state: State) -> float:
    """The share of the bound in what is raised; the rest is reconstruction alone."""
    config = state.config
    awake = state.step - config.sleep_first * config.steps
    return min(1.0, awake / (config.warm * config.steps)) if config.warm > 0 else 1.0


def chain_bound(
    state: State, rows: Float[Tensor, "n D"], k: int, generator: torch.Generator
) -> tuple[Float[Tensor, "k n"], Float[Tensor, "k n"]]:
    """Estimator (a) or (b) of the bound (1) at k chains a row, and `log p(x | y_0)`."""
    encoder, n = state.encoder, len(rows)
    encoded = encoder.encode(rows)
    chain = encoder.run(encoded, normals((state.noise.times + 1, k * n, encoder.dim), encoded.start_mean, generator))
    z = chain.z if k == 1 else chain.z.view(k, n, -1)
    rebuilt = state.model.log_likelihood(rows, z)
    log_joint = (rebuilt + state.model.prior.log_prob(z)).reshape(-1)
    form = pathwise_bound if state.config.estimator == "a" else per_step_bound
    return form(log_joint, chain, state.noise).view(k, n), rebuilt.view(k, n)


def asleep_loss(
    state: State, fantasies: int, generator: torch.Generator, missing: Bool[Tensor, "b D"] | None = None
) -> Float[Tensor, ""]:
    """Minus (4) on draws (z, x) of the model, which get no gradient: q(y_T | x), and steps at a few times of each.

    Fantasies lack the numbers that rows of `missing` lack, a row of it each at random.
    """
    config, encoder, noise = state.config, state.encoder, state.noise
    classes = None
    if encoder.classes > 1:
        weights = ddvi_classes.class_log_weights(state.model.prior).detach().exp()
        classes = torch.multinomial(weights, fantasies, replacement=True, generator=generator)
    z, x = state.model.fantasies(fantasies, generator, classes)
    if missing is not None and bool(missing.any()):
        x = x.masked_fill(missing[torch.randint(len(missing), (fantasies,), generator=generator)], math.nan)
    encoded = encoder.encode(x)
    k, d = min(config.sleep_times, noise.times), encoder.dim
    times = stratified_times(noise.times, k, fantasies, generator)
    y = noise.diffuse(z, times, normals((k, fantasies, d), z, generator))
    context, extra = encoded.context, None
    if classes is not None:
        assert encoded.logits is not None
        context = encoder.reverse.with_class(context, classes)
        extra = encoded.logits.log_softmax(1).gather(1, classes[:, None])[:, 0]
    mean, log_sd = encoder.reverse.at(y.view(-1, d), context.repeat(k, 1), times.view(-1))
    steps = sleep_step(z, y, times, mean.view_as(y), log_sd.view_as(y), noise)
    start = sleep_start(z, encoded.start_mean, encoded.start_log_sd, noise)
    return sleep_loss(start, steps, noise, extra)


def stratified_times(times: int, k: int, n: int, generator: torch.Generator) -> Tensor:
    """Times (k, n), each uniform on 1..T, those of one fantasy spread evenly over them."""
    place = torch.rand(n, generator=generator) + torch.arange(k)[:, None]
    return 1 + (place * (times / k)).long().clamp_max(times - 1)


def posterior(state: State) -> Posterior:
    """The posterior as it is now; later steps change it."""
    return Posterior(state)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON."""
    return {
        "step": state.step,
        "lost": state.lost,
        "model": dict(state.model.state_dict()),
        "encoder": dict(state.encoder.state_dict()),
        "wake": state.wake.state_dict(),
        "sleep": state.sleep.state_dict(),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step, state.lost = tree["step"], tree["lost"]
    for name in ("model", "encoder", "wake", "sleep"):
        getattr(state, name).load_state_dict(tree[name])


def _descend(state: State, optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> float:
    """One clipped step of the phase's own parameters; those of the other phase keep their gradients of None."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    size = float(norm)
    if not math.isfinite(size):
        state.lost += 1
        if state.lost > MOST_LOST:
            raise RunError("diverged: the gradient is not finite: use a lower --lr")
        return 0.0
    state.lost = 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if size > state.config.clip:
        torch._foreach_mul_([g for g in gradients if g is not None], state.config.clip / size)
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return size


def _batch(
    state: State, batch: Tensor | Sequence[Tensor] | None, generator: torch.Generator
) -> tuple[Float[Tensor, "b D"], Tensor | None]:
    if batch is None:
        chosen = torch.randint(len(state.task.rows), (state.config.batch,), generator=generator)
        if state.known is not None:  # few labels would hardly ever be seen
            some = torch.randint(
                len(state.known), (math.ceil(LABELLED_SHARE * state.config.batch),), generator=generator
            )
            chosen[: len(some)] = state.known[some]
        return state.task.rows[chosen], None if state.task.labels is None else state.task.labels[chosen]
    if isinstance(batch, Tensor):
        return batch, None
    rows, labels = batch
    return rows, labels


def _check(config: Config) -> None:
    least = {"steps": 1, "batch": 1, "samples": 1, "sleep_times": 1, "features": 1, "width": 1, "layers": 1}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise InputError(f"{name} {getattr(config, name)}: {smallest} or more is needed")
    if config.estimator not in ("a", "b"):
        raise InputError(f'there is no estimator "{config.estimator}" of the bound: choose a or b')
    if not 0 <= config.gamma < math.inf or (config.gamma == 0 and (not config.wake or config.sleep_first > 0)):
        raise InputError(f"gamma {config.gamma}: a positive number, or 0 with the wake phase alone, is needed")
    if not 0 <= config.warm <= 1:
        raise InputError(f"warm {config.warm}: a share of the steps, 0 to 1, is needed")
    if not 0 <= config.sleep_first <= 1:
        raise InputError(f"sleep_first {config.sleep_first}: a share of the steps, 0 to 1, is needed")

"""The recipe of DDVI's public code (arXiv 2401.02739), for comparison with `methods/ddvi.py`: its bound is none.

Three stages, by their share of the steps: a network without x learns the prior's draws; encoder, decoder and that
network learn together (the first version of the paper); a network given c(x) takes its place, the decoder resting for
the first `rest` of that stage, with `repeats` sleep steps each on decoder means. Chains are deterministic but for y_T,
distances are Huber's, reconstruction errors are means over columns, and log p(z) is a kernel estimate
(`objectives/ddvi_paper.py`).
Dropout, which the code leaves on in evaluation, is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain as chained
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from hsivi_cli.bridges.latent_noise import LatentNoise, make_noise
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.networks.decoders import MlpTrunk
from hsivi_cli.networks.reverse_diffusion import ReverseConfig, ReverseDiffusion
from hsivi_cli.objectives.ddvi_paper import (
    KDE_DRAWS,
    consistency_loss,
    ddim_chain,
    log_kernel_density,
    public_elbo,
    standard_kl,
)
from hsivi_cli.targets.latent import LatentModel, LatentTask


@dataclass(frozen=True)
class Config:
    """Plain JSON fields. `kl_weight` is the code's lambda, against errors that are means over columns.

    `first_times` and `times` are T of the second and the third stage, `shares` the stages' shares of the steps.
    """

    steps: int = 20_000
    seed: int = 0
    lr: float = 1e-4
    batch: int = 128
    kl_weight: float = 0.003
    first_kl_weight: float = 0.01
    times: int = 40
    first_times: int = 20
    repeats: int = 3
    shares: tuple[float, float] = (0.2, 0.4)
    rest: float = 0.3
    hidden: tuple[int, ...] = (1000, 1000)
    width: int = 128
    context: int = 2
    bandwidths: tuple[float, ...] = (0.005, 0.008, 0.01, 0.03, 0.05)


class PaperEncoder(nn.Module):
    """q(y_T | x), c(x), and the two noise networks, without and with c(x)."""

    def __init__(self, rows: Tensor, dim: int, noises: Sequence[LatentNoise], config: Config, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        features = config.hidden[-1]
        self.trunk = MlpTrunk(rows.shape[1], config.hidden[:-1], features, generator)
        self.start = nn.Linear(features, 2 * dim)
        nn.init.zeros_(self.start.weight)
        nn.init.zeros_(self.start.bias)
        self.see = MlpTrunk(rows.shape[1], config.hidden, config.context, generator)
        self.trunk.fit_scales(rows)
        self.see.fit_scales(rows)
        nets = ReverseConfig(config.width, mean="raw")
        self.first = ReverseDiffusion(noises[0], dim, 1, nets, generator)
        self.second = ReverseDiffusion(noises[1], dim, config.context, nets, generator)

    def of_x(self) -> Iterator[nn.Parameter]:
        """Parameters of q(y_T | x)."""
        return chained(self.trunk.parameters(), self.start.parameters())

    def of_chain(self) -> Iterator[nn.Parameter]:
        """Parameters of c(x) and the network given it."""
        return chained(self.see.parameters(), self.second.parameters())


@dataclass
class State:
    """A run. `draws` (10,000, d) of the prior make its kernel estimate."""

    step: int
    task: LatentTask
    config: Config
    model: LatentModel
    encoder: PaperEncoder
    noises: tuple[LatentNoise, LatentNoise]
    optimisers: dict[str, torch.optim.Optimizer]
    draws: Float[Tensor, "n d"]


def init(target: LatentTask, config: Config) -> State:
    """A fresh state. Raises InputError for cluster priors, and for shares above 1."""
    model = target.model
    if isinstance(model.prior, nn.Module):
        raise InputError("--paper is for fixed priors: leave --clusters out")
    if min(config.shares) < 0 or sum(config.shares) > 1:
        raise InputError(f"--paper: shares {config.shares} of the steps do not fit into 1")
    noises = make_noise("unscaled", config.first_times), make_noise("unscaled", config.times)
    encoder = PaperEncoder(target.rows, model.prior.dim, noises, config, config.seed)
    like = model.like()
    encoder.to(device=like.device, dtype=like.dtype)
    groups = {
        "prior": (list(encoder.first.parameters()), 1e-3),
        "joint": ([*encoder.of_x(), *encoder.first.parameters(), *model.parameters()], config.lr),
        "encoder": ([*encoder.of_x(), *encoder.of_chain()], config.lr),
        "decoder": (list(model.parameters()), config.lr),
        "sleep": (list(encoder.of_chain()), config.lr),
    }
    optimisers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam(parameters, lr=rate, fused=True) for name, (parameters, rate) in groups.items()
    }
    draws = model.prior.sample(KDE_DRAWS, torch.Generator().manual_seed(config.seed)).to(like)
    both = noises[0].to(like), noises[1].to(like)
    return State(0, target, config, model, encoder, both, optimisers, draws)


def step(state: State, batch: Tensor | Sequence[Tensor] | None, generator: torch.Generator) -> dict[str, float]:
    """One step of the stage that it belongs to, in place; labels are passed over."""
    config = state.config
    state.step += 1
    if batch is None:
        rows = state.task.rows[torch.randint(len(state.task.rows), (config.batch,), generator=generator)]
    else:
        rows = batch if isinstance(batch, Tensor) else batch[0]
    stage = _stage(config, state.step)
    if stage == "prior":
        loss = _prior_loss(state, len(rows), generator)
        _descend(loss, state.optimisers["prior"])
        return {"sleep": float(loss.detach())}
    first = stage == "first"
    states, mean, log_sd = _chain(state, rows, first, generator)
    kl = standard_kl(mean, log_sd).mean()
    error = _reconstruction(state, rows, states[0])
    if first:
        loss = error + config.first_kl_weight * kl + _prior_loss(state, len(rows), generator)
        _descend(loss, state.optimisers["joint"])
        return {"reconstruction": float(error.detach()), "loss": float(loss.detach())}
    log_prior = log_kernel_density(states[0], state.draws, config.bandwidths).mean()
    times = torch.randint(1, config.times + 1, (len(rows),), generator=generator)
    loss = error + config.kl_weight * (kl - log_prior) + consistency_loss(states, times, state.noises[1])
    moving = ["encoder"] if stage == "rest" else ["encoder", "decoder"]
    _descend(loss, *(state.optimisers[name] for name in moving))
    for _ in range(config.repeats):
        asleep = _sleep_loss(state, len(rows), generator)
        _descend(asleep, state.optimisers["sleep"])
    metrics = {"reconstruction": float(error.detach()), "loss": float(loss.detach())}
    return metrics | ({"sleep": float(asleep.detach())} if config.repeats else {})


@dataclass(frozen=True)
class Posterior:
    """Draws of the deterministic chains, a push-forward of q(y_T | x): there is no density, and no weight."""

    state: State
    is_bound: bool = False

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k draws a row, without weights."""
        rows = x.to(self.state.model.like())
        z = torch.stack([_chain(self.state, rows, self._early, generator)[0][0] for _ in range(k)])
        return LatentDraws(z, None, z.mean(0), z.std(0, correction=min(1, k - 1)))

    @torch.no_grad()
    def pseudo_elbo(self, x: Float[Tensor, "n D"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """What the code reports as ELBO, sums put right, at one chain a row. Not a bound: it may exceed log p(x)."""
        state, rows = self.state, x.to(self.state.model.like())
        states, mean, log_sd = _chain(state, rows, self._early, generator)
        log_prior = log_kernel_density(states[0], state.draws, state.config.bandwidths)
        noise = state.noises[0 if self._early else 1]
        return public_elbo(state.model.log_likelihood(rows, states[0]), log_prior, mean, log_sd, states, noise)

    @property
    def _early(self) -> bool:
        return _stage(self.state.config, self.state.step) in ("prior", "first")


def posterior(state: State) -> Posterior:
    """The posterior as it is now."""
    return Posterior(state)


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON; the prior's draws are made again from the seed."""
    tree: dict[str, Any] = {"step": state.step, "model": dict(state.model.state_dict())}
    tree["optimisers"] = {name: optimiser.state_dict() for name, optimiser in state.optimisers.items()}
    return tree | {"encoder": dict(state.encoder.state_dict())}


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step = tree["step"]
    state.model.load_state_dict(tree["model"])
    state.encoder.load_state_dict(tree["encoder"])
    for name, optimiser in state.optimisers.items():
        optimiser.load_state_dict(tree["optimisers"][name])


def _stage(config: Config, step: int) -> str:
    """Which stage step 1, 2, ... belongs to: prior, first, rest (the decoder's) or all."""
    first = sum(config.shares)
    ends = {"prior": config.shares[0], "first": first, "rest": first + config.rest * (1 - first)}
    return next((name for name, end in ends.items() if step <= round(end * config.steps)), "all")


def _chain(
    state: State, rows: Tensor, first: bool, generator: torch.Generator
) -> tuple[Float[Tensor, "T+1 n d"], Tensor, Tensor]:
    """States of one deterministic chain a row, and mean and log sd of q(y_T | x)."""
    encoder = state.encoder
    mean, log_sd = encoder.start(encoder.trunk(rows)).chunk(2, 1)
    start = torch.addcmul(mean, log_sd.exp(), torch.randn(mean.shape, generator=generator, dtype=mean.dtype))
    net = encoder.first if first else encoder.second
    kernel = net.kernel(net.context(_nothing(rows) if first else encoder.see(rows)))
    return ddim_chain(start, lambda t, y: kernel(t, y)[0], state.noises[0 if first else 1]), mean, log_sd


def _prior_loss(state: State, n: int, generator: torch.Generator) -> Float[Tensor, ""]:
    """Noise of noised prior draws, predicted without x."""
    z = state.model.prior.sample(n, generator).to(state.draws)
    return _noise_loss(state.encoder.first, state.noises[0], z, _nothing(z), generator)


def _sleep_loss(state: State, n: int, generator: torch.Generator) -> Float[Tensor, ""]:
    """Noise of noised prior draws, given c of the decoder's mean."""
    z = state.model.prior.sample(n, generator).to(state.draws)
    with torch.no_grad():
        x = state.model.reconstruct(z)
    return _noise_loss(state.encoder.second, state.noises[1], z, state.encoder.see(x), generator)


def _noise_loss(
    net: ReverseDiffusion, noise: LatentNoise, z: Tensor, features: Tensor, generator: torch.Generator
) -> Float[Tensor, ""]:
    times = torch.randint(1, noise.times + 1, (len(z),), generator=generator)
    eps = torch.randn(z.shape, generator=generator, dtype=z.dtype)
    found, _ = net.at(noise.diffuse(z, times, eps), net.context(features), times)
    return smooth_l1_loss(found, eps)


def _reconstruction(state: State, rows: Tensor, z: Tensor) -> Float[Tensor, ""]:
    """Squared error of Gaussian rows, else minus the log likelihood, a column."""
    if state.model.likelihood.name == "gaussian":
        return (rows - state.model.reconstruct(z)).square().nanmean()
    return -state.model.log_likelihood(rows, z).mean() / rows.shape[1]


def _nothing(rows: Tensor) -> Tensor:
    return rows.new_zeros(len(rows), 1)


def _descend(loss: Tensor, *optimisers: torch.optim.Optimizer) -> None:
    """The gradient of the optimisers' own parameters, and a step of each."""
    parameters = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

"""`--method gpvae`: a VAE whose encoder is a random function (Kim & Pavlovic 2021, arXiv 2102.03151; Kim, CVPR 2022).

Mean and log sd of q(z | x, f, g) are Gaussian processes on the encoder's features, their posterior is learnt in weight
space, and the bound has their uncertainty integrated out. A draw costs one pass; its weight is by the marginal over
functions that it was drawn from. The paper's body was not at hand: this is its abstract and a derivation, whose
equations the tests check.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.methods import latent_training
from hsivi_cli.methods.latent_training import (
    State,
    TrainingConfig,
    begin_step,
    bound_terms,
    descend,
    gaussian_draws,
    gaussian_log_prob,
    log_joint,
    make_state,
    row_noise,
    warmed,
)
from hsivi_cli.networks.random_function import Covariance, FunctionPrior
from hsivi_cli.objectives.gpvae_bound import Moments, expected_variance, loss_per_row
from hsivi_cli.targets.latent import LatentTask

COMPONENTS = 16
"""Draws of g whose mixture a row's draws come from under the density "mixture"."""
NONE = FunctionPrior(covariance="none")

state_dict, load_state_dict = latent_training.state_dict, latent_training.load_state_dict


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Plain JSON fields.

    `functions`: "f", the mean alone is random, or "f+g", mean and log sd. `mean_function`: an ordinary linear head is
    the prior mean and only deviations from it are random; without it the weights themselves carry the mean, and their
    KL shrinks them. `kappa` tempers the weights' KL (1 is the bound). For the first `warm_start` steps the encoder is
    an ordinary one. q(W) learns `q_rate` times as fast as the rest. `density`: the marginal that draws come from and
    are weighed by, where g is random: the Gaussian of the same mean and variance, the Gaussian with g at its mean, or
    a mixture over draws of g.
    """

    functions: Literal["f", "f+g"] = "f"
    covariance: Covariance = "diagonal"
    mean_function: bool = True
    tau_mean: float = 0.3
    tau_log_sd: float = 0.1
    learn_tau: bool = False
    kappa: float = 1.0
    warm_start: int = 0
    q_rate: float = 10.0
    density: Literal["matched", "plug-in", "mixture"] = "matched"


def init(target: LatentTask, config: Config) -> State:
    """A fresh run on a copy of the target's model. Raises InputError for numbers out of their range."""
    if config.kappa < 0:
        raise InputError(f"kappa is {config.kappa:g}: the weight of the weights' KL cannot be below 0")
    mean = FunctionPrior(config.covariance, config.tau_mean, config.mean_function, config.learn_tau)
    log_sd = FunctionPrior(config.covariance, config.tau_log_sd, config.mean_function, config.learn_tau)
    return make_state(target, config, mean, log_sd if config.functions == "f+g" else NONE, config.q_rate)


def step(state: State, batch: Tensor | tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
    """One Adam step on the bound (5) per row; labels, where there are any, are left aside.

    `bound` is the bound itself; `elbo` leaves the weights' KL out, and is the ELBO given the functions, not that of
    the marginal that draws come from. `novelty` is the mean of v over the variance of q(z | x, f, g).
    """
    config: Config = state.config
    begin_step(state)
    x = latent_training.as_rows(state, batch if isinstance(batch, Tensor) else batch[0])
    at = state.encoder(x)
    warm = state.step <= config.warm_start
    if warm:
        at = Moments(at.mean, at.log_sd, torch.zeros_like(at.v), torch.zeros_like(at.s))
    log_likelihood, prior_kl = bound_terms(state.model, x, at, row_noise(config.samples, at, generator))
    weight_kl = torch.zeros(()) if warm else state.encoder.weight_kl()
    rows = len(state.task.rows)
    loss = loss_per_row(log_likelihood, warmed(config, state.step) * prior_kl, weight_kl, rows, config.kappa)
    elbo = float((log_likelihood - prior_kl).mean().detach())
    metrics = {
        "bound": elbo - float(weight_kl.detach()) / rows,
        "elbo": elbo,
        "prior_kl": float(prior_kl.mean().detach()),
        "weight_kl": float(weight_kl.detach()),
        "novelty": float((at.v / expected_variance(at)).mean().detach()),
    }
    metrics["grad_norm"] = descend(state, loss)
    return metrics


@dataclass(frozen=True)
class Uncertainty:
    """Of the posterior approximation itself, a row: the variances of its mean and of its log sd over functions.

    `novelty` is the mean over coordinates of `v / E e^{2 g}`, in a linear model the leverage of the row's features.
    `mean_sd`, the root of the mean of v, is in units of the latents. It tells noise from rows where novelty does not:
    far away the encoder's own spread may grow faster than v (on MNIST novelty called noise the most certain of all).
    """

    v: Float[Tensor, "n d"]
    s: Float[Tensor, "n d"]
    novelty: Float[Tensor, " n"]

    @property
    def mean_sd(self) -> Float[Tensor, " n"]:
        """Standard deviation of the row's mean over functions."""
        return self.v.mean(-1).sqrt()


@dataclass(frozen=True)
class RandomFunctionPosterior:
    """q(z | x) with the functions integrated out, in a single pass of the encoder."""

    state: State

    @torch.no_grad()
    def moments(self, x: Float[Tensor, "n D"]) -> Moments:
        """What the encoder says of each row."""
        return self.state.encoder(latent_training.as_rows(self.state, x))

    def uncertainty(self, x: Float[Tensor, "n D"]) -> Uncertainty:
        """How unsure the approximation is of itself."""
        at = self.moments(x)
        return Uncertainty(at.v, at.s, (at.v / expected_variance(at)).mean(-1))

    def marginal_sd(self, at: Moments) -> Float[Tensor, "n d"]:
        """Standard deviation of the Gaussian marginal: exact for a g that is not random, else by `config.density`."""
        variance = (2 * at.log_sd).exp() if self.state.config.density == "plug-in" else expected_variance(at)
        return (at.v + variance).sqrt()

    @torch.no_grad()
    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k draws a row, weighed by the very density they come from: each weight's mean is p(x)."""
        state = self.state
        x = latent_training.as_rows(state, x)
        at = state.encoder(x)
        sd = self.marginal_sd(at)
        if state.config.density != "mixture" or state.config.functions == "f":
            return gaussian_draws(state.model, x, at.mean, sd, k, generator, weigh)
        # given these g, z is a draw of their mixture; so the weight is unbiased whichever g they were
        many = (COMPONENTS, *at.mean.shape)
        g = at.log_sd + at.s.sqrt() * torch.randn(many, generator=generator, dtype=sd.dtype).to(sd)
        sds = (at.v + (2 * g).exp()).sqrt()
        chosen = torch.randint(COMPONENTS, (k, len(x)), generator=generator).to(sd.device)
        noise = torch.randn(k, *at.mean.shape, generator=generator, dtype=sd.dtype).to(sd)
        z = at.mean + sds[chosen, torch.arange(len(x), device=sd.device)] * noise
        if not weigh:
            return LatentDraws(z, None, at.mean, sd)
        log_q = torch.stack([gaussian_log_prob(z.double(), at.mean.double(), one) for one in sds.double()])
        log_weight = log_joint(state.model, x, z) - (log_q.logsumexp(0) - math.log(COMPONENTS))
        return LatentDraws(z, log_weight, at.mean, sd)


def posterior(state: State) -> RandomFunctionPosterior:
    """The encoder as it is now."""
    return RandomFunctionPosterior(state)

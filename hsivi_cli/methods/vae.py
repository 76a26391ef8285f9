"""`--method vae`: the amortised Gaussian VAE and the variations that a random encoder has to beat.

ELBO (Kingma & Welling 2014) or importance-weighted bound (Burda et al. 2016, arXiv 1509.00519) of `samples` draws;
decoupled weight decay on the encoder, dropout on its features; SVI steps from the encoder's answer, at test time or in
training too (Kim et al. 2018, arXiv 1802.02550). Trunk, norm and heads are those of `gpvae`, whose limit it is.
"""

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
    decay_weights,
    descend,
    gaussian_draws,
    gaussian_log_prob,
    make_state,
    row_noise,
    warmed,
)
from hsivi_cli.methods.semi_amortised import Bound, SviConfig, refine
from hsivi_cli.networks.random_function import FunctionPrior
from hsivi_cli.objectives.gpvae_bound import Moments, draw_latent
from hsivi_cli.objectives.vae_bounds import importance_weighted_bound
from hsivi_cli.targets.latent import LatentModel, LatentTask

PLAIN = FunctionPrior(covariance="none")

state_dict, load_state_dict = latent_training.state_dict, latent_training.load_state_dict


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Plain JSON fields.

    `svi_train`: "none"; "detached", where the decoder learns at the refined posterior and the encoder by its own ELBO;
    "through", SA-VAE, where the refined ELBO is differentiated through the `svi_steps`. `svi_test_steps` refine every
    draw's posterior; None is as many as in training. The other `svi_` fields are those of `SviConfig`.
    """

    objective: Literal["elbo", "iwae"] = "elbo"
    weight_decay: float = 0.0
    dropout: float = 0.0
    svi_train: Literal["none", "detached", "through"] = "none"
    svi_steps: int = 20
    svi_lr: float = 0.5
    svi_rule: Literal["natural", "sgd"] = "natural"
    svi_samples: int = 1
    svi_test_steps: int | None = None

    def svi(self, testing: bool) -> SviConfig:
        """The refinement in training, or before a draw."""
        steps = self.svi_steps
        if testing:
            steps = steps if self.svi_train != "none" else 0
            steps = steps if self.svi_test_steps is None else self.svi_test_steps
        return SviConfig(steps, self.svi_lr, self.svi_rule, samples=self.svi_samples)


def init(target: LatentTask, config: Config) -> State:
    """A fresh run on a copy of the target's model. Raises InputError for numbers out of their range."""
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout is {config.dropout:g}: it is a share from 0 to below 1")
    if config.weight_decay < 0 or config.svi_lr <= 0:
        raise InputError(
            f"weight_decay is {config.weight_decay:g} and svi_lr {config.svi_lr:g}: the first must be 0 or more, the "
            "second above 0"
        )
    if min(config.svi_steps, config.svi_test_steps or 0, config.svi_samples - 1) < 0:
        raise InputError("svi_steps and svi_test_steps must be 0 or more, svi_samples 1 or more")
    if config.objective == "iwae" and config.svi_train != "none":
        raise InputError("SVI steps in training go with the ELBO, not with the importance-weighted bound: choose one")
    return make_state(target, config, PLAIN, PLAIN)


def step(state: State, batch: Tensor | tuple[Tensor, Tensor], generator: torch.Generator) -> dict[str, float]:
    """One Adam step on a minibatch of rows; labels, where there are any, are left aside."""
    config: Config = state.config
    begin_step(state)
    x = latent_training.as_rows(state, batch if isinstance(batch, Tensor) else batch[0])
    at = state.encoder(x, _mask(state, len(x), generator))
    if config.objective == "iwae":
        loss = -_importance_weighted(state, x, at, generator).mean()
        metrics = {"bound": -float(loss.detach())}
    elif config.svi_train == "none":
        loss, metrics = _elbo_loss(state, x, at, generator)
    else:
        loss, metrics = _refined_loss(state, x, at, generator)
    metrics["grad_norm"] = descend(state, loss)
    if config.weight_decay:
        decay_weights(state, list(state.encoder.parameters()), config.weight_decay)
    return metrics


def _elbo_loss(state: State, x: Tensor, at: Moments, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    noise = row_noise(state.config.samples, at, generator)
    log_likelihood, prior_kl = (term.mean() for term in bound_terms(state.model, x, at, noise))
    loss = warmed(state.config, state.step) * prior_kl - log_likelihood
    metrics = {"elbo": float((log_likelihood - prior_kl).detach()), "prior_kl": float(prior_kl.detach())}
    return loss, metrics


def _importance_weighted(state: State, x: Tensor, at: Moments, generator: torch.Generator) -> Float[Tensor, " n"]:
    z = draw_latent(at, row_noise(state.config.samples, at, generator))
    log_q = gaussian_log_prob(z, at.mean, at.log_sd.exp())
    return importance_weighted_bound(state.model.log_joint(x, z) - log_q)


def _refined_loss(state: State, x: Tensor, at: Moments, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    svi, through = state.config.svi(testing=False), state.config.svi_train == "through"
    bound = row_bound(state.model, x, svi.samples, generator)
    refined = refine(bound, at.mean, at.log_sd, svi, create_graph=through)
    # the encoder's own ELBO is for the encoder: to it the decoder is a constant
    learns = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    for parameter in learns:
        parameter.requires_grad_(False)
    with torch.set_grad_enabled(not through):
        before = bound(at.mean, at.log_sd).mean()
    for parameter in learns:
        parameter.requires_grad_(True)
    after = bound(*refined).mean()
    loss = -after if through else -after - before
    return loss, {"elbo": float(after.detach()), "elbo_before_svi": float(before.detach())}


def row_bound(model: LatentModel, x: Float[Tensor, "n D"], samples: int, generator: torch.Generator) -> Bound:
    """The ELBO of each row as a function of its mean and log sd, with fresh noise at each call."""

    def bound(mean: Tensor, log_sd: Tensor) -> Tensor:
        at = Moments(mean, log_sd, torch.zeros_like(mean), torch.zeros_like(mean))
        log_likelihood, prior_kl = bound_terms(model, x, at, row_noise(samples, at, generator))
        return log_likelihood - prior_kl

    return bound


def _mask(state: State, rows: int, generator: torch.Generator) -> Float[Tensor, "n p"] | None:
    share = state.config.dropout
    if not share:
        return None
    kept = torch.rand(rows, state.encoder.norm.width, generator=generator) >= share
    return (kept / (1 - share)).to(state.parameters[0])


@dataclass(frozen=True)
class GaussianPosterior:
    """`q(z | x) = N(mean, sd^2)`, after the SVI steps that the run asks for."""

    state: State

    def moments(self, x: Float[Tensor, "n D"], generator: torch.Generator) -> Moments:
        """Mean and log sd of each row; the generator serves the SVI steps alone."""
        state = self.state
        config: Config = state.config
        x = latent_training.as_rows(state, x)
        with torch.no_grad():
            at = state.encoder(x)
        svi = config.svi(testing=True)
        if not svi.steps:
            return at
        mean, log_sd = refine(row_bound(state.model, x, svi.samples, generator), at.mean, at.log_sd, svi)
        return Moments(mean, log_sd, at.v, at.s)

    def draw(self, x: Float[Tensor, "n D"], k: int, generator: torch.Generator, weigh: bool = True) -> LatentDraws:
        """k draws a row with their unbiased weights `p(x, z) / q(z | x)`."""
        at = self.moments(x, generator)
        x = latent_training.as_rows(self.state, x)
        with torch.no_grad():
            return gaussian_draws(self.state.model, x, at.mean, at.log_sd.exp(), k, generator, weigh)


def posterior(state: State) -> GaussianPosterior:
    """The encoder as it is now."""
    return GaussianPosterior(state)

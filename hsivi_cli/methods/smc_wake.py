"""`--method smc-wake`, one observation: a density fitted to the particles of likelihood-tempered SMC, by inclusive KL.

SMC-Wake (McNamara, Loper, Regier 2024, arXiv 2403.10610), by default its estimator (a): ascend `sum_m P_m sum_k w_k log
q(z_k)` over all runs m so far, each with the share `P_m` of its evidence. No draw of q takes part in making what q
learns from, so that it cannot narrow itself; it covers all of the posterior that the samplers have found. Draws carry
exact weights.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hsivi_cli.engine.flat_adam import FlatAdam, flatten
from hsivi_cli.engine.optimisation import LearningRate
from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods import meta_samplers
from hsivi_cli.methods.meta_samplers import Estimator, MetaSamplers, StoreConfig
from hsivi_cli.methods.smc_posterior import MOVES, require_mass, tempering_target
from hsivi_cli.networks.posterior_encoder import Encoder, EncoderConfig, build_encoder
from hsivi_cli.targets.density import Density, find_parts
from hsivi_cli.transitions.likelihood_smc import SmcConfig, SmcRun, run_smc

ONE = torch.zeros(1, dtype=torch.int64)  # the only observation
ELBO_EVERY, ELBO_DRAWS = 10, 64
FLOOR = -1e9  # the ELBO that is shown where q has draws that are impossible: it is minus infinity


@dataclass(frozen=True)
class Config:
    """Plain JSON fields. `runs` samplers of `particles` begin; one more joins every `refresh_every` steps.

    A step sees `draws` particles of all runs, drawn in proportion to their part in the estimator.
    """

    steps: int = 1500
    seed: int = 0
    lr: float = 1e-2
    family: Literal["mixture", "nsf", "gaussian", "maf"] = "mixture"
    runs: int = 8
    particles: int = 500
    refresh_every: int = 250
    draws: int = 256
    estimator: Estimator = "a"


@dataclass
class State:
    """A run: the encoder, its optimiser, the SMC runs, and the ELBO measured last."""

    step: int
    density: Density
    config: Config
    encoder: Encoder
    optimiser: FlatAdam
    store: MetaSamplers
    elbo: float = FLOOR


def init(density: Density, config: Config) -> State:
    """A fresh state; the first samplers run in the first step. Raises InputError for a density without a prior."""
    find_parts(density)
    encoder = build_encoder(EncoderConfig(family=config.family), density.dim, seed=config.seed)
    optimiser = FlatAdam([(list(encoder.parameters()), 1.0)])
    keep = StoreConfig(estimator=config.estimator, refresh_every=config.refresh_every)
    store = meta_samplers.make_store(keep, 1, config.particles, density.dim)
    return State(0, density, config, encoder, optimiser, store)


def step(state: State, batch: None, generator: torch.Generator) -> dict[str, float]:
    """One Adam step on estimator (a); in the first one the samplers run, and the encoder is scaled to their particles.

    Raises InputError where no prior draw has a positive likelihood.
    """
    config = state.config
    state.step += 1
    if state.step == 1:
        _begin(state, generator)
    else:
        target, smc = tempering_target(state.density), _smc(config)
        meta_samplers.advance(state.store, target, smc, state.step, generator)
    particles = meta_samplers.minibatch(state.store, ONE, generator, config.draws)
    log_q = state.encoder.log_prob(particles.z.flatten(1, 2)).reshape(particles.z.shape[:3])
    loss = meta_samplers.estimator_loss(config.estimator, log_q, particles)
    parameters = list(state.encoder.parameters())
    gradient = flatten(torch.autograd.grad(-loss, parameters))
    usable = bool(gradient.isfinite().all())
    if usable:
        rate = LearningRate(config.lr, 1, "cosine").at(min(state.step, config.steps), config.steps)
        state.optimiser.ascend(gradient * min(1.0, 10.0 / (float(gradient.norm()) + 1e-300)), rate)
    if state.step % ELBO_EVERY == 1 or state.step == config.steps:
        noise = torch.randn(1, ELBO_DRAWS, state.encoder.noise_dim, generator=generator, dtype=torch.float64)
        elbo = float(_weigh(state, noise).mean())
        state.elbo = elbo if math.isfinite(elbo) else FLOOR
    inclusive = float(loss.detach())
    return {"elbo": state.elbo, "cross_entropy": inclusive if math.isfinite(inclusive) else -FLOOR}


def _begin(state: State, generator: torch.Generator) -> None:
    config, density = state.config, state.density
    run = run_smc(tempering_target(density), config.runs, _smc(config), generator)
    require_mass(run, density)
    for row in range(config.runs):
        meta_samplers.append(state.store, ONE, _only(run, torch.tensor([row])), 0, generator)
    z = meta_samplers.minibatch(state.store, ONE, generator, config.runs * config.particles).z[0, 0]
    state.encoder.fit_scales(z.double())


def _only(run: SmcRun, rows: Int[Tensor, " r"]) -> SmcRun:
    return replace(run, z=run.z[rows], log_weight=run.log_weight[rows], log_z=run.log_z[rows])


def _smc(config: Config) -> SmcConfig:
    return SmcConfig(particles=config.particles, moves=MOVES)


@torch.no_grad()
def _weigh(state: State, noise: Tensor) -> Tensor:
    return _draws(state, noise).log_weight  # type: ignore[return-value]


def _draws(state: State, noise: Tensor) -> Draws:
    z = state.encoder.sample(noise)
    log_approx = state.encoder.log_prob(z, precise=True)[0]
    log_prob = state.density.log_prob(z[0])
    log_prob = torch.where(log_prob.isnan(), -math.inf, log_prob)
    return Draws(z[0], log_prob, log_prob - log_approx, log_approx)


@torch.no_grad()
def sample(state: State, noise: NoiseStreams) -> Draws:
    """One draw of the encoder a noise stream, with its exact importance weight."""
    return _draws(state, noise.draw((state.encoder.noise_dim,)).double()[None])


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON; the density is not part of it."""
    return {
        "step": state.step,
        "elbo": state.elbo,
        "encoder": dict(state.encoder.state_dict()),
        "optimiser": state.optimiser.state_dict(),
        "store": meta_samplers.state_dict(state.store),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step, state.elbo = tree["step"], tree["elbo"]
    state.encoder.load_state_dict(tree["encoder"])
    state.optimiser.load_state_dict(tree["optimiser"])
    meta_samplers.load_state_dict(state.store, tree["store"])

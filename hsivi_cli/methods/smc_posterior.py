"""`--method smc`: draws and evidence by likelihood-tempered SMC from the prior; nothing is trained.

Several samplers that share nothing run as one tensor program (`transitions.likelihood_smc`). Each counts by its
evidence, which makes the mixture exact in the limit of many samplers as well as of many particles; their disagreement
is what the draws are judged by.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.refine import Refined, affordable_particles
from hsivi_cli.targets.density import Density, find_parts
from hsivi_cli.transitions.cloud import Agreement, agreement
from hsivi_cli.transitions.likelihood_smc import SmcConfig, SmcRun, run_smc
from hsivi_cli.transitions.particle_moves import PriorLikelihood
from hsivi_cli.transitions.tempering import effective_sample_size, log_mean_exp, stratified_resample

SAMPLERS = 16
FEWEST, MOST = 250, 1000  # particles of a sampler
MOVES = 5
ALIVE = 10.0  # effective particles below which next to none of the prior's draws was possible


def tempering_target(density: Density) -> PriorLikelihood:
    """The density as samplers that all have the same observation want it; raises InputError without a prior."""
    parts, d = find_parts(density), density.dim

    def flat(function: object, z: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        found: Tensor = function(z.reshape(-1, d))  # type: ignore[operator]
        return found.reshape(z.shape[:-1])

    target = PriorLikelihood(
        d,
        parts.sample_prior,
        lambda z: flat(parts.log_prior, z),
        lambda z: flat(parts.log_likelihood, z),
        take=lambda rows: target,
    )
    return target


def particles_for(density: Density, draws: int) -> int:
    """Particles of each sampler: as many as the draws ask for, within what a run of seconds can afford."""
    most = affordable_particles(density, SAMPLERS * FEWEST, SAMPLERS * MOST) // SAMPLERS
    return max(FEWEST, min(most, math.ceil(draws / SAMPLERS)))


def draw_smc(
    density: Density, draws: int, seed: int, samplers: int = SAMPLERS, particles: int | None = None
) -> Refined:
    """`draws` equally weighted draws and the log evidence, with its standard error from the spread of the samplers.

    The effective draws are those that the samplers' agreement amounts to, less what uneven evidences cost. Raises
    InputError without a prior to draw from, and where no prior draw has a positive likelihood.
    """
    target = tempering_target(density)
    config = SmcConfig(particles=particles or particles_for(density, draws), moves=MOVES)
    generator = torch.Generator().manual_seed(seed)
    run = run_smc(target, samplers, config, generator)
    require_mass(run, density)
    log_z = float(log_mean_exp(run.log_z))
    spread = (run.log_z - run.log_z.max()).exp()
    found, share = _agreement(run, generator), float(effective_sample_size(run.log_z)) / samplers
    log_weight = (run.log_weight + run.log_z[:, None]).flatten()
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    # in random order: the first draws are as good a sample as all
    rows = stratified_resample(log_weight, uniform)[torch.randperm(draws, generator=generator)]
    note = ""
    if float(run.least_ess.median()) < ALIVE:
        note = f"only {float(run.least_ess.median()):.1f} of the {config.particles} prior draws of a sampler explain "
        note += "the data: narrow the prior to where it means something"
    log_prob = run.log_prior + run.log_likelihood
    se = float(spread.std() / spread.mean() / math.sqrt(samplers))
    last = run.acceptance.gather(1, (run.stages - 1)[:, None])
    return Refined(
        draws=Draws(
            run.z.flatten(0, 1)[rows],
            log_prob.flatten()[rows],
            note=f"{samplers} samplers of {config.particles} particles, tempered from the prior",
        ),
        log_z=log_z,
        log_z_se=se,
        smc_log_z=log_z,
        smc_log_z_se=se,
        r_hat=found.r_hat,
        ess=found.ess * share,
        memory=None,
        acceptance=float(last.nanmean()),
        divergences=0,
        temperatures=tuple(run.temperatures[int(run.stages.argmax()), 1:].tolist()),
        moves=MOVES * int(run.stages.max()),
        gradients=run.evaluations // (samplers * config.particles),
        particles=samplers * config.particles,
        converged=not note,
        note=note,
    )


def require_mass(run: SmcRun, density: Density) -> None:
    """Raise InputError where no draw from the prior has a positive likelihood, in any sampler."""
    if not bool((run.log_z > -math.inf).any()):
        raise InputError(
            f"{density.name}: the prior has no mass where the data need it: none of {run.log_weight.numel()} draws "
            "from it has a positive likelihood (log Z is -inf)"
        )


def _agreement(run: SmcRun, generator: torch.Generator) -> Agreement:
    """Between the samplers that live, in the coordinates of all of them, their squares and the log density."""
    rows = (run.log_z > -math.inf).nonzero()[:, 0]
    if len(rows) < 2:
        return Agreement(math.inf, 1.0)
    uniform = torch.rand(len(rows), run.z.shape[1], generator=generator, dtype=torch.float64)
    index = stratified_resample(run.log_weight[rows], uniform)
    z = run.z[rows].gather(1, index[..., None].expand(-1, -1, run.z.shape[2])).flatten(0, 1)
    log_prob = (run.log_prior + run.log_likelihood)[rows].gather(1, index).flatten()
    # asinh: a few far draws must not hide all the others
    v = ((z - z.mean(0)) / z.std(0).clamp_min(1e-300)).asinh()
    return agreement([torch.cat([v, v**2, log_prob[:, None]], 1)], len(rows))

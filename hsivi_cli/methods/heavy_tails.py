"""A multivariate Student t around a fitted Gaussian: importance weights stay bounded where the posterior's tails are
heavier than a Gaussian's, as those of every regression with an unknown scale are."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.errors import RunError
from hsivi_cli.evaluation.pareto import Smoothed, smooth_weights
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.gaussian_vi import GaussianFit
from hsivi_cli.targets.density import Density

DEGREES = (0, 50, 20, 8, 4, 2, 1)  # 0: the Gaussian itself
FEW_DEGREES = (0, 8, 4)  # where the data are so many that draws are dear, and the posterior nearly Gaussian
SAFE = 0.4  # a k-hat that other draws will not lift above 0.5
UNUSABLE = 0.7
NEAR = 30.0  # standard deviations along a coordinate, where its tail has begun
MOST_AXES = 100
WIDE = (3, 3.0)  # degrees and scale of a probe for mass where no proposal looks


@dataclass(frozen=True)
class Pilot:
    """Draws of one proposal and their weights; `probe` marks the wide one, which is no candidate to draw from."""

    degrees: int
    draws: Draws
    weights: Smoothed
    probe: bool = False


@dataclass(frozen=True)
class Exploration:
    """What pilots around a Gaussian say of it: the `start` to go on with, widened where mass was `missed`, the best
    proposal, whether the variance seems infinite (`heavy`), and `least_log_z`, what the log evidence surely exceeds
    (the largest estimate less 3 standard errors).
    """

    start: GaussianFit
    chosen: Pilot
    missed: bool
    heavy: bool
    least_log_z: float


def explore(density: Density, start: GaussianFit, count: int, seed: int, choices: tuple[int, ...]) -> Exploration:
    """Draw `count` from each proposal and compare. Raises RunError if the density is finite at no draw."""
    seeds = itertools.count(seed)
    with torch.no_grad():
        pilots = run_pilots(density, start, lambda: NoiseStreams(next(seeds), range(count)), choices)
        heavy = infinite_variance(pilots) or heavy_axis(density, start)
    if not any(not pilot.probe for pilot in pilots):
        raise RunError(f"the log density of {density.name} is finite at none of the draws around its fit")
    chosen = best_degrees(pilots)
    missed = contradiction(chosen, pilots)
    least = max(pilot.weights.log_z - 3 * pilot.weights.log_z_se for pilot in pilots)
    return Exploration(start if missed is None else widened(start, missed), chosen, missed is not None, heavy, least)


def student_t_draws(density: Density, start: GaussianFit, degrees: int, noise: NoiseStreams) -> Draws:
    """One draw a noise stream from `location + scale_tril t`, t multivariate Student with `degrees` of freedom (0: a
    Gaussian), with exact importance weights."""
    dim = density.dim
    normals = noise.draw((dim + degrees,)).double()
    u, scale = normals[:, :dim], normals.new_ones(len(normals), 1)
    if degrees:
        scale = (normals[:, dim:].square().mean(1, keepdim=True)).rsqrt()
    z = start.draw(u * scale)
    log_prob, log_approx = density.log_prob(z), student_t_log_prob(start, degrees, (u * scale).square().sum(1))
    name = f"Student t({degrees}) around the full-rank Gaussian" if degrees else "full-rank Gaussian"
    return Draws(z, log_prob, log_prob - log_approx, log_approx, name)


def student_t_log_prob(start: GaussianFit, degrees: int, squares: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Log density at points whose whitened squared distance from the location is `squares`."""
    dim = len(start.location)
    log_det = start.scale_tril.diagonal().log().sum()
    if not degrees:
        return -0.5 * squares - log_det - 0.5 * dim * math.log(2 * math.pi)
    half = 0.5 * (degrees + dim)
    constant = math.lgamma(half) - math.lgamma(0.5 * degrees) - 0.5 * dim * math.log(degrees * math.pi)
    return constant - log_det - half * (squares / degrees).log1p()


def run_pilots(
    density: Density,
    start: GaussianFit,
    noise: Callable[[], NoiseStreams],
    choices: tuple[int, ...] = DEGREES,
) -> list[Pilot]:
    """One pilot for each of the degrees in `choices`, and last the wide probe; `noise()` gives fresh streams."""
    wide = replace(start, scale_tril=start.scale_tril * WIDE[1])
    found = []
    for degrees, base in [*((degrees, start) for degrees in choices), (WIDE[0], wide)]:
        draws = student_t_draws(density, base, degrees, noise())
        assert draws.log_weight is not None
        if bool((draws.log_weight > -math.inf).any()):
            found.append(Pilot(degrees, draws, smooth_weights(draws.log_weight), probe=base is wide))
    return found


def best_degrees(pilots: list[Pilot]) -> Pilot:
    """Of the pilots but the wide probe, the one with the most even weights among those with a safe tail; where none is
    safe, the one with the best tail."""
    own = [pilot for pilot in pilots if not pilot.probe]
    safe = [pilot for pilot in own if pilot.weights.khat < SAFE]
    if safe:
        return max(safe, key=lambda pilot: pilot.weights.ess)
    return min(own, key=lambda pilot: pilot.weights.khat)


def contradiction(chosen: Pilot, pilots: list[Pilot]) -> Pilot | None:
    """A pilot with heavier tails that found what `chosen` has not: more evidence than the errors of both allow, or
    weights out of hand, which heavier tails alone can only tame. None if there is none."""
    for pilot in pilots:
        heavier = pilot.probe or (pilot.degrees and (not chosen.degrees or pilot.degrees < chosen.degrees))
        if not heavier:
            continue
        error = math.hypot(pilot.weights.log_z_se, chosen.weights.log_z_se)
        more = pilot.weights.log_z - chosen.weights.log_z > 4 * error + 0.05
        doubt = (1 + pilot.weights.khat) / math.sqrt(3 * math.sqrt(pilot.weights.n))  # k-hat's own error, from its tail
        wild = pilot.weights.khat - doubt > UNUSABLE and pilot.weights.ess > 20 and not pilot.probe
        if more or wild:
            return pilot
    return None


def infinite_variance(pilots: list[Pilot]) -> bool:
    """Whether the posterior's tails seem to fall no faster than a t's with 2 degrees of freedom.

    Against a t(4) the weights at distance r of a tail of index nu grow as r^(4 - nu): those of the farthest draws are
    then larger than the average one. (k-hat would not do: in many dimensions the two disagree everywhere.)
    """
    for pilot in pilots:
        if not pilot.probe and pilot.degrees == 4 and pilot.draws.log_approx is not None:
            farthest = pilot.draws.log_approx.argsort()[: max(10, pilot.weights.n // 200)]
            weight = pilot.weights.log_weight.exp()
            return float(weight[farthest].mean()) > float(weight.mean())
    return False


def heavy_axis(density: Density, start: GaussianFit) -> bool:
    """Whether the density falls no faster along some coordinate, the others fixed, than a t with 2 degrees of freedom.

    Between distances r and 10 r such a log density falls by less than 3 log 10; one heavy coordinate among many light
    ones cannot be seen by weights in the joint distance.
    """
    spread = start.scale_tril.square().sum(1).sqrt()
    axes = spread.diag()[:MOST_AXES]
    rays = torch.cat([axes, -axes])
    near, far = (density.log_prob(start.location + distance * rays) for distance in (NEAR, 10 * NEAR))
    falls = near - far
    return bool((falls.isfinite() & (falls < 3 * math.log(10))).any())


def widened(start: GaussianFit, pilot: Pilot) -> GaussianFit:
    """A Gaussian with the moments of a pilot's weighted draws, on top of the spread of the start."""
    weight = pilot.weights.log_weight.exp()
    mean = weight @ pilot.draws.z
    centred = pilot.draws.z - mean
    covariance = start.scale_tril @ start.scale_tril.T + (weight[:, None] * centred).T @ centred
    return replace(start, location=mean, scale_tril=torch.linalg.cholesky(covariance))

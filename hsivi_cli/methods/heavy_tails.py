"""A multivariate Student t around a fitted Gaussian: importance weights stay bounded where the posterior's tails are
heavier than a Gaussian's, as those of every regression with an unknown scale are."""

import math
from collections.abc import Callable

from jaxtyping import Float64
from torch import Tensor

from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.evaluation.pareto import Smoothed
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.gaussian_vi import GaussianFit
from hsivi_cli.targets.density import Density

DEGREES = (0, 50, 20, 8, 4)  # 0: the Gaussian itself
SAFE = 0.4  # a k-hat that other draws will not lift above 0.5


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


def best_degrees(weigh: Callable[[int], Smoothed]) -> tuple[int, Smoothed]:
    """The degrees of freedom whose pilot weights are the most even among those with a safe tail, or of the best tail.

    `weigh(degrees)` gives the weights of a pilot.
    """
    pilots: dict[int, Smoothed] = {}
    for degrees in DEGREES:
        pilots[degrees] = weigh(degrees)
        if pilots[degrees].khat < 0:  # no tail to speak of: nothing to gain
            break
    safe = {degrees: pilot for degrees, pilot in pilots.items() if pilot.khat < SAFE}
    if safe:
        best = max(safe, key=lambda degrees: safe[degrees].ess)
    else:
        best = min(pilots, key=lambda degrees: pilots[degrees].khat)
    return best, pilots[best]

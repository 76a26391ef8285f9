"""Gaussian variational inference: mean-field or full-rank, by stochastic gradients or on fixed quasi-random draws.

`q = N(location, scale_tril scale_tril^T)` maximises the ELBO `E log p(z) - log q(z)`. As a method (`--method vi`) it
takes Adam steps on "sticking the landing" gradients (Roeder et al. 2017, arXiv 1703.09194), whose noise vanishes where
q is exact. `fit_gaussian` is the quick way in: L-BFGS on a fixed set of moment-matched Sobol draws (a sample-average
approximation, Giordano et al. 2024, arXiv 2304.05527), exact for a Gaussian target. Both work in coordinates that the
Gaussian at the mode has whitened, so that units and scales do not matter.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.engine.optimisation import LearningRate, ScheduleName, update_ema
from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.io.draws import Draws
from hsivi_cli.methods.laplace import Mode, find_mode, require_proper
from hsivi_cli.methods.variational_newton import variational_newton
from hsivi_cli.targets.density import Density
from hsivi_cli.targets.whiten import Affine

Covariance = Literal["mean-field", "full-rank"]

TRUSTED = 1.0  # nats between the ELBO and Laplace's log Z that need no second start
FULL_RANK_MOST = 100  # dimensions up to which `fit_gaussian` climbs in every entry of the factor
NEWTON_FROM = 30  # dimensions from which it takes Newton steps instead, where Hessians are cheap


@dataclass(frozen=True)
class Config:
    """A run of `vi`. `batch` counts draws a step, half of them antithetic; `average` is the decay of the averages.

    `from_mode` starts at the mode with its curvature; otherwise at N(0, I) (or at `density.initial`).
    """

    steps: int = 2000
    seed: int = 0
    covariance: Covariance = "full-rank"
    batch: int = 32
    lr: float = 0.02
    lr_schedule: ScheduleName = "cosine"
    average: float = 0.99
    from_mode: bool = True


@dataclass(frozen=True)
class GaussianFit:
    """A fitted Gaussian, and its ELBO with standard error, from draws that did not take part in the fit."""

    location: Float64[Tensor, " d"]
    scale_tril: Float64[Tensor, "d d"]
    elbo: float
    elbo_se: float
    covariance: Covariance

    def log_prob(self, z: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log density of the Gaussian."""
        return gaussian_log_prob(z, self.location, self.scale_tril)

    def draw(self, u: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Draws from standard normals `u`."""
        return self.location + u @ self.scale_tril.T


@dataclass
class State:
    """Parameters relative to the base: `z = base(shift + factor u)`, `factor` unit lower triangular plus a positive
    diagonal `exp(log_diagonal)`; `average_*` are their moving averages, which draws are made from."""

    step: int
    density: Density
    config: Config
    base: Affine
    parameters: list[Tensor]
    averages: list[Tensor]
    optimiser: torch.optim.Optimizer


def gaussian_log_prob(
    z: Float[Tensor, "n d"], location: Float[Tensor, " d"], scale_tril: Float[Tensor, "d d"]
) -> Float[Tensor, " n"]:
    """Log density of `N(location, scale_tril scale_tril^T)`."""
    u = Affine(location, scale_tril).inverse(z)
    return -0.5 * (u**2).sum(-1) - scale_tril.diagonal().log().sum() - 0.5 * len(location) * math.log(2 * math.pi)


def fit_gaussian(
    density: Density,
    covariance: Covariance = "full-rank",
    start: Mode | None = None,
    seed: int = 0,
    draws: int | None = None,
) -> GaussianFit:
    """Maximise the ELBO on fixed draws from the Gaussian at the mode on; deterministic, a second or so for d <= 50.

    The draws (default: at least 256 and 8 d, mirrored, and transformed to mean 0 and covariance I exactly) make the
    result exact when the target is Gaussian. Full rank in many dimensions takes Newton steps on the natural parameters
    (`methods.variational_newton`). Raises InputError if the posterior is improper.
    """
    mode = find_mode(density) if start is None else start
    require_proper(mode, density)
    least = NEWTON_FROM if density.linearise is not None else FULL_RANK_MOST
    if covariance == "full-rank" and density.dim > least:
        bases = [_base(density, mode, covariance)]
        if mode.kind == "mode":
            bases.append(_base(density, None, covariance))
        u = moment_matched_normals(draws or max(256, 2 * density.dim), density.dim, seed)
        return _checked(density, variational_newton(density, bases, u, seed), covariance, seed)
    fit = _fit_from(density, covariance, _base(density, mode, covariance), seed, draws)
    if mode.kind == "mode" and abs(fit.elbo - mode.log_z) < TRUSTED:
        return fit
    # the highest point need not be where the mass is (funnels): see what can be had without it
    other = _fit_from(density, covariance, _base(density, None, covariance), seed, draws)
    return other if other.elbo > fit.elbo or not math.isfinite(fit.elbo) else fit


def _fit_from(density: Density, covariance: Covariance, base: Affine, seed: int, draws: int | None) -> GaussianFit:
    """The best Gaussian that L-BFGS finds from `base`, and its ELBO on fresh draws."""
    dim = density.dim
    few = dim <= FULL_RANK_MOST
    full = covariance == "full-rank" and few
    # moments are matched exactly by 2 d draws; more are needed where each pair of coordinates has a parameter
    u = moment_matched_normals(draws or max(256, (8 if few else 2) * dim), dim, seed)
    return _checked(density, _compose(base, *_maximise(density, base, u, full)), covariance, seed)


def _checked(density: Density, fitted: Affine, covariance: Covariance, seed: int) -> GaussianFit:
    """The fit with its ELBO on fresh draws; `fitted.scale` is a (d, d) factor."""
    dim = density.dim
    fresh = moment_matched_normals(max(512, 2 * dim), dim, seed + 1)
    z = fitted.forward(fresh)
    with torch.no_grad():
        gap = density.log_prob(z) - gaussian_log_prob(z, fitted.location, fitted.scale)
    elbo, elbo_se = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    return GaussianFit(fitted.location, fitted.scale, elbo, elbo_se, covariance)


def moment_matched_normals(n: int, dim: int, seed: int) -> Float64[Tensor, "n d"]:
    """Quasi-random standard normals in mirrored pairs, with mean 0 and covariance I exactly (n is made even).

    Needs at least `2 dim` draws.
    """
    from scipy.stats import qmc

    pairs = max((n + 1) // 2, dim)
    exponent = math.ceil(math.log2(pairs))
    sobol = qmc.Sobol(dim, scramble=True, rng=np.random.default_rng(seed)).random_base2(exponent)
    half = torch.special.ndtri(torch.from_numpy(sobol[:pairs]).clamp(1e-12, 1 - 1e-12))
    chol = torch.linalg.cholesky(half.T @ half / pairs)
    half = torch.linalg.solve_triangular(chol, half.T, upper=False).T
    return torch.cat([half, -half])


def _maximise(density: Density, base: Affine, u: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS on the sample average; returns shift, log_diagonal and the strictly lower part of the factor."""
    import scipy.optimize

    dim = density.dim
    below = torch.tril_indices(dim, dim, -1) if full else torch.zeros(2, 0, dtype=torch.long)

    def unpack(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lower = torch.zeros(dim, dim, dtype=torch.float64)
        lower[below[0], below[1]] = x[2 * dim :]
        return x[:dim], x[dim : 2 * dim], lower

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        shift, log_diagonal, lower = unpack(torch.from_numpy(x.copy()))
        inner = shift + u * log_diagonal.exp()
        z = base.forward(inner + u @ lower.T if full else inner)
        with torch.no_grad():
            heights, gradient = density.value_and_gradient(z)
            value = -float(heights.mean() + log_diagonal.sum())
            pulled = base.pull_back(gradient)
        if not (math.isfinite(value) and bool(pulled.isfinite().all())):
            return 1e100, np.zeros_like(x)
        d_log = (pulled * u).mean(0) * log_diagonal.exp() + 1
        d_below = (pulled.T @ u / len(u))[below[0], below[1]] if full else d_log[:0]
        return value, -torch.cat([pulled.mean(0), d_log, d_below]).numpy()

    x = np.zeros(2 * dim + below.shape[1])
    for _ in range(40):  # a Gaussian too wide for the target: narrower until every draw is inside
        if loss(x)[0] < 1e99:
            break
        x[dim : 2 * dim] -= math.log(2)
    options = {"maxiter": 200, "maxcor": 20, "gtol": 1e-4, "ftol": 1e-10}
    found = scipy.optimize.minimize(loss, x, jac=True, method="L-BFGS-B", options=options)
    best = found.x if found.fun < 1e99 else x
    return unpack(torch.from_numpy(best))


def _base(density: Density, mode: Mode | None, covariance: Covariance) -> Affine:
    """Coordinates to work in: the Gaussian at the mode, its best mean-field one, or N(initial, I) without a mode."""
    if mode is None or mode.kind != "mode":
        zero = torch.zeros(density.dim, dtype=torch.float64)
        location = zero if density.initial is None else density.initial.double()
        return Affine(location, torch.ones_like(zero))
    if covariance == "mean-field":
        return Affine(mode.location, mode.precision.diagonal().rsqrt())
    return Affine(mode.location, mode.scale_tril)


def _compose(base: Affine, shift: Tensor, log_diagonal: Tensor, lower: Tensor) -> Affine:
    """`base` after `shift + factor u` as one affine map with a lower-triangular scale (d, d)."""
    factor = lower.tril(-1) + log_diagonal.exp().diag()
    scale = base.scale[:, None] * factor if base.scale.ndim == 1 else base.scale @ factor
    return Affine(base.forward(shift[None])[0], scale)


def init(density: Density, config: Config) -> State:
    """Start at the Gaussian of the mode; raises InputError if the posterior is improper."""
    if config.batch < 2 or config.steps < 1:
        raise InputError("vi needs at least 1 step and 2 draws a step")
    mode = find_mode(density, seed=config.seed) if config.from_mode else None
    if mode is not None:
        require_proper(mode, density)
    base = _base(density, mode, config.covariance)
    sizes: list[tuple[int, ...]] = [(density.dim,), (density.dim,)]
    if config.covariance == "full-rank":
        sizes.append((density.dim, density.dim))
    parameters = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    optimiser = torch.optim.Adam(parameters, config.lr)
    return State(0, density, config, base, parameters, [p.clone() for p in parameters], optimiser)


@torch.no_grad()
def step(state: State, batch: Tensor | None, generator: torch.Generator) -> dict[str, float]:
    """One Adam step; `elbo` is this step's estimate at the parameters before it. Raises RunError if it diverges."""
    config, density = state.config, state.density
    state.step += 1
    half = torch.randn((config.batch + 1) // 2, density.dim, generator=generator, dtype=torch.float64)
    u = torch.cat([half, -half])
    shift, log_diagonal, lower = _unpacked(state.parameters)
    fitted = _compose(state.base, shift, log_diagonal, lower)
    z = fitted.forward(u)
    elbo = density.log_prob(z) - gaussian_log_prob(z, fitted.location, fitted.scale)
    possible = elbo > -math.inf  # one draw of density zero among many must not end a run
    if not bool(possible.any()):
        raise RunError("diverged: the density is zero at every draw; use a lower --lr")
    # sticking the landing: the path derivative of log p - log q, with grad log q(z) = -scale^-T u
    factor = lower.tril(-1) + log_diagonal.exp().diag()
    pulled = state.base.pull_back(density.gradient(z)) + torch.linalg.solve_triangular(factor.T, u.T, upper=True).T
    elbo, pulled, u = elbo[possible], pulled[possible], u[possible]
    d_factor = pulled.T @ u / len(u)
    gradients = [pulled.mean(0), d_factor.diagonal() * log_diagonal.exp(), d_factor.tril(-1)]
    for parameter, gradient in zip(state.parameters, gradients, strict=False):
        parameter.grad = -gradient
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in state.parameters if p.grad is not None))
    if not (math.isfinite(norm) and math.isfinite(float(elbo.mean()))):
        raise RunError("diverged: the ELBO is not finite; use a lower --lr")
    rate = LearningRate(config.lr, 1, config.lr_schedule).at(state.step, config.steps)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.step()
    update_ema(state.averages, state.parameters, state.step, config.average)
    return {"elbo": float(elbo.mean()), "grad_norm": norm, "lr": rate}


def _unpacked(parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    shift, log_diagonal = parameters[:2]
    dim = len(shift)
    return shift, log_diagonal, parameters[2] if len(parameters) > 2 else shift.new_zeros(dim, dim)


def fitted_gaussian(state: State) -> Affine:
    """The averaged Gaussian: its location (d,) and lower-triangular scale (d, d)."""
    return _compose(state.base, *_unpacked(state.averages))


@torch.no_grad()
def sample(state: State, noise: NoiseStreams) -> Draws:
    """One draw a noise stream from the averaged Gaussian, with exact importance weights."""
    fitted = fitted_gaussian(state)
    z = fitted.forward(noise.draw((state.density.dim,)).double())
    log_prob = state.density.log_prob(z)
    log_approx = gaussian_log_prob(z, fitted.location, fitted.scale)
    return Draws(z, log_prob, log_prob - log_approx, log_approx, f"{state.config.covariance} Gaussian")


def state_dict(state: State) -> dict[str, Any]:
    """Tensors and plain JSON of a run; the density is not part of it."""
    return {
        "step": state.step,
        "base_location": state.base.location,
        "base_scale": state.base.scale,
        "parameters": state.parameters,
        "averages": state.averages,
        "optimiser": state.optimiser.state_dict(),
    }


def load_state_dict(state: State, tree: dict[str, Any]) -> None:
    """Restore a run, in place."""
    state.step = tree["step"]
    state.base = Affine(tree["base_location"], tree["base_scale"])
    for mine, saved in ((state.parameters, tree["parameters"]), (state.averages, tree["averages"])):
        for parameter, value in zip(mine, saved, strict=True):
            parameter.copy_(value)
    state.optimiser.load_state_dict(tree["optimiser"])

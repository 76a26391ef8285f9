"""From a density to draws that one can judge: a Gaussian start, a method in whitened coordinates, weights, refinement.

`--method auto` trains nothing: it draws from the full-rank Gaussian of the start, with tails as heavy as they must be,
and corrects by importance weights where they are good; otherwise it tempers from there to the target by SMC with HMC
moves. Every other method is trained, and its draws are corrected in the same two ways.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.engine import loop
from hsivi_cli.engine.seeds import NoiseStreams
from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.pareto import Smoothed, resample, smooth_weights
from hsivi_cli.io.draws import Draws
from hsivi_cli.io.run_directory import METRICS, checkpoints
from hsivi_cli.methods import langevin_vi
from hsivi_cli.methods.gaussian_start import find_start, raw_start
from hsivi_cli.methods.gaussian_vi import GaussianFit
from hsivi_cli.methods.heavy_tails import DEGREES, FEW_DEGREES, explore, student_t_draws
from hsivi_cli.methods.posterior_registry import POSTERIOR_METHODS, FitOptions, check_options
from hsivi_cli.methods.refine import OnProgress, Refined, affordable_particles, refine, tempered_smc
from hsivi_cli.methods.smc_posterior import SAMPLERS, draw_smc, particles_for
from hsivi_cli.targets.density import Density, column_names, find_parts, flatten_values
from hsivi_cli.targets.whiten import whiten

GOOD_KHAT, USABLE_KHAT = 0.5, 0.7  # Vehtari et al. 2024: reliable below, and usable up to
ENOUGH = 0.25  # effective share of the pilot's draws below which auto tempers
STAGE_LR = 0.01  # of the published stage 1
LEAST_PILOT, PILOT = 600, 2000
SUMMARY_DRAWS = 16_000  # Monte Carlo error of a 5 % quantile: about 0.02 sd
CHEAP = 20_000_000  # responses times draws that are evaluated without a second thought, in a few dimensions
STATES = 4  # of the cloud after a tempered run: more draws would take more than the run itself
NEVER = 2**62  # a step takes milliseconds: checkpoints come by the clock and at the end
AUTO = "gaussian"  # the start itself, untrained
SMC = "smc"  # from the prior: no start, and nothing to train either
FROM_PRIOR = (SMC, "smc-wake")  # these need no Gaussian start, and temper from the prior
MOST_WALKS = 8  # raw draws a final one, at most, to make up for uneven weights
# what chooses (pilots) and what is given out must not share random numbers: the choice would flatter its own draws
DRAW_SEED, SECOND_SEED, PILOT_SEED, STAGE_SEED = 0x5EED, 0x2ED00000, 0x71107000000, 0x57A6E000000000


@dataclass
class Fit:
    """A fitted approximation: `method` on `white`, the density in the coordinates of the Gaussian `start`.

    `route` says how draws are corrected: "weights", "hmc" or "smc". `modes` counts the modes that were found,
    `degrees` are those of the Student t that `auto` draws from (0: the Gaussian),
    `pilot` what the weights of the method's own first draws say, `missed` whether heavier tails found more mass,
    `heavy` whether the posterior's variance seems infinite, `least_log_z` what the log evidence surely exceeds.
    """

    density: Density
    options: FitOptions
    method: str
    start: GaussianFit
    state: Any
    route: str = "weights"
    modes: int = 1
    degrees: int = 0
    pilot: Smoothed | None = None
    missed: bool = False
    heavy: bool = False
    least_log_z: float = -math.inf
    trace: list[tuple[int, float]] = field(default_factory=list)

    @property
    def module(self) -> Any:
        """The method's module, with the verbs of `engine.contract`; the start itself has none."""
        return POSTERIOR_METHODS[self.method].module


@dataclass(frozen=True)
class Posterior:
    """Equally weighted draws of the named quantities, and the evidence for them.

    `values` has shape (n, p), a column a scalar; `weighted` are the raw draws (N, p) that `weights` belong to, where
    the n were resampled from them; `log_approx` and `log_prob` are in the unconstrained coordinates.
    `weights` are the raw draws' (None without), `refined` what moves did; `ess` is the number of independent draws
    these n are worth.
    """

    columns: tuple[str, ...]
    values: Float64[Tensor, "n p"]
    weighted: Float64[Tensor, "N p"] | None
    z: Float64[Tensor, "n d"]
    log_prob: Float64[Tensor, " n"]
    log_approx: Float64[Tensor, " n"] | None
    ess: float
    weights: Smoothed | None
    refined: Refined | None
    route: str
    note: str


def fit_posterior(
    density: Density,
    options: FitOptions,
    directory: Path,
    on_log: Callable[[dict[str, Any]], None] = lambda record: None,
    resume: bool = False,
) -> Fit:
    """Fit by the method that the options name; training writes its log and checkpoint into `directory`.

    Raises InputError for options that mean nothing or an improper posterior, RunError where training diverges.
    """
    check_options(options)
    if options.method == SMC:
        find_parts(density)  # refuses a density without a prior
        return Fit(density, options, SMC, raw_start(density.dim), None, route="smc")
    method = AUTO if options.method == "auto" else options.method
    if options.paper or method in FROM_PRIOR:
        fit = _init(density, options, method, raw_start(density.dim))
    else:
        start, modes = find_start(density, options.seed)
        count = affordable_draws(density, LEAST_PILOT, PILOT)
        choices = DEGREES if count > LEAST_PILOT else FEW_DEGREES
        found = explore(density, start, count, options.seed ^ PILOT_SEED, choices)
        # several modes are spanned already; they are tempered between anyhow
        fit = _init(density, options, method, found.start if modes == 1 else start)
        fit.modes, fit.missed = modes, found.missed and modes == 1
        fit.heavy, fit.least_log_z = found.heavy, found.least_log_z
        if method == AUTO:
            fit.degrees, fit.pilot = found.chosen.degrees, found.chosen.weights
    if method != AUTO:
        resume = resume and bool(checkpoints(directory))
        if options.paper and fit.module is langevin_vi and not resume:
            fit.state = _published_state(fit, on_log)
        _train(fit, directory, on_log, resume)
        fit.pilot = _weights(_raw(fit, PILOT, options.seed, PILOT_SEED))
    fit.route = _route(fit)
    return fit


def draw_posterior(fit: Fit, n: int, seed: int, on_progress: OnProgress = lambda progress: None) -> Posterior:
    """n draws by the fit's route; `seed` names them, other seeds give independent ones."""
    if fit.route == "smc" and fit.method in FROM_PRIOR:
        return _moved(fit, "smc", draw_smc(fit.density, n, seed), None)
    if fit.route == "smc":
        return _tempered(fit, n, seed, on_progress)
    raw = _raw(fit, n, seed)
    weights = _weights(raw)
    if fit.route == "hmc":
        refined = refine(fit.density, raw, seed, on_progress=on_progress)
        return _moved(fit, "hmc", refined, weights)
    share = max(weights.ess / n, 1 / MOST_WALKS)
    if share < 0.9:
        raw = _raw(fit, math.ceil(n / share), seed, SECOND_SEED)
        weights = _weights(raw)
    if fit.options.method == "auto" and fit.options.refine == "auto" and weights.khat > GOOD_KHAT:
        return _tempered(fit, n, seed, on_progress)  # the pilot was luckier than these draws
    rows = resample(weights.log_weight, n, torch.Generator().manual_seed(seed))
    columns, weighted = named_values(fit.density, raw.z)
    return Posterior(
        columns=columns,
        values=weighted[rows],
        weighted=weighted,
        z=raw.z[rows],
        log_prob=raw.log_prob[rows],
        log_approx=None if raw.log_approx is None else raw.log_approx[rows],
        ess=min(weights.ess, float(n)),
        weights=weights,
        refined=None,
        route="weights",
        note=raw.note,
    )


def _tempered(fit: Fit, n: int, seed: int, on_progress: OnProgress) -> Posterior:
    particles = min(max(n, 1000), affordable_particles(fit.density))
    refined = tempered_smc(fit.density, fit.start, particles, seed, draws=n, on_progress=on_progress)
    return _moved(fit, "smc", refined, None)


def summary_draws(fit: Fit, least: int) -> int:
    """How many draws a summary rests on: more than were asked for, where they cost no more than the fit."""
    if fit.route == "smc" and fit.method in FROM_PRIOR:
        return max(least, SAMPLERS * particles_for(fit.density, SUMMARY_DRAWS))
    most = SUMMARY_DRAWS if fit.route == "weights" else STATES * affordable_particles(fit.density)
    return max(least, affordable_draws(fit.density, 0, min(most, SUMMARY_DRAWS)))


def affordable_draws(density: Density, least: int, most: int) -> int:
    """As many draws as are evaluated in a moment: fewer where the data or the dimensions are many.

    Does not measure time, so that a seed always means the same.
    """
    return max(least, min(most, int(CHEAP / (density.responses * (1 + density.dim / 40)))))


def state_tree(fit: Fit) -> dict[str, Any]:
    """Everything that `restore` needs but the density: tensors and plain JSON."""
    return {
        "method": fit.method,
        "route": fit.route,
        "modes": fit.modes,
        "degrees": fit.degrees,
        "heavy": fit.heavy,
        "missed": fit.missed,
        "least_log_z": fit.least_log_z if math.isfinite(fit.least_log_z) else None,
        "location": fit.start.location,
        "scale_tril": fit.start.scale_tril,
        "start_elbo": [fit.start.elbo, fit.start.elbo_se],
        "state": {} if fit.method in (AUTO, SMC) else fit.module.state_dict(fit.state),
        "trace": [list(point) for point in fit.trace],
        "pilot": None if fit.pilot is None else {"log_weight": fit.pilot.log_weight, **_figures(fit.pilot)},
    }


def _figures(weights: Smoothed) -> dict[str, Any]:
    return {f.name: getattr(weights, f.name) for f in fields(weights) if f.name != "log_weight"}


def restore(density: Density, options: FitOptions, tree: dict[str, Any]) -> Fit:
    """The fit that `state_tree` came from, on the same density."""
    elbo, elbo_se = tree["start_elbo"]
    start = GaussianFit(tree["location"], tree["scale_tril"], elbo, elbo_se, "full-rank")
    fit = _init(density, options, tree["method"], start)
    if fit.method not in (AUTO, SMC):
        fit.module.load_state_dict(fit.state, tree["state"])
    fit.route, fit.modes, fit.degrees = tree["route"], tree["modes"], tree["degrees"]
    fit.heavy, fit.missed = tree["heavy"], tree["missed"]
    fit.least_log_z = -math.inf if tree["least_log_z"] is None else tree["least_log_z"]
    fit.pilot = None if tree["pilot"] is None else Smoothed(**tree["pilot"])
    fit.trace = [(int(step), float(value)) for step, value in tree["trace"]]
    return fit


def _init(density: Density, options: FitOptions, method: str, start: GaussianFit) -> Fit:
    if method in (AUTO, SMC):
        return Fit(density, options, method, start, None)
    entry = POSTERIOR_METHODS[method]
    target = _white(density, start) if entry.whitened else density
    return Fit(density, options, method, start, entry.module.init(target, entry.configure(options, target)))


def _white(density: Density, start: GaussianFit) -> Density:
    white = whiten(density, start.location, start.scale_tril)
    return replace(white, initial=None)  # the start is the origin now


def _train(fit: Fit, directory: Path, on_log: Callable[[dict[str, Any]], None], resume: bool) -> None:
    steps = fit.state.config.steps
    directory.mkdir(parents=True, exist_ok=True)
    if resume:
        loop.resume(fit.module, fit.state, directory)
    else:
        for path in (directory / METRICS, *checkpoints(directory)):
            path.unlink(missing_ok=True)

    def log(record: dict[str, Any]) -> None:
        fit.trace.append((record["step"], record["elbo"]))
        on_log(record | {"method": fit.method, "steps": steps})

    config = loop.LoopConfig(steps, fit.options.seed, _log_every(steps), NEVER)
    if stopped := loop.run_loop(fit.module, fit.state, config, directory, loop.Hooks(log)):
        raise stopped("interrupted after the last step; checkpoint written, go on with --resume")


def _log_every(steps: int) -> int:
    return max(1, steps // 100)


def _published_state(fit: Fit, on_log: Callable[[dict[str, Any]], None]) -> Any:
    """A fresh state whose q has been fitted first, for as many steps (Geffner & Domke 2023, stage 1)."""
    config = fit.state.config
    first = langevin_vi.init(fit.state.density, replace(config, kind="vi", lr=STAGE_LR))
    with tempfile.TemporaryDirectory(prefix="hsivi-") as directory:
        settings = loop.LoopConfig(config.steps, fit.options.seed ^ STAGE_SEED, _log_every(config.steps), NEVER)
        hooks = loop.Hooks(lambda record: on_log(record | {"method": "vi (stage 1)", "steps": config.steps}))
        method: Any = langevin_vi
        if stopped := loop.run_loop(method, first, settings, Path(directory), hooks):
            raise stopped("interrupted after stage 1: nothing was kept of it")
    return langevin_vi.init(fit.state.density, config, *langevin_vi.reference(first))


def _raw(fit: Fit, n: int, seed: int, purpose: int = DRAW_SEED) -> Draws:
    """n draws of the method itself, in the density's own coordinates."""
    noise = NoiseStreams(seed ^ purpose, range(n))
    with torch.no_grad():
        if fit.method == AUTO:
            return student_t_draws(fit.density, fit.start, fit.degrees, noise)
        draws: Draws = fit.module.sample(fit.state, noise)
    if not POSTERIOR_METHODS[fit.method].whitened:
        return draws
    log_det = fit.start.scale_tril.diagonal().log().sum()
    return replace(
        draws,
        z=fit.start.draw(draws.z),
        log_prob=draws.log_prob - log_det,
        log_approx=None if draws.log_approx is None else draws.log_approx - log_det,
    )


def _weights(raw: Draws) -> Smoothed:
    """Pareto-smoothed weights; a semi-implicit method's rest on its own estimate of its density."""
    if raw.log_weight is not None:
        return smooth_weights(raw.log_weight)
    if raw.log_approx is None:
        raise InputError("the method gives neither weights nor a density: nothing can be checked")
    return smooth_weights(raw.log_prob - raw.log_approx)


def _route(fit: Fit) -> str:
    if fit.options.refine in ("hmc", "smc"):
        return fit.options.refine
    if fit.options.refine == "none":
        return "weights"
    assert fit.pilot is not None
    poor = fit.missed or fit.modes > 1 or fit.pilot.khat > USABLE_KHAT
    if fit.method == AUTO:
        poor = poor or fit.pilot.khat > GOOD_KHAT or fit.pilot.ess < ENOUGH * fit.pilot.n
    return "smc" if poor else "weights"


def _moved(fit: Fit, route: str, refined: Refined, weights: Smoothed | None) -> Posterior:
    columns, values = named_values(fit.density, refined.draws.z)
    draws = refined.draws
    return Posterior(
        columns=columns,
        values=values,
        weighted=None,
        z=draws.z,
        log_prob=draws.log_prob,
        log_approx=draws.log_approx,
        ess=min(refined.ess, float(len(values))),
        weights=weights,
        refined=refined,
        route=route,
        note=draws.note,
    )


def named_values(density: Density, z: Float64[Tensor, "n d"]) -> tuple[tuple[str, ...], Float64[Tensor, "n p"]]:
    """Names and values of every scalar that the user sees, a column each."""
    with torch.no_grad():
        named: dict[str, Float[Tensor, "n ..."]] = density.constrain(z)
    return tuple(column_names(named)), flatten_values(named).double()

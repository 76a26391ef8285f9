"""Solvers of the reverse diffusion without any training: the baselines a student is measured against.

The multistep solvers are diffusers' own schedulers. DDIM and DDPM are one flat loop over diffusers' time steps, for two
reasons: noise must come from a stream a sample, and diffusers' DDIM and DDPM step to `t - T // NFE`, which for spacing
`linspace` is not the next time of its own list. The same loop takes the students' own times, spacing `quad`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.schedule import NoiseSchedule, make_grid
from hsivi_cli.errors import InputError

# quad is the students' grid (bridges.schedule.make_grid), the other three are diffusers'
QUAD = "quad"
SPACINGS = ("leading", "trailing", "linspace", QUAD)
ORDERS = (1, 2, 3)

# Defaults: the best on the shipped teacher at NFE 5 and 10 (FID of 1,000 samples), from this NFE upwards, as pairs
# (first NFE, spacing). Another teacher may prefer another. A single step must start at the last time, which "leading"
# does not.
BEST_SPACING: dict[str, tuple[tuple[int, str], ...]] = {
    "ddim": ((1, "trailing"), (2, "leading")),
    "dpm++": ((1, "leading"),),
    "unipc": ((1, "leading"), (10, "linspace")),
    "deis": ((1, "leading"),),
    "ddpm": ((1, "trailing"), (2, "leading")),
}
BEST_ORDER = {"dpm++": 3, "unipc": 3, "deis": 3}  # order 3 beat order 2 in each of them, at NFE 5 and at 10

Eps = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler class and its options; `eta` is set where the step is DDIM's (0) or DDPM's (1).

    `any_times` says whether it can be given its times; the other schedulers only know diffusers' three spacings.
    """

    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None
    any_times: bool = False


SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler", {"clip_sample": False}, eta=0.0, any_times=True),
    "dpm++": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, any_times=True),
    "unipc": Solver("UniPCMultistepScheduler"),
    "deis": Solver("DEISMultistepScheduler"),
    "ddpm": Solver("DDPMScheduler", {"clip_sample": False}, eta=1.0, any_times=True),
}


def best_spacing(solver: str, nfe: int) -> str:
    """The default time-step spacing: the best on the shipped teacher at NFE 5 and 10; InputError: unknown solver."""
    _known(solver)
    return [spacing for first, spacing in BEST_SPACING[solver] if first <= max(nfe, 1)][-1]


def spacings(solver: str) -> tuple[str, ...]:
    """The time-step spacings that `solver` has; raises InputError for an unknown solver."""
    _known(solver)
    return tuple(spacing for spacing in SPACINGS if spacing != QUAD or SOLVERS[solver].any_times)


def resolve_order(solver: str, order: int | None = None) -> int | None:
    """The order of a multistep solver, its default for None; None for DDIM and DDPM, which have no other.

    Raises InputError for an order that the solver does not have.
    """
    _known(solver)
    if solver not in BEST_ORDER:
        if order is not None:
            raise InputError(f"--order belongs to {', '.join(BEST_ORDER)}: leave it out for --solver {solver}")
        return None
    if order is not None and order not in ORDERS:
        raise InputError(f"--order {order} is none of {', '.join(map(str, ORDERS))}")
    return BEST_ORDER[solver] if order is None else order


def solver_times(solver: str, nfe: int, spacing: str, schedule: NoiseSchedule) -> tuple[int, ...]:
    """The decreasing times at which `solver` evaluates the network: exactly `nfe` of them.

    Raises InputError if the solver or spacing is unknown, `nfe` exceeds T, or there are no `nfe` distinct times for
    this solver and spacing.
    """
    total = schedule.num_train_timesteps
    _known(solver)
    if spacing not in SPACINGS:
        raise InputError(f"--spacing {spacing!r} is none of {', '.join(SPACINGS)}")
    if spacing not in spacings(solver):
        known = ", ".join(spacings(solver))
        raise InputError(f"--spacing {spacing}: diffusers' {SOLVERS[solver].scheduler} takes no times: use {known}")
    if nfe < 1:
        raise InputError(f"--nfe {nfe}: at least one network evaluation is needed")
    if nfe > total:
        raise InputError(f"--nfe {nfe}: the score network knows only {total} times")
    times = _times(solver, nfe, spacing, schedule)
    if not _usable(times, nfe, total):
        others = [s for s in spacings(solver) if _usable(_times(solver, nfe, s, schedule), nfe, total)]
        hint = f"--spacing {' or '.join(others)}" if others else "another --nfe"
        raise InputError(f"--solver {solver} has no {nfe} distinct times with spacing {spacing}: use {hint}")
    return times


def solve(
    eps: Eps,
    schedule: NoiseSchedule,
    solver: str,
    nfe: int,
    spacing: str,
    draw: Draw,
    order: int | None = None,
    clip: bool = False,
) -> Float[Tensor, " n *shape"]:
    """Integrate from `x_T = draw()` to images with exactly `nfe` calls of `eps(x, t)`.

    `draw()` returns fresh standard normal noise, shape `(n, *shape)`: once for the start and, for DDPM, once a step but
    the last. `clip` keeps every predicted x_0 in [-1, 1]. Raises InputError as `solver_times` and `resolve_order` do.
    """
    times = solver_times(solver, nfe, spacing, schedule)
    order = resolve_order(solver, order)
    if clip:
        eps = clipped(eps, schedule)
    eta = SOLVERS[solver].eta
    if eta is not None:
        return ddim(eps, schedule, times, eta, draw)
    scheduler = build_scheduler(solver, spacing, schedule, order)
    x = draw()
    if spacing == QUAD:
        scheduler.set_timesteps(timesteps=list(times), device=x.device)
    else:
        scheduler.set_timesteps(nfe, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x, return_dict=False)[0]
    return x


def clipped(eps: Eps, schedule: NoiseSchedule) -> Eps:
    """The noise prediction whose x_0 is that of `eps`, clamped to [-1, 1]: clipping for every solver alike.

    Each solver sees the clamped x_0 and the eps that belongs to it. In diffusers that is `clip_sample=True` of
    DDPMScheduler; of DDIMScheduler together with `use_clipped_model_output=True` (DDIMPipeline's own default leaves eps
    as it was); and static thresholding of the multistep schedulers: `thresholding=True, sample_max_value=1.0`, whatever
    the ratio.
    """

    def predict(x: Float[Tensor, " n *shape"], t: Tensor) -> Float[Tensor, " n *shape"]:
        abar = schedule.abar.to(x.device)[t.to(x.device)]
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        x0 = ((x - noise * eps(x, t)) / signal).clamp(-1, 1)
        return (x - signal * x0) / noise

    return predict


def ddim(
    eps: Eps, schedule: NoiseSchedule, times: tuple[int, ...], eta: float, draw: Draw
) -> Float[Tensor, " n *shape"]:
    """DDIM along decreasing `times`, then to abar = 1 (Song, Meng, Ermon 2021, arXiv 2010.02502, equations 12 and 16).

    `eta` = 0 is deterministic; `eta` = 1 is ancestral sampling with DDPM's posterior (Ho, Jain, Abbeel 2020, equations
    6 and 7), also where the times skip some.
    """
    x = draw()
    levels = [*schedule.abar[list(times)].tolist(), 1.0]
    for t, (abar, abar_next) in zip(times, pairwise(levels), strict=True):
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
        A = math.sqrt(abar_next / abar)
        B = math.sqrt(max(1 - abar_next - sigma**2, 0.0)) - A * math.sqrt(1 - abar)
        x = A * x + B * eps(x, torch.tensor(t, device=x.device))
        if sigma > 0:
            x = x + sigma * draw()
    return x


def build_scheduler(solver: str, spacing: str, schedule: NoiseSchedule, order: int | None = None) -> Any:
    """A fresh diffusers scheduler for `solver` on this noise schedule; `order` None is the default one.

    For `quad` its own spacing does not matter: it is to be given its times. Raises InputError for an unknown solver or
    order.
    """
    import diffusers

    order = resolve_order(solver, order)
    recipe = SOLVERS[solver]
    options = recipe.options | ({} if order is None else {"solver_order": order})
    spacing = SPACINGS[0] if spacing == QUAD else spacing
    fields = schedule.config | {"prediction_type": "epsilon"}  # `predict_eps` has seen to it
    return getattr(diffusers, recipe.scheduler)(**fields, timestep_spacing=spacing, **options)


def _known(solver: str) -> None:
    if solver not in SOLVERS:
        raise InputError(f"--solver {solver!r} is none of {', '.join(SOLVERS)}")


def _times(solver: str, nfe: int, spacing: str, schedule: NoiseSchedule) -> tuple[int, ...]:
    """Decreasing times, not yet checked; none where the spacing has no `nfe` of them."""
    if spacing == QUAD:
        try:
            return make_grid(QUAD, nfe, schedule)[:0:-1]
        except InputError:
            return ()
    scheduler = build_scheduler(solver, spacing, schedule)
    scheduler.set_timesteps(nfe)
    return tuple(int(t) for t in scheduler.timesteps)


def _usable(times: tuple[int, ...], nfe: int, total: int) -> bool:
    # one "leading" step of DDIM would start, and end, at time 0
    decreasing = all(high > low for high, low in pairwise(times))
    return len(times) == nfe and decreasing and 0 < times[0] < total and times[-1] >= 0

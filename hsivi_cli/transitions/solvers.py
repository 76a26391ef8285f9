"""Solvers of the reverse diffusion without any training: the baselines a student is measured against.

The multistep solvers are diffusers' own schedulers. DDIM and DDPM are one flat loop over diffusers' time steps, for two
reasons: noise must come from a stream a sample, and diffusers' DDIM and DDPM step to `t - T // NFE`, which for spacing
`linspace` is not the next time of its own list.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.bridges.schedule import NoiseSchedule
from hsivi_cli.errors import InputError

SPACINGS = ("leading", "trailing", "linspace")

# The spacing with the lowest FID on the shipped teacher (1,000 samples at NFE 5 and 10), from this NFE upwards; pairs
# are (first NFE, spacing). A single step must start at the last time, which "leading" does not.
BEST_SPACING: dict[str, tuple[tuple[int, str], ...]] = {
    "ddim": ((1, "trailing"), (2, "leading")),
    "dpm++": ((1, "leading"),),
    "unipc": ((1, "leading"), (10, "linspace")),
    "deis": ((1, "leading"),),
    "ddpm": ((1, "trailing"), (2, "leading")),
}

Eps = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class Solver:
    """A diffusers scheduler class and its options; `eta` is set where the step is DDIM's (0) or DDPM's (1)."""

    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    eta: float | None = None


SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler", {"clip_sample": False}, eta=0.0),
    "dpm++": Solver("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": Solver("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": Solver("DEISMultistepScheduler", {"solver_order": 2}),
    "ddpm": Solver("DDPMScheduler", {"clip_sample": False}, eta=1.0),
}


def best_spacing(solver: str, nfe: int) -> str:
    """The time-step spacing that suits `solver` best at this NFE; raises InputError for an unknown solver."""
    _known(solver)
    return [spacing for first, spacing in BEST_SPACING[solver] if first <= max(nfe, 1)][-1]


def solver_times(solver: str, nfe: int, spacing: str, schedule: NoiseSchedule) -> tuple[int, ...]:
    """The decreasing times at which `solver` evaluates the network: exactly `nfe` of them.

    Raises InputError if the solver or spacing is unknown, `nfe` exceeds T, or diffusers has no `nfe` distinct times for
    this spacing.
    """
    total = schedule.num_train_timesteps
    _known(solver)
    if spacing not in SPACINGS:
        raise InputError(f"--spacing {spacing!r} is none of {', '.join(SPACINGS)}")
    if nfe < 1:
        raise InputError(f"--nfe {nfe}: at least one network evaluation is needed")
    if nfe > total:
        raise InputError(f"--nfe {nfe}: the score network knows only {total} times")
    times = _times(solver, nfe, spacing, schedule)
    if not _usable(times, nfe, total):
        others = [s for s in SPACINGS if s != spacing and _usable(_times(solver, nfe, s, schedule), nfe, total)]
        hint = f"--spacing {' or '.join(others)}" if others else "another --nfe"
        raise InputError(f"--solver {solver} has no {nfe} distinct times with spacing {spacing}: use {hint}")
    return times


def solve(
    eps: Eps, schedule: NoiseSchedule, solver: str, nfe: int, spacing: str, draw: Draw
) -> Float[Tensor, "n *shape"]:
    """Integrate from `x_T = draw()` to images with exactly `nfe` calls of `eps(x, t)`; no clipping anywhere.

    `draw()` returns fresh standard normal noise, shape `(n, *shape)`: once for the start and, for DDPM, once a step but
    the last. Raises InputError as `solver_times` does.
    """
    times = solver_times(solver, nfe, spacing, schedule)
    eta = SOLVERS[solver].eta
    if eta is None:
        return _multistep(eps, build_scheduler(solver, spacing, schedule), nfe, draw())
    return ddim(eps, schedule, times, eta, draw)


def ddim(
    eps: Eps, schedule: NoiseSchedule, times: tuple[int, ...], eta: float, draw: Draw
) -> Float[Tensor, "n *shape"]:
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


def build_scheduler(solver: str, spacing: str, schedule: NoiseSchedule) -> Any:
    """A fresh diffusers scheduler for `solver` on this noise schedule; raises InputError for an unknown solver."""
    import diffusers

    _known(solver)
    recipe = SOLVERS[solver]
    scheduler = getattr(diffusers, recipe.scheduler)
    return scheduler(**schedule.config, timestep_spacing=spacing, **recipe.options)


def _multistep(eps: Eps, scheduler: Any, nfe: int, x: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
    scheduler.set_timesteps(nfe, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x, return_dict=False)[0]
    return x


def _known(solver: str) -> None:
    if solver not in SOLVERS:
        raise InputError(f"--solver {solver!r} is none of {', '.join(SOLVERS)}")


def _times(solver: str, nfe: int, spacing: str, schedule: NoiseSchedule) -> tuple[int, ...]:
    scheduler = build_scheduler(solver, spacing, schedule)
    scheduler.set_timesteps(nfe)
    return tuple(int(t) for t in scheduler.timesteps)


def _usable(times: tuple[int, ...], nfe: int, total: int) -> bool:
    # one "leading" step of DDIM would start, and end, at time 0
    decreasing = times[0] > 0 and all(high > low for high, low in pairwise(times))
    return len(times) == nfe and decreasing and times[-1] >= 0 and times[0] < total

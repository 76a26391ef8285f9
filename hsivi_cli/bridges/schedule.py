"""Variance-preserving noise schedules and the time grids of a chain, as used by HSIVI (arXiv 2310.17153)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError

MAX_COSINE_BETA = 0.999
MAX_TIMESTEPS = 1_000_000
LEAST_SIGNAL = 1e-30  # of abar: its square root and what is divided by it must stay far from float32's ends
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# diffusers' schedulers that are defined by the betas of a variance-preserving process alone; flow matching, EDM and
# variance-exploding ones are not, and would give wrong images without an error
VP_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
)


@dataclass(frozen=True)
class NoiseSchedule:
    """`abar[t]`, the share of signal variance left at time t, for t = 0 .. T-1; float64.

    `config` holds the diffusers scheduler fields that define it, as plain JSON.
    """

    abar: Float[Tensor, " T"]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of time steps the score network was trained on."""
        return len(self.abar)

    @property
    def prediction_type(self) -> str:
        """What a network trained on it predicts: epsilon, v_prediction or sample (x_0)."""
        return self.config.get("prediction_type", "epsilon")

    @property
    def noise_scale(self) -> Float[Tensor, " T"]:
        """`s_t = sqrt(1 - abar_t)`, the standard deviation of the noise at time t."""
        return (1 - self.abar).sqrt()


def schedule_from_config(config: Mapping[str, Any], where: str = "scheduler config") -> NoiseSchedule:
    """Read a schedule from the fields of a diffusers scheduler config.

    Raises InputError for a schedule, a parametrisation or a rescaling that the layers do not cover.
    """
    steps = config.get("num_train_timesteps", 1000)
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    trained = config.get("trained_betas")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTION_TYPES:
        raise InputError(f"{where}: prediction_type {predicts!r} is not supported, only {', '.join(PREDICTION_TYPES)}")
    kind_of = config.get("_class_name", "DDPMScheduler")
    if kind_of not in VP_SCHEDULERS:
        raise InputError(f"{where}: {kind_of} is not known to be variance preserving: use a DDPMScheduler config")
    if not all(isinstance(value, int | float) for value in (start, end)):
        raise InputError(f"{where}: beta_start and beta_end must be numbers, not {start!r} and {end!r}")
    if config.get("rescale_betas_zero_snr", False):
        raise InputError(f"{where}: rescale_betas_zero_snr leaves no signal at the last step, which is not supported")
    if not isinstance(steps, int) or not 2 <= steps <= MAX_TIMESTEPS:
        raise InputError(f"{where}: num_train_timesteps must be an integer from 2 to {MAX_TIMESTEPS}, not {steps!r}")
    if trained is None and kind != "squaredcos_cap_v2" and not 0 < start < 1:
        raise InputError(f"{where}: beta_start must lie between 0 and 1, not {start!r}")
    if trained is not None:
        try:
            betas = torch.as_tensor(trained, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as err:
            raise InputError(f"{where}: trained_betas must be a list of numbers") from err
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        ratio = [min(1 - level[i + 1] / level[i], MAX_COSINE_BETA) for i in range(steps)]
        betas = torch.tensor(ratio, dtype=torch.float64)
    else:
        known = "linear, scaled_linear, squaredcos_cap_v2"
        raise InputError(f"{where}: beta_schedule {kind!r} is not supported, only {known} or trained_betas")
    if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
        raise InputError(f"{where}: the betas must be a list of numbers strictly between 0 and 1")
    abar = torch.cumprod(1 - betas, 0)
    if abar[-1] < LEAST_SIGNAL:
        raise InputError(
            f"{where}: the betas leave {float(abar[-1]):.0e} of the signal's variance at the last time, which float32 "
            "cannot hold: they are too large for so many times"
        )
    fields: dict[str, Any] = {"num_train_timesteps": len(betas), "prediction_type": predicts, "beta_schedule": kind}
    fields |= {"beta_start": start, "beta_end": end}
    if trained is not None:
        fields["trained_betas"] = [float(beta) for beta in betas]
    return NoiseSchedule(abar, fields)


def make_grid(kind: str | Sequence[int], nfe: int, schedule: NoiseSchedule) -> tuple[int, ...]:
    """The times `t_0 < ... < t_K` of a chain with K = `nfe` layers.

    `kind` is "quad" (`round(linspace(0, sqrt(0.8 T), K+1)^2)`), "uniform" (the first K+1 of `range(0, T, T // (K+1))`)
    or the K+1 times themselves. Raises InputError if the times are not strictly increasing inside the schedule.
    """
    total = schedule.num_train_timesteps
    if nfe < 1:
        raise InputError(f"--nfe {nfe}: at least one network evaluation is needed")
    if nfe >= total:
        raise InputError(f"--nfe {nfe}: the schedule has {total} times only")
    if not isinstance(kind, str):
        times = [int(t) for t in kind]
        if len(times) != nfe + 1:
            raise InputError(f"--grid lists {len(times)} times, but --nfe {nfe} needs {nfe + 1}")
    elif kind == "quad":
        times = (torch.linspace(0, math.sqrt(0.8 * total), nfe + 1, dtype=torch.float64) ** 2).round().long().tolist()
    elif kind == "uniform":
        times = list(range(0, total, max(total // (nfe + 1), 1)))[: nfe + 1]
    else:
        raise InputError(f"--grid {kind!r} is neither 'quad', 'uniform' nor a comma-separated list of times")
    increasing = all(low < high for low, high in pairwise(times))
    if len(times) != nfe + 1 or not increasing or times[0] < 0 or times[-1] >= total:
        raise InputError(f"--grid gives {times}, which is not {nfe + 1} increasing times within 0..{total - 1}")
    return tuple(times)

"""What several examples share: normal densities, softplus, numbers out of a table."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError

LOG_2PI = math.log(2 * math.pi)


def normal_log_density(
    x: Float[Tensor, "..."], mean: Float[Tensor, "..."] | float, sd: Float[Tensor, "..."] | float
) -> Float[Tensor, "..."]:
    """`log N(x; mean, sd^2)` entry by entry, normaliser included."""
    log_sd = torch.log(sd) if isinstance(sd, Tensor) else math.log(sd)
    return -0.5 * ((x - mean) / sd) ** 2 - log_sd - 0.5 * LOG_2PI


def randn(*shape: int, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Standard normals in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rand(*shape: int, generator: torch.Generator) -> Float[Tensor, "..."]:
    """Uniforms on [0, 1) in float64."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def softplus_inverse(a: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`u` with `softplus(u) = a > 0`, without overflow for large `a`."""
    return a + torch.log(-torch.expm1(-a))


def numeric_column(data: Mapping[str, Any], column: str, what: str) -> Float[Tensor, " N"]:
    """One column of a table in float64. Raises InputError where it is missing, not numeric, or not finite."""
    if column not in data:
        raise InputError(f"{what} needs a column {column!r}: the data has {', '.join(map(str, data))}")
    try:
        values = np.asarray(data[column], dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"column {column!r} is not numeric: {what} takes numbers only") from None
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
        raise InputError(f"column {column!r} is missing or infinite in row {row}: drop or fill such rows first")
    return torch.from_numpy(values.copy())

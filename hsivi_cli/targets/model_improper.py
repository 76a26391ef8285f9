"""Whether a user's posterior can be proper: its density followed far out along every coordinate."""

import contextlib
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.model_calls import as_scalar, single_draw, user_code
from hsivi_cli.targets.supports import Parameter, Params, constrain_all, coordinate_names, slices

if TYPE_CHECKING:
    from hsivi_cli.targets.model import Model

NEAR, FAR = 20.0, 40.0
"""Far out on a log scale."""
VERY_NEAR, VERY_FAR = 1e3, 1e6
"""Far out on a plain scale: a tail of 1/|t| falls by 6.91 from one to the other."""


def check_proper(model: "Model", name: str, z: Float[Tensor, "n d"], vmap: bool) -> None:
    """Follow every coordinate far out: a density that does not fall along a line has no finite integral, as a rule."""
    parameters = tuple(model.parameters)

    def total(values: dict[str, Tensor]) -> Tensor:
        p = Params(values)
        return as_scalar(model.prior_term(p)) + as_scalar(model.likelihood_term(p))

    def along(points: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        with user_code(validate=False), torch.no_grad():
            if vmap:
                with contextlib.suppress(Exception):
                    values, jacobian = constrain_all(parameters, points)
                    return torch.func.vmap(total, chunk_size=256)(values) + jacobian
            rows = []
            for point in points:
                try:
                    p, log_jacobian = single_draw(point, parameters)
                    rows.append(total(p) + log_jacobian)
                except Exception:
                    rows.append(torch.tensor(torch.nan, dtype=torch.float64))
            return torch.stack(rows)

    names = coordinate_names(parameters)
    coordinates = list(range(z.shape[1]))[: 400 if vmap else 40]
    # transforms are clamped in rounding's reach, so that very far out they say nothing
    plain = torch.tensor([parameter.support == "real" for parameter in parameters for _ in range(parameter.size)])
    plain = plain[: len(coordinates)]
    for sign, end in ((1.0, "infinity"), (-1.0, "-infinity")):
        flat = torch.ones(len(coordinates), dtype=torch.bool)
        for base in z:
            shift = sign * torch.eye(z.shape[1], dtype=z.dtype)[coordinates]
            near, far, very_near, very_far = (along(base + t * shift) for t in (NEAR, FAR, VERY_NEAR, VERY_FAR))
            finite = plain & torch.isfinite(very_near) & torch.isfinite(very_far)
            # a tail no thinner than 1/|t| has no integral; on a log scale, one that does not fall at all
            heavy = finite & (very_far - very_near > -6.95)
            level = ~finite & torch.isfinite(near) & torch.isfinite(far) & (far - near > -1e-3)
            flat &= heavy | level
        if bool(flat.any()):
            index = coordinates[int(flat.nonzero()[0])]
            raise InputError(
                f"{name}: the posterior looks improper: its density does not fall as "
                f"{_end(parameters, index, names, end)}; give it a proper prior"
            )


def _end(parameters: tuple[Parameter, ...], index: int, names: list[str], end: str) -> str:
    for parameter, where in slices(parameters):
        if where.start <= index < where.stop and parameter.support != "real":
            edge = {"infinity": "upper", "-infinity": "lower"}[end]
            return f"{names[index]} goes to the {edge} end of its support ({parameter.support})"
    return f"{names[index]} goes to {end}"

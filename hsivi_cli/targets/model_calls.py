"""How a user's torch code is run: in float64, seeded, and with what it raises told in one line."""

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from hsivi_cli.errors import RunError
from hsivi_cli.targets.supports import Parameter, Params, constrain_all

if TYPE_CHECKING:
    from hsivi_cli.targets.model import Model


@contextlib.contextmanager
def user_code(validate: bool) -> Iterator[None]:
    """Run a user's torch code: new tensors are float64; distributions check their arguments only if `validate`.

    (Their checks branch on values, which vmap cannot.)
    """
    dtype, checking = torch.get_default_dtype(), Distribution._validate_args
    torch.set_default_dtype(torch.float64)
    Distribution.set_default_validate_args(validate)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        Distribution.set_default_validate_args(checking)


@contextlib.contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's global generator from ours for a while: torch.distributions draw from no other."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def blamed_line(err: BaseException, *where: Callable[..., Any] | str | None) -> str:
    """The last line that an exception passed through in the files `where`, or of these functions: `my.py, line 3`."""
    files = {w if isinstance(w, str) else getattr(getattr(w, "__code__", None), "co_filename", "") for w in where}
    lines = [frame for frame in traceback.extract_tb(err.__traceback__) if frame.filename in files]
    return f"{Path(lines[-1].filename).name}, line {lines[-1].lineno}" if lines else ""


def describe(err: BaseException, *where: Callable[..., Any] | str | None) -> str:
    """An exception in one line, with the user's line at fault (`blamed_line`)."""
    line = blamed_line(err, *where)
    text = " ".join(str(err).split())
    if len(text) > 300:
        text = text[:300] + "..."
    message = f"{type(err).__name__}: {text}" if text else type(err).__name__
    return f"{message} ({line})" if line else message


def as_double(value: Any) -> Tensor:
    """A user's tensor or plain number in float64."""
    return (value if isinstance(value, Tensor) else torch.as_tensor(value)).double()


def as_scalar(value: Any) -> Tensor:
    """The sum of a user's log density, whether it is a scalar or one value per observation."""
    value = as_double(value)
    return value.sum() if value.ndim else value


def single_draw(z: Float[Tensor, " d"], parameters: tuple[Parameter, ...]) -> tuple[Params, Tensor]:
    """The parameters of one draw as the user sees them, and the log Jacobian."""
    values, log_jacobian = constrain_all(parameters, z[None])
    return Params({key: value[0] for key, value in values.items()}), log_jacobian[0]


def call_simulate(
    simulate: Callable[..., Any],
    values: dict[str, Float[Tensor, "n ..."]],
    generator: torch.Generator,
    size: int,
    name: str,
    vmap: bool,
) -> Float[Tensor, "n N"]:
    """One replicated response of each draw. Raises RunError where it fails or has another shape."""

    def one(draw: dict[str, Tensor]) -> Tensor:
        return as_double(simulate(Params(draw), generator))

    draws = len(next(iter(values.values())))
    try:
        with user_code(validate=False), _seeded(generator), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow rules for batches
            if vmap and draws:
                return torch.func.vmap(one, randomness="different")(values)
            rows = [one({key: value[i] for key, value in values.items()}) for i in range(draws)]
    except Exception as err:
        raise RunError(f"{name}: simulate raised {describe(err, simulate)}") from err
    for row in rows:
        if tuple(row.shape) != (size,):
            raise RunError(f"{name}: simulate returned shape {tuple(row.shape)}: observed has shape ({size},)")
    return torch.stack(rows) if rows else torch.zeros(0, size, dtype=torch.float64)


def call_sample_prior(
    model: "Model", n: int, generator: torch.Generator, name: str, vmap: bool = False
) -> dict[str, Tensor]:
    """`n` prior draws, every parameter (n, *shape) and inside its support. Raises RunError otherwise."""
    assert model.sample_prior is not None
    sample_prior, rows = model.sample_prior, []

    def one(_: Any) -> dict[str, Tensor]:
        return {key: as_double(value) for key, value in sample_prior(generator).items()}

    try:
        with user_code(validate=False), _seeded(generator), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow rules for batches
            if vmap:
                rows = [torch.func.vmap(one, randomness="different")(torch.zeros(n))]
            else:
                rows = [one(None) for _ in range(n)]
    except Exception as err:
        raise RunError(f"{name}: sample_prior raised {describe(err, sample_prior)}") from err
    found = {}
    for parameter in model.parameters:
        if any(parameter.name not in row for row in rows):
            raise RunError(f"{name}: sample_prior returned no {parameter.name!r}: return every parameter")
        for row in rows:
            shape = tuple(row[parameter.name].shape)[int(vmap) :]
            if shape != parameter.shape:
                raise RunError(
                    f"{name}: sample_prior returned shape {shape} for {parameter.name!r}, which has {parameter.shape}"
                )
        drawn = [row[parameter.name] for row in rows]
        found[parameter.name] = drawn[0] if vmap else torch.stack(drawn)
        if not bool(torch.isfinite(parameter.unconstrain(found[parameter.name])).all()):
            raise RunError(
                f"{name}: sample_prior returned a {parameter.name!r} outside its support, {parameter.support}"
            )
    return found

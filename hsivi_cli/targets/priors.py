"""Prior distributions on one real number: densities with all normalisers, sampling, truncation, and their grammar.

Arguments are Stan's: standard deviations and scales, gamma(shape, rate), inverse_gamma(shape, scale),
exponential(rate), student_t(nu, location, scale). Half forms leave the location out.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.errors import InputError

Values = Float[Tensor, "..."]
Arguments = Sequence[float] | Sequence[Tensor]

# name -> arguments; the positive ones; where the density lives
ARGUMENTS = {
    "flat": (),
    "normal": ("location", "scale"),
    "student_t": ("nu", "location", "scale"),
    "cauchy": ("location", "scale"),
    "half_normal": ("scale",),
    "half_student_t": ("nu", "scale"),
    "half_cauchy": ("scale",),
    "gamma": ("shape", "rate"),
    "inverse_gamma": ("shape", "scale"),
    "exponential": ("rate",),
    "lognormal": ("location", "scale"),
    "uniform": ("lower", "upper"),
    "lkj": ("eta",),
}
_POSITIVE = {"scale", "nu", "shape", "rate", "eta"}
_REAL_LINE = {"flat", "normal", "student_t", "cauchy"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _log_kernel(name: str, x: Values, a: Arguments) -> Values:
    """The part of the log density that depends on x; arguments are numbers or tensors that broadcast."""
    match name:
        case "normal":
            return -0.5 * ((x - a[0]) / a[1]) ** 2
        case "student_t":
            return -0.5 * (a[0] + 1) * torch.log1p(((x - a[1]) / a[2]) ** 2 / a[0])
        case "cauchy":
            return -torch.log1p(((x - a[0]) / a[1]) ** 2)
        case "gamma":
            return (a[0] - 1) * x.log() - a[1] * x
        case "inverse_gamma":
            return -(a[0] + 1) * x.log() - a[1] / x
        case "exponential":
            return -a[0] * x
        case "lognormal":
            return -0.5 * ((x.log() - a[0]) / a[1]) ** 2 - x.log()
        case _:  # flat, uniform
            return torch.zeros_like(x)


def _score_kernel(name: str, x: Values, a: Arguments) -> Values:
    """Derivative of `_log_kernel` by x."""
    match name:
        case "normal":
            return -(x - a[0]) / a[1] ** 2
        case "student_t":
            return -(a[0] + 1) * (x - a[1]) / (a[0] * a[2] ** 2 + (x - a[1]) ** 2)
        case "cauchy":
            return -2 * (x - a[0]) / (a[1] ** 2 + (x - a[0]) ** 2)
        case "gamma":
            return (a[0] - 1) / x - a[1]
        case "inverse_gamma":
            return -(a[0] + 1) / x + a[1] / x**2
        case "exponential":
            return torch.zeros_like(x) - a[0]
        case "lognormal":
            return -((x.log() - a[0]) / a[1] ** 2 + 1) / x
        case _:
            return torch.zeros_like(x)


def _log_normaliser(name: str, a: tuple[float, ...]) -> float:
    """The rest of the log density on the whole support."""
    match name:
        case "flat":
            return 0.0
        case "normal" | "lognormal":
            return -math.log(a[1]) - 0.5 * math.log(2 * math.pi)
        case "student_t":
            gammas = math.lgamma((a[0] + 1) / 2) - math.lgamma(a[0] / 2)
            return gammas - 0.5 * math.log(a[0] * math.pi) - math.log(a[2])
        case "cauchy":
            return -math.log(math.pi * a[1])
        case "gamma" | "inverse_gamma":
            return a[0] * math.log(a[1]) - math.lgamma(a[0])
        case "exponential":
            return math.log(a[0])
        case "uniform":
            return -math.log(a[1] - a[0])
        case _:
            raise ValueError(name)


@dataclass(frozen=True)
class Prior:
    """A distribution on (`lower`, `upper`), truncated there and renormalised by `log_mass`; `flat` is the constant 1.

    `name` and `arguments` are as in ARGUMENTS, half forms already turned into their full form with lower = 0.
    """

    name: str
    arguments: tuple[float, ...] = ()
    lower: float = -math.inf
    upper: float = math.inf
    log_mass: float = 0.0

    @property
    def proper(self) -> bool:
        """Whether it integrates to one: all but flat ones do."""
        return self.name != "flat"

    @property
    def real(self) -> bool:
        """Whether every real number is allowed."""
        return self.lower == -math.inf and self.upper == math.inf

    @property
    def log_normaliser(self) -> float:
        """What `log_density` adds to the part that depends on x, truncation included."""
        return _log_normaliser(self.name, self.arguments) - self.log_mass

    def log_density(self, x: Values) -> Values:
        """Log density at each x inside the support, with all normalisers; flat gives 0. Shape as x, float64."""
        return _log_kernel(self.name, x, self.arguments) + self.log_normaliser

    def score(self, x: Values) -> Values:
        """Derivative of `log_density`, in closed form."""
        return _score_kernel(self.name, x, self.arguments)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
        """Independent draws by inverting the distribution function, float64; raises InputError for flat."""
        if not self.proper:
            raise InputError("a flat prior cannot be drawn from: give every parameter a proper prior")
        # in the upper half count from the top, where doubles are dense
        flip = self._lower_tail(self.lower) > 0.5
        tail, quantile = (self._upper_tail, self._upper_quantile) if flip else (self._lower_tail, self._lower_quantile)
        ends = tail(self.lower), tail(self.upper)
        u = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        p = ends[0] + (ends[1] - ends[0]) * np.clip(u, 2.0**-54, 1 - 2.0**-53)  # 0 would have an infinite quantile
        return torch.from_numpy(np.clip(quantile(p), self.lower, self.upper)).reshape(shape)

    def truncate(self, lower: float, upper: float) -> "Prior":
        """The same prior given that x lies in (lower, upper), renormalised; raises ValueError if nothing is left."""
        low, high = max(lower, self.lower), min(upper, self.upper)
        if low >= high:
            raise ValueError("no overlap")
        if (low, high) == (self.lower, self.upper):
            return self
        if not self.proper:
            return replace(self, lower=low, upper=high)
        tail = self._upper_tail if self._lower_tail(low) > 0.5 else self._lower_tail
        mass = abs(tail(high) - tail(low))
        if mass < 1e-300:
            raise ValueError("no mass")
        return replace(self, lower=low, upper=high, log_mass=math.log(mass))

    def describe(self) -> str:
        """As a user would write it, `half_` where it was cut at a location of 0."""
        half = self.lower == 0 and self.upper == math.inf and self.name in _REAL_LINE - {"flat"}
        if half and self.arguments[-2] == 0:
            return f"half_{self.name}({', '.join(f'{a:g}' for a in (*self.arguments[:-2], self.arguments[-1]))})"
        text = f"{self.name}({', '.join(f'{a:.4g}' for a in self.arguments)})" if self.arguments else self.name
        return text + (" cut at 0" if half else "")

    def _lower_tail(self, x: float) -> float:
        """P(X < x) before any truncation."""
        return self._tail(x, upper=False)

    def _upper_tail(self, x: float) -> float:
        """P(X > x) before any truncation."""
        return self._tail(x, upper=True)

    def _tail(self, x: float, upper: bool) -> float:
        from scipy import special

        if math.isinf(x):
            return float((x > 0) != upper)
        a = self.arguments
        sign = -1 if upper else 1
        match self.name:
            case "normal":
                return float(special.ndtr(sign * (x - a[0]) / a[1]))
            case "student_t":
                return float(special.stdtr(a[0], sign * (x - a[1]) / a[2]))
            case "cauchy":
                return float(special.stdtr(1.0, sign * (x - a[0]) / a[1]))
            case "uniform":
                share = min(max((x - a[0]) / (a[1] - a[0]), 0.0), 1.0)
                return 1 - share if upper else share
        if x <= 0:
            return float(upper)
        match self.name:
            case "gamma":
                return float((special.gammaincc if upper else special.gammainc)(a[0], a[1] * x))
            case "inverse_gamma":
                return float((special.gammainc if upper else special.gammaincc)(a[0], a[1] / x))
            case "exponential":
                return math.exp(-a[0] * x) if upper else -math.expm1(-a[0] * x)
            case _:  # lognormal
                return float(special.ndtr(sign * (math.log(x) - a[0]) / a[1]))

    def _lower_quantile(self, p: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        return self._quantile(p, upper=False)

    def _upper_quantile(self, p: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        return self._quantile(p, upper=True)

    def _quantile(self, p: Float64[np.ndarray, "..."], upper: bool) -> Float64[np.ndarray, "..."]:
        """The x whose lower, or upper, tail is p."""
        from scipy import special

        a = self.arguments
        sign = -1 if upper else 1
        match self.name:
            case "normal":
                return a[0] + a[1] * sign * special.ndtri(p)
            case "student_t":
                return a[1] + a[2] * sign * special.stdtrit(a[0], p)
            case "cauchy":
                return a[0] - a[1] * sign / np.tan(np.pi * p)
            case "uniform":
                return a[1] - (a[1] - a[0]) * p if upper else a[0] + (a[1] - a[0]) * p
            case "gamma":
                return (special.gammainccinv if upper else special.gammaincinv)(a[0], p) / a[1]
            case "inverse_gamma":
                return a[1] / (special.gammaincinv if upper else special.gammainccinv)(a[0], p)
            case "exponential":
                return -(np.log(p) if upper else np.log1p(-p)) / a[0]
            case "lognormal":
                return np.exp(a[0] + a[1] * sign * special.ndtri(p))
            case _:
                raise ValueError(self.name)


def make_prior(name: str, *arguments: float) -> Prior:
    """A Prior by its name in ARGUMENTS, with its natural support; half forms are cut at 0 and renormalised."""
    if name.startswith("half_"):
        full = name.removeprefix("half_")
        return Prior(full, (*arguments[:-1], 0.0, arguments[-1]), lower=0.0, log_mass=math.log(0.5))
    if name in _REAL_LINE:
        return Prior(name, arguments)
    if name == "uniform":
        return Prior(name, arguments, lower=arguments[0], upper=arguments[1])
    return Prior(name, arguments, lower=0.0)


@dataclass(frozen=True)
class PriorStatement:
    """One `--prior`: the class (`b`, `sigma`) or coefficient (`b[mom_iq]` gives target `mom_iq`, group `b`)."""

    target: str
    group: str | None
    prior: Prior
    text: str


def parse_prior(text: str) -> PriorStatement:
    """Read `b=normal(0,10)`, `b[mom_iq]=flat`, `sigma=half_cauchy(2.5)`; raises InputError with the spot >>so<<."""
    # names of coefficients may hold brackets and comparisons, so the last lone "=" divides
    target, found, right = text.rpartition("=")
    target, body = target.strip(), right.strip()
    if not found or not target:
        raise InputError(f'--prior >>{text}<<: write name=distribution(arguments), as in "b=normal(0,10)"')
    match = re.fullmatch(r"([A-Za-z_]\w*)\s*(?:\((.*)\))?", body, re.DOTALL)
    if match is None:
        raise InputError(f"--prior {target}=>>{body}<<: write distribution(arguments), as in normal(0,10)")
    name, inner = match.group(1), match.group(2)
    if name not in ARGUMENTS:
        raise InputError(f"--prior {target}=>>{name}<<{body[len(name) :]}: unknown, choose {', '.join(ARGUMENTS)}")
    pieces = [piece.strip() for piece in inner.split(",")] if inner and inner.strip() else []
    arguments = tuple(_number(piece, i, target, name, pieces) for i, piece in enumerate(pieces))
    wanted = ARGUMENTS[name]
    if name.startswith("half_") and len(arguments) == len(wanted) + 1 and arguments[-2] == 0:
        arguments = (*arguments[:-2], arguments[-1])  # a location of 0, as half_normal(0, 1)
    if len(arguments) != len(wanted):
        raise InputError(
            f"--prior {target}=>>{body}<<: {name} takes "
            + (f"{len(wanted)} arguments, {name}({', '.join(wanted)})" if wanted else "no arguments")
        )
    for value, meaning in zip(arguments, wanted, strict=True):
        if meaning in _POSITIVE and value <= 0:
            raise InputError(f"--prior {target}=>>{body}<<: the {meaning} must be positive, not {value:g}")
    if name == "uniform" and arguments[0] >= arguments[1]:
        raise InputError(f"--prior {target}=>>{body}<<: the lower end must be below the upper one")
    bracket = re.fullmatch(r"(b|sd)\[(.+)\]", target, re.DOTALL)
    group, target = (bracket.group(1), bracket.group(2).strip()) if bracket else (None, target)
    return PriorStatement(target, group, make_prior(name, *arguments), text)


def _number(piece: str, position: int, target: str, name: str, pieces: list[str]) -> float:
    if _NUMBER.fullmatch(piece) and math.isfinite(float(piece)):
        return float(piece)
    marked = ", ".join(f">>{p}<<" if i == position else p for i, p in enumerate(pieces))
    raise InputError(f"--prior {target}={name}({marked}): not a number")

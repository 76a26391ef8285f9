"""Prior distributions on one real number: densities with all normalisers, sampling and truncation.

Arguments are Stan's: standard deviations and scales, gamma(shape, rate), inverse_gamma(shape, scale),
exponential(rate), student_t(nu, location, scale). Half forms leave the location out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.errors import InputError

Values = Float[Tensor, "..."]
Arguments = Sequence[float] | Sequence[Tensor]

# name -> arguments
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
_REAL_LINE = {"flat", "normal", "student_t", "cauchy"}


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


class PriorStack:
    """Independent priors on the k columns of a batch, evaluated together, one pass a kind of distribution."""

    def __init__(self, priors: Sequence[Prior]) -> None:
        self.priors = tuple(priors)
        self.log_normaliser = float(sum(prior.log_normaliser for prior in self.priors))
        self._kinds: list[tuple[str, Tensor, tuple[Tensor, ...]]] = []
        for name in dict.fromkeys(prior.name for prior in self.priors if prior.name not in ("flat", "uniform")):
            index = [i for i, prior in enumerate(self.priors) if prior.name == name]
            columns = zip(*(self.priors[i].arguments for i in index), strict=True)
            arguments = tuple(torch.tensor(column, dtype=torch.float64) for column in columns)
            self._kinds.append((name, torch.tensor(index), arguments))

    @property
    def proper(self) -> bool:
        """Whether every column has a proper prior."""
        return all(prior.proper for prior in self.priors)

    def log_density(self, x: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        """Sum over the columns of their log densities."""
        total = torch.full((len(x),), self.log_normaliser, dtype=x.dtype)
        for name, index, arguments in self._kinds:
            total = total + _log_kernel(name, self._columns(x, index), arguments).sum(1)
        return total

    def score(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Derivative of `log_density` by each column."""
        total = torch.zeros_like(x)
        for name, index, arguments in self._kinds:
            part = _score_kernel(name, self._columns(x, index), arguments)
            total = part if len(index) == len(self.priors) else total.index_add(1, index, part)
        return total

    def sample(self, n: int, generator: torch.Generator) -> Float64[Tensor, "n k"]:
        """`n` independent rows; raises InputError if a prior is flat."""
        columns = [prior.sample((n,), generator) for prior in self.priors]
        return torch.stack(columns, 1) if columns else torch.empty(n, 0, dtype=torch.float64)

    def _columns(self, x: Float[Tensor, "n k"], index: Tensor) -> Float[Tensor, "n m"]:
        return x if len(index) == len(self.priors) else x.index_select(1, index)


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

"""Response distributions of generalised linear models: log likelihoods with their derivatives, simulation, checks.

A family's log likelihood of row i is split in three, so that a sum over a million rows costs one pass:
`constant(y)_i + auxiliary(y, aux)_i + kernel(y, eta, aux)_i`, where only the last knows the linear predictor eta.
`aux` are the positive parameters, each of shape (n,): `sigma`, `nu`, `shape`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import softplus

from hsivi_cli.errors import InputError

Eta = Float[Tensor, "n N"]
Rows = Float[Tensor, " N"]
Aux = dict[str, Float[Tensor, " n"]]
_MOST_LOG_RATE = 34.0  # simulated rates stay below e^34, where float64 still counts in ones


class Family(Protocol):
    """What a response distribution offers; `link` is from the mean to eta, `aux` names its positive parameters."""

    @property
    def name(self) -> str: ...
    @property
    def link(self) -> str: ...
    @property
    def aux(self) -> tuple[str, ...]: ...

    def constant(self, y: Rows, trials: Rows | None) -> Rows:
        """The part that depends on the data alone."""

    def auxiliary(self, y: Float[Tensor, " U"], aux: Aux) -> Float[Tensor, "n U"]:
        """The part of data and aux; broadcastable to (n, U), zero where there is none."""

    def auxiliary_score(self, y: Float[Tensor, " U"], aux: Aux) -> dict[str, Float[Tensor, "n U"]]:
        """Derivative of `auxiliary` by each aux."""

    def kernel(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> Eta:
        """The part that depends on eta."""

    def kernel_score(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> tuple[Eta, dict[str, Eta]]:
        """Derivatives of `kernel`: by eta, and by each aux."""

    def simulate(self, trials: Rows | None, eta: Eta, aux: Aux, generator: torch.Generator) -> Eta:
        """A response for each row."""


@dataclass(frozen=True)
class Gaussian:
    """`y ~ normal(eta, sigma)`."""

    name: str = "gaussian"
    link: str = "identity"
    aux: tuple[str, ...] = ("sigma",)

    def constant(self, y: Rows, trials: Rows | None) -> Rows:
        return torch.full_like(y, -0.5 * math.log(2 * math.pi))

    def auxiliary(self, y: Rows, aux: Aux) -> Eta:
        return -aux["sigma"].log()[:, None]

    def auxiliary_score(self, y: Rows, aux: Aux) -> dict[str, Eta]:
        return {"sigma": -1 / aux["sigma"][:, None]}

    def kernel(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> Eta:
        return -0.5 * ((y - eta) / aux["sigma"][:, None]) ** 2

    def kernel_score(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> tuple[Eta, dict[str, Eta]]:
        sigma = aux["sigma"][:, None]
        residual = y - eta
        return residual / sigma**2, {"sigma": residual**2 / sigma**3}

    def simulate(self, trials: Rows | None, eta: Eta, aux: Aux, generator: torch.Generator) -> Eta:
        noise = torch.randn(eta.shape, generator=generator, dtype=eta.dtype)
        return eta + aux["sigma"][:, None] * noise


@dataclass(frozen=True)
class StudentT:
    """`y ~ student_t(nu, eta, sigma)`."""

    name: str = "student-t"
    link: str = "identity"
    aux: tuple[str, ...] = ("sigma", "nu")

    def constant(self, y: Rows, trials: Rows | None) -> Rows:
        return torch.full_like(y, -0.5 * math.log(math.pi))

    def auxiliary(self, y: Rows, aux: Aux) -> Eta:
        sigma, nu = aux["sigma"], aux["nu"]
        value = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * nu.log() - sigma.log()
        return value[:, None]

    def auxiliary_score(self, y: Rows, aux: Aux) -> dict[str, Eta]:
        sigma, nu = aux["sigma"][:, None], aux["nu"][:, None]
        return {"sigma": -1 / sigma, "nu": 0.5 * (torch.digamma((nu + 1) / 2) - torch.digamma(nu / 2) - 1 / nu)}

    def kernel(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> Eta:
        sigma, nu = aux["sigma"][:, None], aux["nu"][:, None]
        return -0.5 * (nu + 1) * torch.log1p(((y - eta) / sigma) ** 2 / nu)

    def kernel_score(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> tuple[Eta, dict[str, Eta]]:
        sigma, nu = aux["sigma"][:, None], aux["nu"][:, None]
        residual = y - eta
        square = residual**2
        weight = (nu + 1) / (nu * sigma**2 + square)
        by_nu = -0.5 * torch.log1p(square / (nu * sigma**2)) + 0.5 * weight * square / nu
        return weight * residual, {"sigma": weight * square / sigma, "nu": by_nu}

    def simulate(self, trials: Rows | None, eta: Eta, aux: Aux, generator: torch.Generator) -> Eta:
        nu = aux["nu"][:, None].expand_as(eta)
        chi_square = 2 * torch._standard_gamma((nu / 2).contiguous(), generator=generator)
        noise = torch.randn(eta.shape, generator=generator, dtype=eta.dtype)
        return eta + aux["sigma"][:, None] * noise * (nu / chi_square).sqrt()


@dataclass(frozen=True)
class Binomial:
    """`y ~ binomial(trials, inv_logit(eta))`; Bernoulli where trials is None."""

    name: str = "binomial"
    link: str = "logit"
    aux: tuple[str, ...] = ()

    def constant(self, y: Rows, trials: Rows | None) -> Rows:
        if trials is None:
            return torch.zeros_like(y)
        return torch.lgamma(trials + 1) - torch.lgamma(y + 1) - torch.lgamma(trials - y + 1)

    def auxiliary(self, y: Rows, aux: Aux) -> Eta:
        return torch.zeros(1, 1, dtype=y.dtype)

    def auxiliary_score(self, y: Rows, aux: Aux) -> dict[str, Eta]:
        return {}

    def kernel(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> Eta:
        return y * eta - self.partition(trials, eta)

    def kernel_score(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> tuple[Eta, dict[str, Eta]]:
        return y - self.mean(trials, eta), {}

    def partition(self, trials: Rows | None, eta: Eta) -> Eta:
        """What `kernel` is besides `y eta`: the link is canonical."""
        return softplus(eta) if trials is None else trials * softplus(eta)

    def mean(self, trials: Rows | None, eta: Eta) -> Eta:
        """The derivative of `partition`, the expected response."""
        return eta.sigmoid() if trials is None else trials * eta.sigmoid()

    def simulate(self, trials: Rows | None, eta: Eta, aux: Aux, generator: torch.Generator) -> Eta:
        probability = eta.sigmoid()
        if trials is None:
            return torch.bernoulli(probability, generator=generator)
        return torch.binomial(trials.expand_as(eta).contiguous(), probability, generator=generator)


@dataclass(frozen=True)
class Poisson:
    """`y ~ poisson(exp(eta))`."""

    name: str = "poisson"
    link: str = "log"
    aux: tuple[str, ...] = ()

    def constant(self, y: Rows, trials: Rows | None) -> Rows:
        return -torch.lgamma(y + 1)

    def auxiliary(self, y: Rows, aux: Aux) -> Eta:
        return torch.zeros(1, 1, dtype=y.dtype)

    def auxiliary_score(self, y: Rows, aux: Aux) -> dict[str, Eta]:
        return {}

    def kernel(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> Eta:
        return y * eta - eta.exp()

    def kernel_score(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> tuple[Eta, dict[str, Eta]]:
        return y - eta.exp(), {}

    def partition(self, trials: Rows | None, eta: Eta) -> Eta:
        """What `kernel` is besides `y eta`: the link is canonical."""
        return eta.exp()

    def mean(self, trials: Rows | None, eta: Eta) -> Eta:
        """The derivative of `partition`, the expected response."""
        return eta.exp()

    def simulate(self, trials: Rows | None, eta: Eta, aux: Aux, generator: torch.Generator) -> Eta:
        return torch.poisson(eta.clamp_max(_MOST_LOG_RATE).exp(), generator=generator)


POISSON_LIKE = 1e8


def _capped(shape: Float64[Tensor, " n"]) -> Float64[Tensor, "n 1"]:
    return shape[:, None].clamp_max(POISSON_LIKE)


@dataclass(frozen=True)
class NegativeBinomial:
    """Mean `exp(eta)`, variance `mean + mean^2 / shape` (Stan's `neg_binomial_2_log`).

    Beyond a shape of 1e8 it is taken to be 1e8: no count tells the two apart, and differences of log gammas would lose
    their digits.
    """

    name: str = "negative-binomial"
    link: str = "log"
    aux: tuple[str, ...] = ("shape",)

    def constant(self, y: Rows, trials: Rows | None) -> Rows:
        return -torch.lgamma(y + 1)

    def auxiliary(self, y: Rows, aux: Aux) -> Eta:
        shape = _capped(aux["shape"])
        return torch.lgamma(y + shape) - torch.lgamma(shape)

    def auxiliary_score(self, y: Rows, aux: Aux) -> dict[str, Eta]:
        shape = _capped(aux["shape"])
        return {"shape": (torch.digamma(y + shape) - torch.digamma(shape)) * (shape < POISSON_LIKE)}

    def kernel(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> Eta:
        shape = _capped(aux["shape"])
        t = eta - shape.log()
        return y * t - (y + shape) * softplus(t)

    def kernel_score(self, y: Rows, trials: Rows | None, eta: Eta, aux: Aux) -> tuple[Eta, dict[str, Eta]]:
        shape = _capped(aux["shape"])
        t = eta - shape.log()
        by_t = y - (y + shape) * t.sigmoid()
        return by_t, {"shape": (-by_t / shape - softplus(t)) * (shape < POISSON_LIKE)}

    def simulate(self, trials: Rows | None, eta: Eta, aux: Aux, generator: torch.Generator) -> Eta:
        shape = aux["shape"][:, None].expand_as(eta).contiguous()
        rate = torch._standard_gamma(shape, generator=generator) / shape
        return torch.poisson((rate.log() + eta).clamp_max(_MOST_LOG_RATE).exp(), generator=generator)


FAMILIES: dict[str, Family] = {
    "gaussian": Gaussian(),
    "bernoulli": Binomial("bernoulli"),
    "binomial": Binomial(),
    "poisson": Poisson(),
    "negative-binomial": NegativeBinomial(),
    "student-t": StudentT(),
}
_ALIASES = {
    "normal": "gaussian", "logistic": "bernoulli", "negbinomial": "negative-binomial", "student": "student-t",
    "negative_binomial": "negative-binomial", "student_t": "student-t", "t": "student-t",
}  # fmt: skip


def family_named(name: str) -> Family:
    """The family of this name (`normal`, `student`, ... also work); raises InputError that lists all."""
    key = _ALIASES.get(name.lower(), name.lower())
    if key not in FAMILIES:
        raise InputError(f"--family {name} is unknown: choose {', '.join(FAMILIES)}")
    return FAMILIES[key]


def check_response(
    family: Family, y: Float64[np.ndarray, " N"], trials: Float64[np.ndarray, " N"] | None, name: str, two_levels: bool
) -> None:
    """Refuse responses that the family cannot have produced; `two_levels` says that y stands for two text categories.

    Raises InputError with the row and value at fault and a family that would fit.
    """

    def first(bad: np.ndarray) -> str:
        row = int(bad.argmax())
        return f"{y[row]:g} in row {row + 1}"

    if (bad := ~np.isfinite(y)).any():
        raise InputError(f'the response "{name}" must be finite, but is {first(bad)}: mend or drop that row')
    if trials is not None:
        if family.name != "binomial":
            raise InputError(f'the response "{name}" counts successes of trials: use --family binomial')
        if (bad := ~np.isfinite(trials) | (trials < 0) | (trials != np.floor(trials))).any():
            raise InputError(
                f'the trials of "{name}" must be whole numbers of 0 or more: look at row {bad.argmax() + 1}'
            )
        if (bad := y > trials).any():
            raise InputError(f'"{name}": {first(bad)} exceeds its {trials[int(bad.argmax())]:g} trials')
    if family.name == "binomial" and trials is None:
        raise InputError(f"--family binomial wants the trials as well: write p({name}, n) ~ ..., or use bernoulli")
    if two_levels and family.name != "bernoulli":
        raise InputError(f'the response "{name}" is text of two categories: use --family bernoulli')
    if family.name == "bernoulli" and (bad := (y != 0) & (y != 1)).any():
        raise InputError(f'--family bernoulli wants "{name}" to be 0 or 1, or text of two categories, not {first(bad)}')
    if family.name in ("binomial", "poisson", "negative-binomial"):
        if (bad := y < 0).any():
            raise InputError(f'--family {family.name} wants "{name}" to be 0 or more, not {first(bad)}: try gaussian')
        if (bad := y != np.floor(y)).any():
            raise InputError(
                f'--family {family.name} wants "{name}" to be whole numbers, not {first(bad)}: try gaussian'
            )


def guess_family(
    y: Float64[np.ndarray, " N"], trials: Float64[np.ndarray, " N"] | None, two_levels: bool
) -> tuple[Family, str]:
    """A family from the look of a response, and the reason in words."""
    if trials is not None:
        return FAMILIES["binomial"], "successes of trials"
    if two_levels or (np.isin(y, (0.0, 1.0)).all() and len(np.unique(y)) == 2):
        return FAMILIES["bernoulli"], "two values"
    whole = bool(np.isfinite(y).all() and (y >= 0).all() and (y == np.floor(y)).all())
    # scores and years are whole numbers too: counts reach down to 0 and are small on average
    if whole and (y == 0).any() and y.max() > 1 and y.mean() < 50:
        if y.var() > 1.5 * y.mean():
            return FAMILIES["negative-binomial"], "counts that vary more than Poisson's"
        return FAMILIES["poisson"], "counts from 0"
    return FAMILIES["gaussian"], "numbers"

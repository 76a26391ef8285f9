"""The posterior of a generalised linear model with or without group effects, as a Density.

z holds the coefficients' coordinates, then `sigma`, `nu` or `shape`, then the group effects.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hsivi_cli.targets.coordinates import Coordinates, Mapped
from hsivi_cli.targets.density import Density, Predictive
from hsivi_cli.targets.families import Aux, Binomial, Family, Poisson
from hsivi_cli.targets.group_effects import Effects, Flat, GroupEffects
from hsivi_cli.targets.priors import PriorStack
from hsivi_cli.targets.regression_linearised import LeastSquares, linearisation

Z = Float[Tensor, "n d"]
_CHUNK = 1 << 16  # entries of an (n, rows) block that stays in the cache
_GRAPH = 1 << 22  # entries up to which autograd may keep what it needs, 32 MB an intermediate


@dataclass(frozen=True)
class Regression:
    """A model and its data, ready to evaluate; the fields of the affine map are those of CoefficientMap.

    `y` and `trials` have shape (N,), `matrix` (N, k), `base` (N,) with the offset in it; `names` are the k
    coefficients' names.
    """

    name: str
    family: Family
    y: Float64[Tensor, " N"]
    trials: Float64[Tensor, " N"] | None
    names: tuple[str, ...]
    matrix: Float64[Tensor, "N k"]
    base: Float64[Tensor, " N"]
    start: Float64[Tensor, " k"]
    slope: Float64[Tensor, "k k"]
    prior_start: Float64[Tensor, " k"]
    prior_slope: Float64[Tensor, "k k"]
    log_det: float
    coordinates: Coordinates
    coefficient_priors: PriorStack
    aux_coordinates: Coordinates
    aux_priors: PriorStack
    groups: GroupEffects | None
    facts: tuple[str, ...]

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.names) + len(self.family.aux) + (self.groups.dim if self.groups else 0)

    def density(self) -> Density:
        """The Density of this posterior."""
        evaluate = _Evaluation(self)
        proper = self.coefficient_priors.proper and self.aux_priors.proper and (not self.groups or self.groups.proper)
        predictive = Predictive(
            observed=self.y,
            simulate=evaluate.simulate,
            log_likelihood=evaluate.pointwise,
            prior=evaluate.sample_prior if proper else None,
            condition=lambda response: replace(self, y=response.to(torch.float64)).density(),
        )
        return Density(
            name=self.name,
            dim=self.dim,
            log_prob=evaluate.log_prob,
            constrain=evaluate.constrain,
            analytic_gradient=evaluate.gradient,
            predictive=predictive,
            facts=self.facts,
            proper_prior=proper,
            initial=torch.zeros(self.dim, dtype=torch.float64),
            linearise=evaluate.linearise,
        )


class _Evaluation:
    """What depends on the response is computed once, here."""

    def __init__(self, model: Regression) -> None:
        self.model = model
        family, y = model.family, model.y
        self.constant = family.constant(y, model.trials)
        self.total_constant = float(self.constant.sum())
        values, counts = torch.unique(y, return_counts=True) if family.name == "negative-binomial" else (y[:1], None)
        self.values = values
        self.counts = counts.to(y.dtype) if counts is not None else torch.tensor([float(len(y))], dtype=y.dtype)
        # the gaussian likelihood through its sufficient statistics, about the least squares solution so that nothing
        # cancels: |y - eta|^2 = least + |root (h - best)|^2
        self.sufficient = family.name == "gaussian" and model.groups is None
        self.sums: LeastSquares | None = None
        if self.sufficient:
            residual = y - model.base
            gram = model.matrix.T @ model.matrix
            along = model.matrix.T @ residual
            length = gram.diagonal().clamp_min(1e-300).sqrt()
            factor, failed = torch.linalg.cholesky_ex(gram / length / length[:, None])
            if bool(failed) or not bool((factor.diagonal() > 1e-3).all()):  # the columns are all but dependent
                eigenvalues, vectors = torch.linalg.eigh(gram)
                kept = eigenvalues > 1e-13 * eigenvalues.max() if len(eigenvalues) else eigenvalues > 0
                inverse = torch.where(kept, 1 / eigenvalues.clamp_min(1e-300), 0.0)
                self.best = vectors @ (inverse * (vectors.T @ along))
                self.root = torch.where(kept, eigenvalues, 0.0).sqrt()[:, None] * vectors.T
            else:
                self.best = torch.cholesky_solve((along / length)[:, None], factor)[:, 0] / length
                self.root = factor.T * length
            self.gram = gram
            self.least = float(((residual - model.matrix @ self.best) ** 2).sum())
            self.sums = LeastSquares(self.root.numpy(), self.best.numpy(), self.least)

        self.linearise = linearisation(model, self.sums)
        # with a canonical link the responses enter through y'eta alone, which is linear in h
        self.canonical = family if isinstance(family, Binomial | Poisson) and not model.groups else None
        self.along, self.level = (model.matrix.T @ y, float(y @ model.base)) if self.canonical else (y[:0], 0.0)

    def split(self, z: Z) -> tuple[Mapped, Mapped, Aux, Z]:
        """Coefficients' h, aux as mapped and by name, and the group effects' part of z."""
        k, a = len(self.model.names), len(self.model.family.aux)
        coefficients = self.model.coordinates.map(z[:, :k])
        aux = self.model.aux_coordinates.map(z[:, k : k + a])
        return coefficients, aux, dict(zip(self.model.family.aux, aux.x.unbind(1), strict=True)), z[:, k + a :]

    def log_prob(self, z: Z) -> Float[Tensor, " n"]:
        """Log prior, log likelihood, log Jacobian."""
        model = self.model
        coefficients, aux, named, rest = self.split(z)
        h = coefficients.x
        value = model.coefficient_priors.log_density(model.prior_start + h @ model.prior_slope.T)
        value = value + coefficients.log_slope.sum(1) + model.log_det
        value = value + model.aux_priors.log_density(aux.x) + aux.log_slope.sum(1)
        effects: list[Effects] = []
        if model.groups:
            effects = model.groups.unpack(rest)
            value = value + model.groups.log_prior(effects)
        return value + self.log_likelihood(h, named, [effect.r for effect in effects])

    def log_likelihood(self, h: Z, aux: Aux, effects: list[Flat]) -> Float[Tensor, " n"]:
        """Sum over the rows."""
        model = self.model
        if self.sufficient:
            sigma, rows = aux["sigma"], len(model.y)
            squares = self.least + (((h - self.best) @ self.root.T) ** 2).sum(1)
            return -0.5 * squares / sigma**2 - rows * sigma.log() - 0.5 * rows * math.log(2 * math.pi)
        value = torch.full((len(h),), self.total_constant + self.level, dtype=h.dtype)
        if self.canonical:
            value = value + h @ self.along
        if aux:
            value = value + (model.family.auxiliary(self.values, aux) * self.counts).sum(1)
        for rows_ in self.chunks(len(h)):
            value = value + _light(self._kernel_sum, h, aux, effects, rows_, len(h) * len(model.y))[0]
        return value

    def _kernel_sum(self, h: Z, aux: Aux, effects: list[Flat], rows: slice) -> tuple[Tensor, ...]:
        eta = self.eta(h, effects, rows)
        if self.canonical:
            return (-self.canonical.partition(self._trials(rows), eta).sum(1),)
        return (self.model.family.kernel(self.model.y[rows], self._trials(rows), eta, aux).sum(1),)

    def eta(self, h: Z, effects: list[Flat], rows: slice) -> Float[Tensor, "n rows"]:
        """The linear predictor in these rows."""
        eta = torch.addmm(self.model.base[rows], h, self.model.matrix[rows].T)
        return eta + self.model.groups.predictor(effects, rows) if self.model.groups else eta

    def gradient(self, z: Z) -> Z:
        """The derivative of `log_prob` in closed form; plain differentiable torch."""
        model = self.model
        if model.groups and self.linearise is not None and not torch.is_grad_enabled():
            # sums over groups are sparse products there: half the time
            at_once = max(16, 2 * _CHUNK // len(model.y))
            with np.errstate(all="ignore"):
                return torch.from_numpy(np.concatenate([self.linearise(part.numpy())[0] for part in z.split(at_once)]))
        coefficients, aux, named, rest = self.split(z)
        effects = model.groups.unpack(rest) if model.groups else []
        by_groups: list[Flat] = []
        h = coefficients.x
        by_h = model.coefficient_priors.score(model.prior_start + h @ model.prior_slope.T) @ model.prior_slope
        by_aux = model.aux_priors.score(aux.x)
        if self.sufficient:
            sigma, away = named["sigma"][:, None], h - self.best
            squares = self.least + ((away @ self.root.T) ** 2).sum(1, keepdim=True)
            by_h = by_h - away @ self.gram / sigma**2
            by_aux = by_aux + squares / sigma**3 - len(model.y) / sigma
        else:
            if named:
                parts = model.family.auxiliary_score(self.values, named)
                by_aux = by_aux + torch.stack([(parts[name] * self.counts).sum(1) for name in named], 1)
            total: list[Tensor] = [by_h + self.along if self.canonical else by_h, by_aux]
            r = [effect.r for effect in effects]
            for rows in self.chunks(len(z)):
                more = _light(self._score_sum, h, named, r, rows, len(z) * len(model.y))
                total = [sum_ + part for sum_, part in zip(total, more, strict=False)] + list(more[len(total) :])
            by_h, by_aux, *by_groups = total
        by_z = [by_h * coefficients.slope + coefficients.bend, by_aux * aux.slope + aux.bend]
        if model.groups:
            by_z.append(model.groups.score(effects, by_groups))
        return torch.cat(by_z, 1)

    def _score_sum(self, h: Z, aux: Aux, effects: list[Flat], rows: slice) -> tuple[Tensor, ...]:
        eta = self.eta(h, effects, rows)
        if self.canonical:
            return -(self.canonical.mean(self._trials(rows), eta) @ self.model.matrix[rows]), h.new_zeros(len(h), 0)
        by_eta, by_aux = self.model.family.kernel_score(self.model.y[rows], self._trials(rows), eta, aux)
        stacked = torch.stack([by_aux[name].sum(1) for name in aux], 1) if aux else h.new_zeros(len(h), 0)
        groups = self.model.groups.collect(by_eta, rows) if self.model.groups else ()
        return by_eta @ self.model.matrix[rows], stacked, *groups

    def constrain(self, z: Z) -> dict[str, Float[Tensor, " n"]]:
        """Every parameter under the user's names and on the original scale, one number each."""
        coefficients, _, aux, rest = self.split(z)
        theta = self.model.start + coefficients.x @ self.model.slope.T
        values = dict(zip(self.model.names, theta.unbind(1), strict=True)) | aux
        if self.model.groups:
            values |= self.model.groups.named(self.model.groups.unpack(rest))
        return values

    def pointwise(self, z: Z) -> Float[Tensor, "n N"]:
        """Log likelihood of each row."""
        coefficients, _, aux, rest = self.split(z)
        effects = [e.r for e in self.model.groups.unpack(rest)] if self.model.groups else []
        eta = self.eta(coefficients.x, effects, slice(None))
        value = self.constant + self.model.family.kernel(self.model.y, self.model.trials, eta, aux)
        return value + self.model.family.auxiliary(self.model.y, aux) if aux else value

    def simulate(self, z: Z, generator: torch.Generator) -> Float[Tensor, "n N"]:
        """One replicated response a row of z."""
        with torch.no_grad():
            coefficients, _, aux, rest = self.split(z)
            effects = [e.r for e in self.model.groups.unpack(rest)] if self.model.groups else []
            eta = self.eta(coefficients.x, effects, slice(None))
            return self.model.family.simulate(self.model.trials, eta, aux, generator)

    def sample_prior(self, n: int, generator: torch.Generator) -> Z:
        """z from the prior."""
        model = self.model
        wanted = model.coefficient_priors.sample(n, generator)
        h = torch.linalg.solve(model.prior_slope, (wanted - model.prior_start).T).T if model.names else wanted
        # a bounded coefficient is its own coordinate: keep it exactly inside its bounds
        bounded = model.coordinates.half | model.coordinates.interval
        h = torch.where(bounded, wanted, h)
        parts = [model.coordinates.invert(h)]
        if model.family.aux:
            parts.append(model.aux_coordinates.invert(model.aux_priors.sample(n, generator)))
        if model.groups:
            parts.append(model.groups.sample_prior(n, generator))
        return torch.cat(parts, 1)

    def chunks(self, n: int) -> list[slice]:
        """Blocks of rows of which an (n, rows) matrix stays small."""
        rows = len(self.model.y)
        recomputed = torch.is_grad_enabled() and n * rows > _GRAPH  # fewer, larger pieces
        size = max(1, (8 * _CHUNK if recomputed else _CHUNK) // max(n, 1))
        if self.model.groups:  # each block sums over all levels
            size = max(size, min(2 * self.model.groups.width, _GRAPH // max(n, 1)))
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _trials(self, rows: slice) -> Float64[Tensor, " rows"] | None:
        return None if self.model.trials is None else self.model.trials[rows]


def _light(
    function: Callable[..., tuple[Tensor, ...]], h: Z, aux: Aux, effects: list[Flat], rows: slice, entries: int
) -> tuple[Tensor, ...]:
    """The function's values; where their graph would be large, they are computed again on the way back instead."""
    tensors = (h, *aux.values(), *effects)
    if entries <= _GRAPH or not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return function(h, aux, effects, rows)

    def unpacked(h: Z, *others: Tensor) -> tuple[Tensor, ...]:
        return function(h, dict(zip(aux, others[: len(aux)], strict=True)), list(others[len(aux) :]), rows)

    found: tuple[Tensor, ...] = _Recomputed.apply(unpacked, *tensors)
    return found


class _Recomputed(torch.autograd.Function):
    """A function without its graph; torch.utils.checkpoint does the same, but loads a compiler first, for seconds."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *by_value: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # the derivative is itself to be differentiated
        with torch.enable_grad():
            # a view: a path of its own, apart from what by_value owes to the same tensors
            inputs = [t.view_as(t) if again and t.requires_grad else t.detach() for t in ctx.saved_tensors]
            inputs = [t if t.requires_grad else t.requires_grad_(True) for t in inputs]
            values = ctx.function(*inputs)
            pairs = [(v, g) for v, g in zip(values, by_value, strict=True) if v.requires_grad]
            outputs, weights = [v for v, _ in pairs], [g for _, g in pairs]
            return None, *torch.autograd.grad(outputs, inputs, weights, create_graph=again, allow_unused=True)

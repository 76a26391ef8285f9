"""A regression's gradient and Hessian products in closed form, in numpy: `Density.linearise` of `Regression.density`.

What a Langevin path is fastest with, and what makes a Hessian of hundreds of coordinates cheap: one product with all
unit vectors. z is (coefficients, sigma, then for each block of group effects log-sds, correlations, standard normals).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hsivi_cli.targets.coordinates import Coordinates
from hsivi_cli.targets.density import Linearised
from hsivi_cli.targets.group_effects import Correlations, GroupEffects
from hsivi_cli.targets.priors import PriorStack

if TYPE_CHECKING:
    from hsivi_cli.targets.regression_model import Regression

Array = np.ndarray
FAMILIES = ("gaussian", "bernoulli", "binomial", "poisson")


@dataclass(frozen=True)
class LeastSquares:
    """`|y - eta|^2 = least + |root (h - best)|^2`: k rows stand for all of a gaussian's."""

    root: Array
    best: Array
    least: float


def linearisation(model: "Regression", sums: LeastSquares | None = None) -> Callable[[Array], Linearised] | None:
    """`linearise` of this model; None for families with a shape, for bounded coefficients and doubly bounded scales.

    Products also take any number of rows at once where the point was one row. `sums` take the place of a gaussian's
    rows where there are no group effects.
    """
    positive = [model.aux_coordinates, *(model.groups.coordinates if model.groups else [])]
    if model.family.name not in FAMILIES or not model.coordinates.free:
        return None
    if not all(bool(coordinates.half.all()) for coordinates in positive):
        return None
    return _Linearisation(model, sums)


class _Linearisation:
    """Everything that does not depend on z, as arrays."""

    def __init__(self, model: "Regression", sums: LeastSquares | None) -> None:
        self.count, self.sigmas = len(model.names), len(model.family.aux)
        self.responses, self.least = len(model.y), 0.0
        rows, self.base, self.y = model.matrix.numpy(), model.base.numpy(), model.y.numpy()
        if sums is not None:
            rows, self.least = sums.root, sums.least
            self.base, self.y = np.zeros(len(rows)), rows @ sums.best
        self.rows, self.columns = np.ascontiguousarray(rows), np.ascontiguousarray(rows.T)
        self.family, self.trials = model.family.name, 1.0 if model.trials is None else model.trials.numpy()
        self.prior = _Prior(model.coefficient_priors)
        self.prior_start, self.prior_slope = model.prior_start.numpy(), model.prior_slope.numpy()
        self.sigma = _Positive(model.aux_coordinates, model.aux_priors) if self.sigmas else None
        self.blocks = _blocks(model.groups) if model.groups else []

    def __call__(self, z: Array) -> Linearised:
        """Gradient (n, d) at the rows of z, and `v -> H v`."""
        k, a = self.count, self.sigmas
        h = z[:, :k]
        eta = self.base + h @ self.columns
        at = [block.at(z[:, block.part(k + a)]) for block in self.blocks]
        for block, here in zip(self.blocks, at, strict=True):
            eta += block.predictor(here.r)
        score, bend = self.prior(self.prior_start + h @ self.prior_slope.T)
        sigma = self.sigma(z[:, k : k + a]) if self.sigma else None
        by_eta, curvature = self._likelihood(eta, sigma.x if sigma else None)
        parts = [score @ self.prior_slope + by_eta @ self.rows]
        if sigma:  # by_eta is the residual over sigma^2
            squares = (by_eta * by_eta).sum(1, keepdims=True) + self.least / sigma.x**4
            by_sigma = squares * sigma.x - self.responses / sigma.x
            parts.append(sigma.score(by_sigma))
        by_r = [block.collect(by_eta) for block in self.blocks]
        parts += [block.score(here, by) for block, here, by in zip(self.blocks, at, by_r, strict=True)]

        def product(v: Array) -> Array:
            vh = v[:, :k]
            eta_dot = vh @ self.columns
            dots = [block.dot(here, v[:, block.part(k + a)]) for block, here in zip(self.blocks, at, strict=True)]
            for block, dot in zip(self.blocks, dots, strict=True):
                eta_dot += block.predictor(dot.r)
            by_eta_dot = curvature * eta_dot
            pieces = []
            if sigma:
                sigma_dot = sigma.slope * v[:, k : k + a]
                along = (by_eta * eta_dot).sum(1, keepdims=True)
                by_eta_dot -= (2 / sigma.x * sigma_dot) * by_eta
                second = -3 * squares + self.responses / sigma.x**2
                pieces.append(sigma.product(by_sigma, -2 * along / sigma.x + second * sigma_dot, sigma_dot))
            by_h = ((vh @ self.prior_slope.T) * bend) @ self.prior_slope + by_eta_dot @ self.rows
            for block, here, dot, by in zip(self.blocks, at, dots, by_r, strict=True):
                pieces.append(block.product(here, dot, by, block.collect(by_eta_dot)))
            return np.concatenate([by_h, *pieces], 1) if pieces else by_h

        return (np.concatenate(parts, 1) if len(parts) > 1 else parts[0]), product

    def _likelihood(self, eta: Array, sigma: Array | None) -> tuple[Array, Array]:
        """First and second derivative of the log likelihood by each row's eta."""
        if sigma is not None:
            return (self.y - eta) / sigma**2, -1 / sigma**2
        if self.family == "poisson":
            rate = np.exp(eta)
            return self.y - rate, -rate
        t = 0.5 * np.tanh(0.5 * eta)  # the probability less one half
        return self.y - self.trials * (t + 0.5), self.trials * (t * t - 0.25)


@dataclass(frozen=True)
class _Value:
    """Positive parameters at n points: x, dx/dz, and of their log prior and log slope what `score` needs."""

    x: Array
    slope: Array
    rate: Array
    prior_score: Array
    prior_bend: Array

    def score(self, by_x: Array) -> Array:
        """The derivative by z of prior, Jacobian and a function whose derivative by x is `by_x`."""
        return (self.prior_score + by_x) * self.slope + self.rate

    def product(self, by_x: Array, by_x_dot: Array, x_dot: Array) -> Array:
        """The change of `score`."""
        total = by_x_dot + self.prior_bend * x_dot
        return total * self.slope + (self.prior_score + by_x) * self.rate * x_dot


class _Positive:
    """Parameters `x = lower + unit exp(rate z)` with their priors."""

    def __init__(self, coordinates: Coordinates, priors: PriorStack) -> None:
        self.lower, self.unit, self.rate = (t.numpy() for t in (coordinates.lower, coordinates.unit, coordinates.rate))
        self.prior = _Prior(priors)

    def __call__(self, z: Array) -> _Value:
        grown = self.unit * np.exp(self.rate * z)
        x = self.lower + grown
        return _Value(x, self.rate * grown, self.rate, *self.prior(x))


class _Prior:
    """Score and second derivative of independent priors, column by column."""

    def __init__(self, priors: PriorStack) -> None:
        self.kinds: dict[str, tuple[list[int], list[Array]]] = {}
        for name in dict.fromkeys(prior.name for prior in priors.priors):
            index = [i for i, prior in enumerate(priors.priors) if prior.name == name]
            columns = zip(*(priors.priors[i].arguments for i in index), strict=True)
            self.kinds[name] = index, [np.array(column) for column in columns]

    def __call__(self, x: Array) -> tuple[Array, Array]:
        if len(self.kinds) == 1:
            ((name, (_, arguments)),) = self.kinds.items()
            return _score_and_bend(name, x, arguments)
        score, bend = np.zeros_like(x), np.zeros_like(x)
        for name, (index, arguments) in self.kinds.items():
            score[:, index], bend[:, index] = _score_and_bend(name, x[:, index], arguments)
        return score, bend


def _score_and_bend(name: str, x: Array, a: list[Array]) -> tuple[Array, Array]:
    """First and second derivative by x of the log densities of `targets.priors`."""
    match name:
        case "normal":
            precision = 1 / a[1] ** 2
            return (a[0] - x) * precision, -precision
        case "student_t" | "cauchy":
            nu, location, scale = (np.ones(1), *a) if name == "cauchy" else a
            away, whole = x - location, nu * scale**2 + (x - location) ** 2
            return -(nu + 1) * away / whole, -(nu + 1) * (nu * scale**2 - away**2) / whole**2
        case "gamma":
            return (a[0] - 1) / x - a[1], -(a[0] - 1) / x**2
        case "inverse_gamma":
            return -(a[0] + 1) / x + a[1] / x**2, (a[0] + 1) / x**2 - 2 * a[1] / x**3
        case "exponential":
            return np.zeros_like(x) - a[0], np.zeros_like(x)
        case "lognormal":
            away = (np.log(x) - a[0]) / a[1] ** 2
            return -(away + 1) / x, (away + 1 - 1 / a[1] ** 2) / x**2
        case _:  # flat, uniform
            return np.zeros_like(x), np.zeros_like(x)


@dataclass(frozen=True)
class _Effects:
    """A block at n points: sds, the factor L with what its derivative needs, u, `scaled = u L'`, and r."""

    sd: _Value
    tanh: Array
    reach: Array
    factor: Array
    u: Array
    scaled: Array
    r: Array


@dataclass(frozen=True)
class _Dots:
    """The change of a block along v: of y (as a square), log reach, L, u, sd, scaled and r."""

    y: Array
    log_reach: Array
    factor: Array
    u: Array
    sd: Array
    scaled: Array
    r: Array


def _blocks(groups: GroupEffects) -> list["_Block"]:
    return [_Block(groups, i) for i in range(len(groups.blocks))]


class _Block:
    """One block `(terms | factor)`; the notation is that of `targets.group_effects`."""

    def __init__(self, groups: GroupEffects, i: int) -> None:
        from scipy.sparse import csr_matrix

        block, self.slice = groups.blocks[i], groups.slices[i]
        self.q, self.levels = len(block.terms), len(block.levels)
        self.law: Correlations = groups.correlations[i]
        self.corners = len(self.law.a)
        self.positions, self.a2 = self.law.positions.numpy(), 2 * self.law.a.numpy()
        self.sd = _Positive(groups.coordinates[i], groups.stacks[i])
        places, values = groups.places[i].numpy(), groups.values[i].numpy()
        rows = np.broadcast_to(np.arange(places.shape[1]), places.shape)
        shape = (places.shape[1], self.levels * self.q)
        self.design = csr_matrix((values.ravel(), (rows.ravel(), places.ravel())), shape=shape)
        self.transposed = self.design.T.tocsr()

    def part(self, offset: int) -> slice:
        """Where the block is in z."""
        return slice(offset + self.slice.start, offset + self.slice.stop)

    def predictor(self, r: Array) -> Array:
        """What effects (n, J, q) add to eta, (n, N)."""
        return (self.design @ r.reshape(len(r), -1).T).T

    def collect(self, by_eta: Array) -> Array:
        """Derivatives by the effects, (n, J, q)."""
        return (self.transposed @ by_eta.T).T.reshape(len(by_eta), self.levels, self.q)

    def at(self, own: Array) -> _Effects:
        q, c = self.q, self.corners
        sd, u = self.sd(own[:, :q]), own[:, q + c :].reshape(len(own), self.levels, q)
        y = self._square(own[:, q : q + c])
        tanh, log_sech = np.tanh(y), np.log(2.0) - np.logaddexp(y, -y)
        reach = np.exp(np.cumsum(log_sech, 2) - log_sech)
        factor = (tanh + np.eye(q)) * reach
        scaled = u @ factor.transpose(0, 2, 1) if c else u
        return _Effects(sd, tanh, reach, factor, u, scaled, scaled * sd.x[:, None])

    def score(self, at: _Effects, by_r: Array) -> Array:
        by_scaled = by_r * at.sd.x[:, None]
        parts = [at.sd.score((by_r * at.scaled).sum(1))]
        if self.corners:
            by_factor = by_scaled.transpose(0, 2, 1) @ at.u
            along = by_factor * at.factor
            after = along.sum(2, keepdims=True) - np.cumsum(along, 2)
            by_t = by_factor * at.reach * (1 - at.tanh**2)
            parts.append(self._corner(by_t - at.tanh * after) - self._corner(at.tanh) * self.a2)
            by_scaled = by_scaled @ at.factor
        return np.concatenate([*parts, (by_scaled - at.u).reshape(len(at.u), -1)], 1)

    def dot(self, at: _Effects, v: Array) -> _Dots:
        q, c = self.q, self.corners
        u, sd = v[:, q + c :].reshape(len(v), self.levels, q), at.sd.slope * v[:, :q]
        y = self._square(v[:, q : q + c])
        turned = -at.tanh * y
        log_reach = np.cumsum(turned, 2) - turned
        factor = (1 - at.tanh**2) * y * at.reach + at.factor * log_reach
        scaled = u
        if c:
            scaled = u @ at.factor.transpose(0, 2, 1) + at.u @ factor.transpose(0, 2, 1)
        return _Dots(y, log_reach, factor, u, sd, scaled, scaled * at.sd.x[:, None] + at.scaled * sd[:, None])

    def product(self, at: _Effects, dot: _Dots, by_r: Array, by_r_dot: Array) -> Array:
        by_scaled = by_r * at.sd.x[:, None]
        by_scaled_dot = by_r_dot * at.sd.x[:, None] + by_r * dot.sd[:, None]
        by_sd_dot = (by_r_dot * at.scaled + by_r * dot.scaled).sum(1)
        parts = [at.sd.product((by_r * at.scaled).sum(1), by_sd_dot, dot.sd)]
        by_u_dot = by_scaled_dot
        if self.corners:
            by_factor = by_scaled.transpose(0, 2, 1) @ at.u
            by_factor_dot = by_scaled_dot.transpose(0, 2, 1) @ at.u + by_scaled.transpose(0, 2, 1) @ dot.u
            along = by_factor * at.factor
            along_dot = by_factor_dot * at.factor + by_factor * dot.factor
            after = along.sum(2, keepdims=True) - np.cumsum(along, 2)
            after_dot = along_dot.sum(2, keepdims=True) - np.cumsum(along_dot, 2)
            sech2, reach = 1 - at.tanh**2, at.reach
            tanh_dot = sech2 * dot.y
            change = by_factor_dot + by_factor * (dot.log_reach - 2 * at.tanh * dot.y)
            total = change * reach * sech2 - tanh_dot * after - at.tanh * after_dot
            parts.append(self._corner(total) - self._corner(tanh_dot) * self.a2)
            by_u_dot = by_scaled_dot @ at.factor + by_scaled @ dot.factor
        return np.concatenate([*parts, (by_u_dot - dot.u).reshape(len(dot.u), -1)], 1)

    def _square(self, corners: Array) -> Array:
        square = np.zeros((len(corners), self.q**2))
        square[:, self.positions] = corners
        return square.reshape(-1, self.q, self.q)

    def _corner(self, square: Array) -> Array:
        return square.reshape(len(square), -1)[:, self.positions]

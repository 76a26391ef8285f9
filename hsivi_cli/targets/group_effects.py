"""Group effects `(x | g)` in non-centred form: `r_j = diag(sd) L u_j` with `u_j ~ normal(0, 1)`, `L L' ~ LKJ(eta)`.

Lewandowski, Kurowicka and Joe (2009): with partial correlations `t_ij = tanh(y_ij)`, i > j, the factor has
`L_ij = t_ij prod_{k<j} sech(y_ik)` and `L_ii = prod_{k<i} sech(y_ik)`, and L L' is LKJ(eta) where the `(t_ij + 1) / 2`
are independent Beta(a_j, a_j) with `a_j = eta + (q - 1 - j) / 2`, j counted from 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import softplus

from hsivi_cli.targets.coordinates import Coordinates, Mapped, positive_rate
from hsivi_cli.targets.formula import GroupBlock
from hsivi_cli.targets.priors import Prior, PriorStack

Flat = Float[Tensor, "n Jq"]  # the effects of a block, those of a level side by side


@dataclass(frozen=True)
class Effects:
    """One block at n points: the effects `r` (n, J, q) = `scaled` by sd, of the standard normals `u` (n, J, q).

    `sd` are the q sds with their derivatives; `factor` is L (n, q, q) and `partial` its y (n, q (q - 1) / 2), None for
    q = 1; `scaled` is `u L'`.
    """

    sd: Mapped
    partial: Float[Tensor, "n c"] | None
    factor: Float[Tensor, "n q q"] | None
    u: Float[Tensor, "n J q"]
    scaled: Float[Tensor, "n J q"]

    @property
    def r(self) -> Flat:
        """The effects in a row: level 1 with its q terms, level 2, ..."""
        return (self.scaled * self.sd.x[:, None, :]).flatten(1)


class Correlations:
    """LKJ(eta) on the Cholesky factors of q x q correlations, in the coordinates y of the module's docstring."""

    def __init__(self, q: int, eta: float) -> None:
        rows, columns = torch.tril_indices(q, q, -1)
        self.q, self.positions = q, rows * q + columns
        self.a: Float64[Tensor, " c"] = eta + (q - 2 - columns.to(torch.float64)) / 2
        # the density of t is (1 - t^2)^(a - 1) / (2^(2 a - 1) B(a, a)), and dt / dy is 1 - t^2
        log_beta = 2 * torch.lgamma(self.a) - torch.lgamma(2 * self.a)
        self.constant = -float(((2 * self.a - 1) * math.log(2) + log_beta).sum())

    def log_density(self, y: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        """Of y, all Jacobians included."""
        return 2 * (self.a * _log_sech(y)).sum(1) + self.constant

    def factor(self, y: Float[Tensor, "n c"]) -> Float[Tensor, "n q q"]:
        """L."""
        partial, reach = self._parts(y)
        return partial * reach

    def score(self, y: Float[Tensor, "n c"], by_factor: Float[Tensor, "n q q"]) -> Float[Tensor, "n c"]:
        """The derivative by y of `log_density` plus a function whose derivative by L is `by_factor`."""
        partial, reach = self._parts(y)
        t = self._corners(partial)
        along = by_factor * partial * reach
        # log sech(y_ik) is in L_ij for j = k + 1, ..., i
        after = along.sum(2, keepdim=True) - along.cumsum(2)
        by_t = self._corners(by_factor * reach) * (2 * _log_sech(y)).exp()
        return by_t - t * (self._corners(after) + 2 * self.a)

    def sample(self, n: int, generator: torch.Generator) -> Float64[Tensor, "n c"]:
        """y from its prior."""
        g = torch._standard_gamma(self.a.expand(2, n, -1).contiguous(), generator=generator)
        g = g.clamp_min(1e-300)
        return 0.5 * (g[0].log() - g[1].log())

    def _parts(self, y: Float[Tensor, "n c"]) -> tuple[Float[Tensor, "n q q"], Float[Tensor, "n q q"]]:
        """t with ones on the diagonal and zeros above, and the products of sech by which it is multiplied."""
        square = y.new_zeros(len(y), self.q**2).index_copy(1, self.positions, y).reshape(-1, self.q, self.q)
        partial = square.tanh() + torch.eye(self.q, dtype=y.dtype)
        log_sech = _log_sech(square)
        return partial, (log_sech.cumsum(2) - log_sech).exp()

    def _corners(self, square: Float[Tensor, "n q q"]) -> Float[Tensor, "n c"]:
        return square.flatten(1).index_select(1, self.positions)


def _log_sech(y: Tensor) -> Tensor:
    return math.log(2) - y - softplus(-2 * y)


class GroupEffects:
    """All blocks of a model; z has for each block q log-sds, q (q - 1) / 2 correlations, then J q standard normals."""

    def __init__(
        self,
        blocks: tuple[GroupBlock, ...],
        sd: tuple[tuple[Prior, ...], ...],
        correlation: tuple[float, ...],
        unit: float,
    ) -> None:
        self.blocks = blocks
        self.stacks = [PriorStack(priors) for priors in sd]
        self.correlations = [Correlations(len(b.terms), eta) for b, eta in zip(blocks, correlation, strict=True)]
        self.coordinates, self.slices = [], []
        start = 0
        for block, priors in zip(blocks, sd, strict=True):
            q, levels = len(block.terms), len(block.levels)
            spreads = [
                max(float(block.values[:, t].std()), float(abs(block.values[:, t]).mean()), 1e-300) for t in range(q)
            ]
            rate = max(positive_rate(levels), 0.3)
            self.coordinates.append(
                Coordinates(
                    [p.lower for p in priors], [p.upper for p in priors], [0.3 * unit / s for s in spreads], [rate] * q
                )
            )
            end = start + q + q * (q - 1) // 2 + levels * q
            self.slices.append(slice(start, end))
            start = end
        self.dim = start
        self.width = max(len(block.levels) * len(block.terms) for block in blocks)
        # where the effect of a row and term is in `Effects.r`
        self.places = [
            torch.from_numpy(block.index)[None] * len(block.terms) + torch.arange(len(block.terms))[:, None]
            for block in blocks
        ]
        self.values = [torch.from_numpy(block.values).T.contiguous() for block in blocks]
        self.plain = [[bool((row == 1).all()) for row in values] for values in self.values]

    @property
    def proper(self) -> bool:
        """Whether every sd has a proper prior."""
        return all(stack.proper for stack in self.stacks)

    def unpack(self, z: Float64[Tensor, "n d"]) -> list[Effects]:
        """The effects at z."""
        found: list[Effects] = []
        for block, coordinates, correlation, part in zip(
            self.blocks, self.coordinates, self.correlations, self.slices, strict=True
        ):
            q, corners = len(block.terms), len(correlation.a)
            own = z[:, part]
            u = own[:, q + corners :].reshape(len(z), -1, q)
            partial = own[:, q : q + corners] if q > 1 else None
            factor = None if partial is None else correlation.factor(partial)
            scaled = u if factor is None else u @ factor.mT
            found.append(Effects(coordinates.map(own[:, :q]), partial, factor, u, scaled))
        return found

    def log_prior(self, effects: Sequence[Effects]) -> Float[Tensor, " n"]:
        """Log density of z's part of the prior, Jacobians included."""
        total: Tensor | float = 0.0
        for effect, stack, correlation in zip(effects, self.stacks, self.correlations, strict=True):
            total = total + stack.log_density(effect.sd.x) + effect.sd.log_slope.sum(1)
            total = total - 0.5 * (effect.u**2).sum((1, 2)) - 0.5 * effect.u[0].numel() * math.log(2 * math.pi)
            if effect.partial is not None:
                total = total + correlation.log_density(effect.partial)
        assert isinstance(total, Tensor)
        return total

    def score(self, effects: Sequence[Effects], by_r: Sequence[Flat]) -> Float[Tensor, "n d"]:
        """The derivative by z of `log_prior` plus a function whose derivatives by the effects r are `by_r`."""
        parts: list[Tensor] = []
        for effect, by, stack, correlation in zip(effects, by_r, self.stacks, self.correlations, strict=True):
            by_effect = by.reshape(effect.u.shape)
            by_sd = stack.score(effect.sd.x) + (by_effect * effect.scaled).sum(1)
            by_scaled = by_effect * effect.sd.x[:, None, :]
            parts.append(by_sd * effect.sd.slope + effect.sd.bend)
            if effect.partial is None or effect.factor is None:
                parts.append((by_scaled - effect.u).flatten(1))
            else:
                parts.append(correlation.score(effect.partial, by_scaled.mT @ effect.u))
                parts.append((by_scaled @ effect.factor - effect.u).flatten(1))
        return torch.cat(parts, 1)

    def predictor(self, effects: Sequence[Flat], rows: slice) -> Float[Tensor, "n N"]:
        """What the groups' effects r add to eta in these rows."""
        total: Tensor | float = 0.0
        for r, places, values, plain in zip(effects, self.places, self.values, self.plain, strict=True):
            for place, value, is_one in zip(places[:, rows], values[:, rows], plain, strict=True):
                picked = r.gather(1, place.expand(len(r), -1))
                total = total + (picked if is_one else picked * value)
        assert isinstance(total, Tensor)
        return total

    def collect(self, by_eta: Float[Tensor, "n N"], rows: slice) -> tuple[Flat, ...]:
        """The derivatives by each block's r of a function whose derivative by eta in these rows is given."""
        found: list[Tensor] = []
        for block, places, values, plain in zip(self.blocks, self.places, self.values, self.plain, strict=True):
            total = by_eta.new_zeros(len(by_eta), len(block.levels) * len(block.terms))
            for place, value, is_one in zip(places[:, rows], values[:, rows], plain, strict=True):
                total = total.scatter_add(1, place.expand(len(by_eta), -1), by_eta if is_one else by_eta * value)
            found.append(total)
        return tuple(found)

    def named(self, effects: Sequence[Effects]) -> dict[str, Float[Tensor, " n"]]:
        """`sd_g[term]`, `cor_g[term,term]`, and `r_g[level]` (one term) or `r_g[level,term]`."""
        first: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        for block, effect in zip(self.blocks, effects, strict=True):
            g = block.factor
            for t, term in enumerate(block.terms):
                first[f"sd_{g}[{term}]"] = effect.sd.x[:, t]
            if effect.factor is not None:
                correlation = effect.factor @ effect.factor.mT
                for i in range(len(block.terms)):
                    for j in range(i):
                        first[f"cor_{g}[{block.terms[j]},{block.terms[i]}]"] = correlation[:, i, j]
            r = effect.scaled * effect.sd.x[:, None, :]
            for j, level in enumerate(block.levels):
                for t, term in enumerate(block.terms):
                    name = f"r_{g}[{level}]" if block.terms == ("Intercept",) else f"r_{g}[{level},{term}]"
                    last[name] = r[:, j, t]
        return first | last

    def sample_prior(self, n: int, generator: torch.Generator) -> Float64[Tensor, "n d"]:
        """z from its prior."""
        parts: list[Tensor] = []
        for block, stack, coordinates, correlation in zip(
            self.blocks, self.stacks, self.coordinates, self.correlations, strict=True
        ):
            parts.append(coordinates.invert(stack.sample(n, generator)))
            parts.append(correlation.sample(n, generator))
            size = len(block.levels) * len(block.terms)
            parts.append(torch.randn(n, size, generator=generator, dtype=torch.float64))
        return torch.cat(parts, 1)

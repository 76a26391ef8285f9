"""Group effects `(x | g)` in non-centred form: `r_j = diag(sd) L u_j` with `u_j ~ normal(0, 1)`, `L L' ~ LKJ(eta)`.

Lewandowski, Kurowicka and Joe (2009); the factor L comes from unconstrained numbers by torch's CorrCholeskyTransform.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.distributions import LKJCholesky
from torch.distributions.transforms import CorrCholeskyTransform

from hsivi_cli.targets.coordinates import Coordinates, positive_rate
from hsivi_cli.targets.formula import GroupBlock
from hsivi_cli.targets.priors import Prior, PriorStack


@dataclass(frozen=True)
class Effects:
    """One block at n points: `sd` (n, q), `factor` L (n, q, q) or None for q = 1, the effects `r` (n, levels, q)."""

    sd: Float[Tensor, "n q"]
    factor: Float[Tensor, "n q q"] | None
    r: Float[Tensor, "n J q"]


class GroupEffects:
    """All blocks of a model; z has for each block q log-sds, q (q - 1) / 2 correlations, then J q standard normals."""

    def __init__(
        self,
        blocks: tuple[GroupBlock, ...],
        sd: tuple[tuple[Prior, ...], ...],
        correlation: tuple[float, ...],
        unit: float,
    ) -> None:
        self.blocks, self.correlation = blocks, correlation
        self.stacks = [PriorStack(priors) for priors in sd]
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
        self.index = [torch.from_numpy(block.index) for block in blocks]
        self.values = [torch.from_numpy(block.values) for block in blocks]

    @property
    def proper(self) -> bool:
        """Whether every sd has a proper prior."""
        return all(stack.proper for stack in self.stacks)

    def unpack(self, z: Float64[Tensor, "n d"]) -> tuple[list[Effects], Float64[Tensor, " n"]]:
        """The effects at z, and the log density of z's part of the prior, Jacobians included."""
        effects: list[Effects] = []
        total = torch.zeros(len(z), dtype=z.dtype)
        for block, stack, coordinates, part, eta in zip(
            self.blocks, self.stacks, self.coordinates, self.slices, self.correlation, strict=True
        ):
            q, levels = len(block.terms), len(block.levels)
            own = z[:, part]
            corners = q * (q - 1) // 2
            mapped = coordinates.map(own[:, :q])
            u = own[:, q + corners :].reshape(len(z), levels, q)
            total = total + stack.log_density(mapped.x) + mapped.log_slope.sum(1)
            total = total - 0.5 * (u**2).sum((1, 2)) - 0.5 * levels * q * math.log(2 * math.pi)
            factor = None
            if q > 1:
                transform = CorrCholeskyTransform()
                raw = own[:, q : q + corners]
                factor = transform(raw)
                lkj = LKJCholesky(q, torch.tensor(eta, dtype=z.dtype), validate_args=False)
                total = total + lkj.log_prob(factor) + transform.log_abs_det_jacobian(raw, factor)
                u = u @ factor.mT
            effects.append(Effects(mapped.x, factor, u * mapped.x[:, None, :]))
        return effects, total

    def predictor(self, effects: list[Effects], rows: slice) -> Float[Tensor, "n N"]:
        """What the groups add to eta in these rows."""
        total: Tensor | float = 0.0
        for effect, index, values in zip(effects, self.index, self.values, strict=True):
            for term in range(values.shape[1]):
                total = total + effect.r[:, :, term].index_select(1, index[rows]) * values[rows, term]
        assert isinstance(total, Tensor)
        return total

    def named(self, effects: list[Effects]) -> dict[str, Float[Tensor, " n"]]:
        """`sd_g[term]`, `cor_g[term,term]`, and `r_g[level]` (one term) or `r_g[level,term]`."""
        first: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        for block, effect in zip(self.blocks, effects, strict=True):
            g = block.factor
            for t, term in enumerate(block.terms):
                first[f"sd_{g}[{term}]"] = effect.sd[:, t]
            if effect.factor is not None:
                correlation = effect.factor @ effect.factor.mT
                for i in range(len(block.terms)):
                    for j in range(i):
                        first[f"cor_{g}[{block.terms[j]},{block.terms[i]}]"] = correlation[:, i, j]
            for j, level in enumerate(block.levels):
                for t, term in enumerate(block.terms):
                    name = f"r_{g}[{level}]" if block.terms == ("Intercept",) else f"r_{g}[{level},{term}]"
                    last[name] = effect.r[:, j, t]
        return first | last

    def sample_prior(self, n: int, generator: torch.Generator) -> Float64[Tensor, "n d"]:
        """z from its prior."""
        parts: list[Tensor] = []
        for block, stack, coordinates, eta in zip(
            self.blocks, self.stacks, self.coordinates, self.correlation, strict=True
        ):
            q = len(block.terms)
            parts.append(coordinates.invert(stack.sample(n, generator)))
            if q > 1:
                seed = int(torch.randint(2**31, (1,), generator=generator))
                with torch.random.fork_rng(devices=[]):  # LKJCholesky takes no generator
                    torch.manual_seed(seed)
                    factor = LKJCholesky(q, torch.tensor(eta, dtype=torch.float64)).sample(torch.Size((n,)))
                parts.append(CorrCholeskyTransform().inv(factor))
            parts.append(torch.randn(n, len(block.levels) * q, generator=generator, dtype=torch.float64))
        return torch.cat(parts, 1)

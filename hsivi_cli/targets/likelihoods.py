"""Likelihoods of the numbers of a row given the decoder's outputs, each with its exact normalising constant.

Numbers that are missing (NaN) contribute nothing, in value and in gradient. A Bernoulli "likelihood" of grey levels is
no density of anything, so that entries must be what the name says: `Likelihood.check`.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from hsivi_cli.errors import InputError

LikelihoodName = Literal["bernoulli", "gaussian", "categorical", "binomial"]
LIKELIHOODS: tuple[str, ...] = get_args(LikelihoodName)
MOST_LEVELS = 256
ROWS_AT_ONCE = 65536
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Likelihood:
    """`p(x | outputs)`, independent over the D entries of a row; plain JSON fields.

    bernoulli: 0/1, outputs are logits; binomial: genotypes 0/1/2, Binomial(2, p) with logits of p; gaussian: outputs
    are means, the log standard deviation is the model's; categorical: `levels[j]` levels 0..levels[j]-1 in column j,
    outputs are D blocks of max(levels) logits, of which those past a column's own levels count for nothing.
    """

    name: LikelihoodName
    levels: tuple[int, ...] = ()

    def outputs(self, columns: int) -> int:
        """How many numbers P a decoder must give for rows of `columns` entries."""
        return columns * max(self.levels) if self.name == "categorical" else columns

    def log_prob(
        self,
        outputs: Float[Tensor, "*k n P"],
        x: Float[Tensor, "n D"],
        log_sd: Float[Tensor, " D_or_1"] | None = None,
    ) -> Float[Tensor, "*k n"]:
        """Log density of each row, all constants included; `log_sd` for the Gaussian, which needs it."""
        missing = x.isnan()
        gaps = bool(missing.any())
        if gaps:
            x = x.masked_fill(missing, 0.0)
        if self.name == "gaussian":
            assert log_sd is not None
            each = -0.5 * ((x - outputs) * (-log_sd).exp()).square() - log_sd - _HALF_LOG_TWO_PI
        elif self.name == "categorical":
            logits = self._log_probabilities(outputs)
            index = x.long().expand(logits.shape[:-1])[..., None]
            each = logits.gather(-1, index)[..., 0]
        else:
            trials = 2 if self.name == "binomial" else 1
            each = x * outputs - trials * functional.softplus(outputs, threshold=40.0)
            if trials == 2:
                each = each + math.log(2) * (x == 1).to(x.dtype)  # log of the binomial coefficient
        return (each.masked_fill(missing, 0.0) if gaps else each).sum(-1)

    def sample(
        self,
        outputs: Float[Tensor, "*k n P"],
        generator: torch.Generator,
        log_sd: Float[Tensor, " D_or_1"] | None = None,
    ) -> Float[Tensor, "*k n D"]:
        """One draw of x for each row of outputs; noise is made where the generator lives."""
        device, kind = generator.device, outputs.dtype
        if self.name == "gaussian":
            assert log_sd is not None
            noise = torch.randn(outputs.shape, generator=generator, device=device, dtype=kind)
            return outputs + log_sd.exp() * noise.to(outputs.device)
        if self.name == "categorical":
            edges = self._log_probabilities(outputs).exp().cumsum(-1)
            share = torch.rand(edges.shape[:-1], generator=generator, device=device, dtype=kind).to(outputs.device)
            level = (share[..., None] * edges[..., -1:] >= edges).sum(-1)
            return torch.minimum(level, self._last_level(outputs)).to(kind)
        trials = 2 if self.name == "binomial" else 1
        shares = torch.rand((trials, *outputs.shape), generator=generator, device=device, dtype=kind)
        return (shares.to(outputs.device) < outputs.sigmoid()).sum(0).to(kind)

    def mean(self, outputs: Float[Tensor, "*k n P"]) -> Float[Tensor, "*k n D"]:
        """`E[x]` of each entry; of categories, the expected level."""
        if self.name == "gaussian":
            return outputs
        if self.name == "categorical":
            probabilities = self._log_probabilities(outputs).exp()
            level = torch.arange(max(self.levels), device=outputs.device, dtype=outputs.dtype)
            return (probabilities * level).sum(-1)
        return outputs.sigmoid() * (2 if self.name == "binomial" else 1)

    def base(self, x: Float[Tensor, "N D"]) -> Float[Tensor, " P"]:
        """Outputs of a model without latents: means, or logits of the shares in x, each with half a row added."""
        count = torch.zeros(x.shape[1], dtype=torch.float64)
        total = count.clone()
        levels = max(self.levels) if self.name == "categorical" else 0
        tally = torch.zeros(x.shape[1], levels, dtype=torch.float64)
        for block in x.split(ROWS_AT_ONCE):
            count += (~block.isnan()).sum(0)
            total += block.double().nansum(0)
            for level in range(levels):
                tally[:, level] += (block == level).sum(0)
        if self.name == "gaussian":
            return (total / count.clamp_min(1)).to(x.dtype)
        if self.name == "categorical":
            return (tally + 0.5).log().flatten().to(x.dtype)
        trials = 2 if self.name == "binomial" else 1
        return (total + 0.5).log().sub((trials * count - total + 0.5).log()).to(x.dtype)

    def check(self, x: Float[Tensor, "N D"], columns: tuple[str, ...] = ()) -> None:
        """Raise InputError, naming the first column and row (from 1) at fault, unless every entry is possible."""
        for begin in range(0, len(x), ROWS_AT_ONCE):
            block = x[begin : begin + ROWS_AT_ONCE]
            wrong = self._impossible(block) & ~block.isnan()
            if wrong.any():
                row, column = (int(i) for i in wrong.nonzero()[0])
                name = f'"{columns[column]}"' if columns else f"{column + 1}"
                raise InputError(
                    f"column {name}, row {begin + row + 1} is {float(block[row, column]):g}, {self._expected(column)}"
                )

    def _impossible(self, x: Tensor) -> Bool[Tensor, "n D"]:
        if self.name == "gaussian":
            return x.isinf()
        if self.name == "bernoulli":
            return (x != 0) & (x != 1)
        if self.name == "binomial":
            return (x != 0) & (x != 1) & (x != 2)
        return (x != x.floor()) | (x < 0) | (x >= torch.tensor(self.levels or MOST_LEVELS, device=x.device))

    def _expected(self, column: int) -> str:
        if self.name == "gaussian":
            return "which is not finite: remove it, or leave the cell empty where it is missing"
        if self.name == "bernoulli":
            return "but the bernoulli likelihood is for 0 and 1: binarise the rows, or choose gaussian"
        if self.name == "binomial":
            return "but a genotype is 0, 1 or 2: leave the cell empty where it is missing, or choose gaussian"
        most = self.levels[column] - 1 if self.levels else MOST_LEVELS - 1
        return f"but the levels of categories are whole numbers 0..{most}: recode the column, or choose gaussian"

    def _log_probabilities(self, outputs: Tensor) -> Float[Tensor, "*n D levels"]:
        """Log probabilities of every level of every column, -inf past a column's own."""
        most = max(self.levels)
        logits = outputs.unflatten(-1, (len(self.levels), most))
        if min(self.levels) < most:
            beyond = torch.arange(most, device=outputs.device) > self._last_level(outputs)[:, None]
            logits = logits.masked_fill(beyond, -torch.inf)
        return logits.log_softmax(-1)

    def _last_level(self, like: Tensor) -> Tensor:
        return torch.tensor(self.levels, device=like.device) - 1


def likelihood_for(name: str, x: Float[Tensor, "N D"], columns: tuple[str, ...] = ()) -> Likelihood:
    """The likelihood of that name for rows like x, checked; the levels of categories are those that occur in x."""
    if name not in LIKELIHOODS:
        raise InputError(f'there is no likelihood "{name}": choose {", ".join(LIKELIHOODS)}')
    found = Likelihood(name)  # type: ignore[arg-type]
    found.check(x, columns)
    if name != "categorical":
        return found
    highest = torch.zeros(x.shape[1])
    for block in x.split(ROWS_AT_ONCE):
        highest = torch.maximum(highest, block.nan_to_num(nan=0.0).amax(0).float())
    return Likelihood("categorical", tuple(int(level) + 1 for level in highest.tolist()))

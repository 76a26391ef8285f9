"""The small residual network that corrects a backward kernel (Geffner & Domke 2023, released code)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hsivi_cli.bridges.geometric import Linearised

EMBEDDING = 20


class ResidualScore(nn.Module):
    """`s_k(x)`: two residual softplus layers as wide as their input `[x, embedding_k]`, then a linear one.

    The result is multiplied by a learned number that starts at 0, so every method starts at its version without a
    network; until that number moves, nothing else in the network gets a gradient. Float64.
    """

    def __init__(self, inputs: int, outputs: int, transitions: int, generator: torch.Generator) -> None:
        super().__init__()
        width = inputs + EMBEDDING

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

        def glorot(rows: int, columns: int) -> nn.Parameter:
            return normal(rows, columns, scale=(2 / (rows + columns)) ** 0.5)

        self.embedding = normal(transitions, EMBEDDING, scale=0.05)
        self.weight_1, self.bias_1 = glorot(width, width), normal(width, scale=0.01)
        self.weight_2, self.bias_2 = glorot(width, width), normal(width, scale=0.01)
        self.weight_3, self.bias_3 = glorot(outputs, width), normal(outputs, scale=0.01)
        self.factor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Float[Tensor, "k n inputs"]) -> Float[Tensor, "k n outputs"]:
        """The scores of the first transitions, row k of `x` belonging to transition k."""
        count, rows, _ = x.shape
        embedding = self.embedding[:count, None].expand(-1, rows, -1)
        return self._layers(torch.cat([x, embedding], 2).flatten(0, 1)).unflatten(0, (count, rows))

    @torch.no_grad()
    def linearise(self, k: int, x: Float[Tensor, "n inputs"]) -> Linearised:
        """The scores of one transition, counted from 0, and the product of rows (n, outputs) with their Jacobians."""
        start = torch.cat([x, self.embedding[k].expand(len(x), -1)], 1)
        inner_1 = functional.linear(start, self.weight_1, self.bias_1)
        hidden = start + functional.softplus(inner_1)
        inner_2 = functional.linear(hidden, self.weight_2, self.bias_2)
        hidden = hidden + functional.softplus(inner_2)

        def product(rows: Float[Tensor, "n outputs"]) -> Float[Tensor, "n inputs"]:
            back = (rows * self.factor.detach()) @ self.weight_3
            back = torch.addmm(back, back * inner_2.sigmoid(), self.weight_2)
            return torch.addmm(back, back * inner_1.sigmoid(), self.weight_1)[:, : x.shape[1]]

        return self.factor * functional.linear(hidden, self.weight_3, self.bias_3), product

    def _layers(self, hidden: Float[Tensor, "m width"]) -> Float[Tensor, "m outputs"]:
        hidden = hidden + functional.softplus(functional.linear(hidden, self.weight_1, self.bias_1))
        hidden = hidden + functional.softplus(functional.linear(hidden, self.weight_2, self.bias_2))
        return self.factor * functional.linear(hidden, self.weight_3, self.bias_3)

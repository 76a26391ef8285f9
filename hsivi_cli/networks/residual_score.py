"""The small residual network that corrects a backward kernel (Geffner & Domke 2023, released code)."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.bridges.geometric import Array, Linearised

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

    def forward(self, x: Float[Tensor, "k n inputs"], first: int = 0) -> Float[Tensor, "k n outputs"]:
        """The scores of transitions first, first + 1, ..., a row of `x` each."""
        count, rows, _ = x.shape
        embedding = self.embedding[first : first + count] if first or count < len(self.embedding) else self.embedding
        start = torch.cat([x, embedding[:, None].expand(-1, rows, -1)], 2)
        return _Layers.apply(start, *self.weights())

    def linearise(self, k: int, x: Array) -> Linearised:
        """The scores of one transition, counted from 0, and the product of rows (n, outputs) with their Jacobians."""
        weights = [parameter.detach().numpy() for parameter in self.weights()]
        embedding = self.embedding.detach().numpy()[k]
        run = _Run(np.concatenate([x, np.broadcast_to(embedding, (len(x), EMBEDDING))], 1), *weights)
        return run.value, lambda rows: run.back(rows)[0][:, : x.shape[1]]

    def weights(self) -> tuple[nn.Parameter, ...]:
        """The parameters of the layers, in the order of their use."""
        layers = (self.weight_1, self.bias_1, self.weight_2, self.bias_2, self.weight_3, self.bias_3)
        return (*layers, self.factor)


class _Run:
    """The layers at the rows of `start`, and their backward pass: in numpy, where small calls are cheap."""

    def __init__(self, start: Array, *weights: Array) -> None:
        weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, factor = weights
        self.weights, self.start = weights, start
        step, self.slope_1 = _softplus(start @ weight_1.T + bias_1)
        self.middle = start + step
        step, self.slope_2 = _softplus(self.middle @ weight_2.T + bias_2)
        self.hidden = self.middle + step
        self.raw = self.hidden @ weight_3.T + bias_3
        self.value = factor * self.raw

    def back(self, bar: Array) -> tuple[Array, Array, Array, Array]:
        """From the derivatives with respect to the value: those of the start, and of what each layer adds up."""
        weight_1, _, weight_2, _, weight_3, _, factor = self.weights
        bar_3 = factor * bar
        bar_hidden = bar_3 @ weight_3
        bar_2 = bar_hidden * self.slope_2
        bar_middle = bar_hidden + bar_2 @ weight_2
        bar_1 = bar_middle * self.slope_1
        return bar_middle + bar_1 @ weight_1, bar_1, bar_2, bar_3


def _softplus(x: Array) -> tuple[Array, Array]:
    """`log(1 + exp(x))` and its slope."""
    tail = np.exp(-np.abs(x))
    value = np.maximum(x, 0) + np.log1p(tail)
    return value, np.exp(x - value)


class _Layers(torch.autograd.Function):
    """`_Run` for autograd; autograd through the layers themselves would cost twice as much at this size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        start = x.detach().numpy()
        ctx.run = _Run(start.reshape(-1, start.shape[2]), *(weight.detach().numpy() for weight in weights))
        return torch.from_numpy(ctx.run.value.reshape(*start.shape[:2], -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        rows = bar.numpy().reshape(run.raw.shape)
        bar_start, bar_1, bar_2, bar_3 = run.back(rows)
        bars = [bar_start.reshape(*bar.shape[:2], -1)]
        for grown, seen in ((bar_1, run.start), (bar_2, run.middle), (bar_3, run.hidden)):
            bars += [grown.T @ seen, grown.sum(0)]
        return *(torch.from_numpy(array) for array in bars), torch.from_numpy(np.array(np.vdot(rows, run.raw)))

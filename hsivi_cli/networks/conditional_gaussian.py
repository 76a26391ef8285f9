"""A conditional Gaussian layer `q(x_k | x_{k+1}) = N(mu(x_{k+1}), diag sigma^2)` and the small MLPs around it."""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Starts of the first and the other hidden layers, as multiples of +-1/sqrt(fan in). With a plain start SiLU is nearly
# linear on N(0, I), and a layer sees one smooth blob where the target has several modes.
FIRST_GAIN, HIDDEN_GAIN = 5.0, 2.0


def mlp(sizes: Sequence[int], generator: torch.Generator, *, smooth: bool = True, last: float = 1.0) -> nn.Sequential:
    """A float64 MLP of these layer sizes; `last` scales the start of the last layer (0: the network returns 0).

    Weights and biases start uniform on +-gain/sqrt(fan in), drawn from `generator` alone. `smooth` is SiLU with our
    gains, otherwise ReLU with gain 1 throughout, as published.
    """
    parts: list[nn.Module] = []
    pairs = list(itertools.pairwise(sizes))
    for number, (inputs, outputs) in enumerate(pairs):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)
        bound, gain = 1 / math.sqrt(inputs), last
        if number < len(pairs) - 1:
            gain = (FIRST_GAIN if number == 0 else HIDDEN_GAIN) if smooth else 1.0
        with torch.no_grad():
            for parameter in (linear.weight, linear.bias):
                parameter.uniform_(-bound, bound, generator=generator)
                parameter.mul_(gain)
        parts.append(linear)
        if number < len(pairs) - 1:
            parts.append(nn.SiLU() if smooth else nn.ReLU())
    return nn.Sequential(*parts)


class ConditionalGaussian(nn.Module):
    """`N(mu(x), diag sigma^2)` on R^`dim` for inputs in R^`inputs`, in float64; sigma is learned, one a coordinate.

    Residual (the default): `mu(x) = sqrt(1 - sigma_0^2) x + MLP(x)` where the MLP starts at zero and `sigma_0` is the
    start of sigma, so that an untrained layer leaves N(0, I) exactly as it is. Where the input has more coordinates
    than the output, the further ones enter through the MLP alone; where it has fewer, the missing ones count as zero
    and their noise starts at 1, which keeps N(0, I) all the same. Plain: `mu(x) = MLP(x)` with ReLU, as published.
    """

    def __init__(
        self,
        inputs: int,
        dim: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        *,
        residual: bool = True,
        sigma: float = 0.5,
    ) -> None:
        super().__init__()
        self.residual, self.dim, self.skip = residual, dim, math.sqrt(1 - sigma**2)
        self.net = mlp((inputs, *hidden, dim), generator, smooth=residual, last=0.0 if residual else 1.0)
        start = torch.full((dim,), math.log(sigma), dtype=torch.float64)
        if residual:
            start[inputs:] = 0.0
        self.log_sigma = nn.Parameter(start)

    def forward(self, x: Float[Tensor, "n inputs"]) -> Float[Tensor, "n dim"]:
        """The mean, shape (n, dim)."""
        mean: Tensor = self.net(x)
        if not self.residual:
            return mean
        kept = x[:, : self.dim]
        return mean + self.skip * nn.functional.pad(kept, (0, self.dim - kept.shape[1]))

"""Networks that turn an observation (a vector, a set of rows, an image) into a vector of features.

Sets: mean and maximum over the rows of an MLP of each (Zaheer et al., Deep Sets, NeurIPS 2017), so that the order of
the rows does not count.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hsivi_cli.errors import InputError

EmbeddingKind = Literal["auto", "identity", "mlp", "set", "image"]
FEW = 16
"""Vectors of so many entries need no network of their own."""


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with SiLU between them, torch's own start."""
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        parts += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*parts[:-1])


class VectorEmbedding(nn.Module):
    """A linear map plus an MLP: what is linear in the observation need not be learned by a network."""

    def __init__(self, inputs: int, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.net = nn.Linear(inputs, features), mlp((inputs, *hidden, features))

    def forward(self, x: Float[Tensor, "b inputs"]) -> Float[Tensor, "b features"]:
        """Features."""
        found: Tensor = self.linear(x) + self.net(x)
        return found


class SetEmbedding(nn.Module):
    """Mean and maximum over rows of an MLP of each, then another; invariant to the order of the rows."""

    def __init__(self, columns: int, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        width = hidden[-1]
        self.each, self.together = mlp((columns, *hidden)), mlp((2 * width + columns, *hidden[-1:], features))

    def forward(self, x: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b features"]:
        """Features."""
        rows = nn.functional.silu(self.each(x))
        # the plain mean beside them: the sufficient statistic more often than not
        found: Tensor = self.together(torch.cat([rows.mean(1), rows.amax(1), x.mean(1)], 1))
        return found


class ImageEmbedding(nn.Module):
    """Two or three convolutions, each but the first halving the sides, then a linear layer."""

    def __init__(self, shape: tuple[int, int, int], features: int, channels: int = 16) -> None:
        super().__init__()
        planes, height, width = shape
        parts: list[nn.Module] = [nn.Conv2d(planes, channels, 3, padding=1), nn.SiLU()]
        while min(height, width) > 4 and channels < 128:
            parts += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.SiLU()]
            channels, height, width = 2 * channels, math.ceil(height / 2), math.ceil(width / 2)
        self.net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * height * width, features))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b features"]:
        """Features."""
        found: Tensor = self.net(x)
        return found


def resolve_kind(kind: EmbeddingKind, shape: tuple[int, ...]) -> EmbeddingKind:
    """What `auto` means: vectors pass as they are up to 16 entries; two dimensions are a set, three an image.

    Raises InputError where `kind` and `shape` do not fit.
    """
    if kind == "auto":
        if len(shape) == 1:
            return "identity" if shape[0] <= FEW else "mlp"
        kind = "set" if len(shape) == 2 else "image"
    dims = {"identity": 1, "mlp": 1, "set": 2, "image": 3}
    if kind not in dims:
        raise InputError(f"embedding {kind!r} is not known: use auto, {', '.join(dims)}")
    if len(shape) != dims[kind] or 0 in shape:
        wanted = {1: "(entries,)", 2: "(rows, columns)", 3: "(channels, height, width)"}[dims[kind]]
        raise InputError(f"embedding {kind!r} takes observations of shape {wanted}, not {shape}")
    return kind


def build_embedding(
    kind: EmbeddingKind, shape: tuple[int, ...], features: int, hidden: Sequence[int]
) -> tuple[nn.Module, int]:
    """The network for observations of `shape`, and how many features it gives."""
    kind = resolve_kind(kind, shape)
    if kind == "identity":
        return nn.Identity(), shape[0]
    if kind == "mlp":
        return VectorEmbedding(shape[0], features, hidden), features
    if kind == "set":
        return SetEmbedding(shape[1], features, hidden), features
    return ImageEmbedding((shape[0], shape[1], shape[2]), features), features

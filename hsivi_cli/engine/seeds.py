"""Random numbers that depend on names, never on the batch: a step's generator and a sample's noise stream.

Training draws from a generator seeded by `(seed, stream, step)`, so a resumed run needs no saved generator state.
Images have a Philox stream a sample, the noise of a distillation one a row (`StepDraws`), so that neither changes
with the batch size or the number of processes. Images draw by `PhiloxStreams` on whatever device they are, as kernels
can; posteriors draw by numpy's `NoiseStreams` on the CPU.
"""

import math
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from hsivi_cli.kernels.choice import Kernels
    from hsivi_cli.kernels.philox import Draw

AHEAD = 2**16  # numbers of all samples that are drawn ahead at most
ROWS = 2**32  # what a training step's rows are counted below; steps are the word above


class Stream(IntEnum):
    """What a generator is for."""

    INIT = 0
    TRAIN = 1
    DRAW = 2
    SIMULATE = 3
    CHECK = 4


def generator(seed: int, stream: Stream, *key: int, device: str = "cpu") -> torch.Generator:
    """A generator for `(seed, stream, *key)`; 32 bits of state, so that two of very many steps may share one."""
    state = np.random.SeedSequence((seed, int(stream), *key)).generate_state(1, np.uint32)[0]
    return torch.Generator(device).manual_seed(int(state))


class NoiseStreams:
    """Standard normal noise, one independent counter-based stream a sample.

    `NoiseStreams(seed, indices)` serves the samples with these indices; call `draw(shape)` once for the starting noise
    and once a layer. Draws are made on the CPU.
    """

    def __init__(self, seed: int, indices: Iterable[int]) -> None:
        self.indices = list(indices)
        self._streams = [
            np.random.Generator(np.random.Philox(key=np.array([seed, j], np.uint64))) for j in self.indices
        ]

    def __len__(self) -> int:
        """How many samples."""
        return len(self._streams)

    def draw(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Float[Tensor, " n *shape"]:
        """The next noise of every sample, shape `(n, *shape)`, float32."""
        noise = np.empty((len(self._streams), *shape), np.float32)
        for row, stream in zip(noise, self._streams, strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(noise).to(device)


class PhiloxStreams:
    """Standard normal noise of images: one stream a sample, drawn where the samples are (kernels.philox).

    The same integers on every device and in every kernel, so the same noise up to the rounding of log, sin and cos.
    Draw number 0 is the starting noise; `streams` and `take()` give a kernel what it needs to make a draw itself.
    """

    def __init__(self, seed: int, indices: Iterable[int], device: torch.device | str = "cpu") -> None:
        from hsivi_cli.kernels.philox import make_streams  # with it comes Triton, which most commands never need

        self.indices = list(indices)
        self.streams = make_streams(seed, self.indices, device)
        self._drawn = 0
        self._ahead: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def __len__(self) -> int:
        """How many samples."""
        return len(self.streams)

    def take(self) -> int:
        """The number of the next draw, which counts as made."""
        self._drawn += 1
        return self._drawn - 1

    def rewind(self) -> None:
        """Begin again with draw number 0."""
        self._drawn = 0
        self._ahead.clear()

    def draw(
        self, shape: tuple[int, ...], device: torch.device | str | None = None, kernels: "Kernels" = "torch"
    ) -> Float[Tensor, " n *shape"]:
        """The next noise of every sample, shape `(n, *shape)`, float32; the streams move to `device` and stay there."""
        from hsivi_cli.kernels.philox import normals, normals_of_layers

        if device is not None:
            self.streams = self.streams.to(device)
        number = self.take()
        few = AHEAD // max(len(self) * math.prod(shape), 1)
        if kernels != "torch" or few < 2:
            return normals(self.streams, number, shape, kernels=kernels)
        if (number, shape) not in self._ahead:  # small draws cost their operations alone: some are made in one go
            layers = range(number, number + min(few, 16))
            drawn = normals_of_layers(self.streams, layers, shape)
            self._ahead = {(layer, shape): noise for layer, noise in zip(layers, drawn, strict=True)}
        return self._ahead.pop((number, shape)).to(self.streams.device)


class StepDraws:
    """What is random in one training step, the same for any number of processes.

    `generator` is for what every process draws alike: choices of rows, layers and times of the whole batch. The noise
    of row j of the global batch (or of chain j of the rollout) is the Philox stream `(seed, step * 2^32 + j)`: no two
    steps share a stream, and none is an image's of the same seed, whose index is below 2^32. Every process takes the
    same draws in the same order, each for its own `rows`.
    """

    def __init__(self, seed: int, step: int, generator: torch.Generator, device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.generator, self.device = seed, step, generator, device
        self._streams: dict[range, Tensor] = {}
        self._taken = 0

    def take(self, rows: range) -> "Draw":
        """The step's next draw, for these rows."""
        from hsivi_cli.kernels.philox import Draw, make_streams

        if rows not in self._streams:
            first = self.step * ROWS
            indices = range(first + rows.start, first + rows.stop, rows.step)
            self._streams[rows] = make_streams(self.seed, indices, self.device)
        self._taken += 1
        return Draw(self._streams[rows], self._taken - 1)

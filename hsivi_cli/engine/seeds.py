"""Random numbers that depend on names, never on the batch: a step's generator and a sample's noise stream.

Training draws what is small (choices of rows and times) from a generator seeded by `(seed, stream, step)`, so a resumed
run needs no saved generator state. Images, and the noise of training, have a Philox stream a sample or row, so that
they do not change with the batch size or the number of processes. There are two of those: images draw by
`PhiloxStreams` on whatever device they are, as kernels can; posteriors draw by numpy's `NoiseStreams` on the CPU.
"""

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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

    def draw(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Float[Tensor, "n *shape"]:
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

    def draw(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> Float[Tensor, "n *shape"]:
        """The next noise of every sample, shape `(n, *shape)`, float32; the streams move to `device` and stay there."""
        from hsivi_cli.kernels.philox import normals

        if device is not None:
            self.streams = self.streams.to(device)
        return normals(self.streams, self.take(), shape)

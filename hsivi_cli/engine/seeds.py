"""Random numbers that depend on names, never on the batch: a step's generator and a sample's noise stream.

Training draws everything of step `i` from a generator seeded by `(seed, stream, i)`, so a resumed run needs no saved
generator state. Sampling draws sample `j` from its own Philox stream keyed by `(seed, j)`, so images do not change with
the batch size or the number of processes.
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
    and once a layer. Draws are made on the CPU, so that a seed names the same image on every device.
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
    """As `NoiseStreams`, but drawn where the samples are, by counters that a kernel can use itself (kernels.philox).

    The noise is another one than `NoiseStreams` has for the same seed. Draw number 0 is the starting noise; `streams`
    and `take()` give a kernel what it needs to make a draw itself.
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
        """The next noise of every sample, shape `(n, *shape)`, float32."""
        from hsivi_cli.kernels.philox import normals

        noise = normals(self.streams, self.take(), shape)
        return noise if device is None else noise.to(device)

"""A student's whole chain as one CUDA graph: captured once for a batch size, replayed for other noise streams."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hsivi_cli.engine.optimisation import TYPES, Precision
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.kernels.choice import Kernels
from hsivi_cli.kernels.convert import fused
from hsivi_cli.methods.student import Student, sample_student, walk_fused

Walk = Callable[[], Any]
Capture = Callable[[Walk, torch.device], Walk]


def cuda_graph(walk: Walk, device: torch.device) -> Walk:
    """`walk`, which uses the same memory whenever it is called, as one launch; its output is overwritten."""
    with torch.cuda.device(device):  # a capture is of the current device's stream
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled and libraries choose their algorithms outside of the capture
                walk()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = walk()

    def replay() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


class GraphedChain:
    """`run(streams)` draws one batch of images, with a single launch from the CPU. Needs a GPU, but for tests.

    The network is a copy of the student's, in half the bits as a whole for such a precision: autocast would cast the
    weights of a network that is not being trained anew in every layer. `kernels` as in `sample_student`;
    `capture(walk, device)` returns what replays `walk`. Raises ValueError for a student that is not `graphable`.
    """

    def __init__(
        self,
        student: Student,
        n: int,
        precision: Precision = "fp32",
        channels_last: bool = False,
        kernels: Kernels = "auto",
        capture: Capture = cuda_graph,
    ) -> None:
        if not graphable(student):
            raise ValueError("only a student that predicts eps, without classes, can be graphed")
        device = next(student.unet.parameters()).device
        dtype = TYPES.get(precision, torch.float32)
        layers, shape, log_gamma = student.layers, student.shape, student.log_gamma.to(device)
        # the graph computes with this memory: it has to live as long
        self.unet = copy.deepcopy(student.unet).to(device, dtype)
        self.noise = PhiloxStreams(0, range(n), device)
        # inside a capture nothing may come from the CPU, so the layers' times go to the GPU before
        self.times = {int(t): t.to(device) for t in layers.times}
        self.log_gamma = log_gamma

        def eps(x: Tensor, t: Tensor) -> Tensor:
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            out = self.unet(x.to(dtype, memory_format=memory_format), self.times[int(t)])
            return getattr(out, "sample", out)[:, : shape[0]].float()  # behind them, learned variances

        def walk() -> Tensor:
            self.noise.rewind()
            return walk_fused(eps, log_gamma, layers, shape, self.noise, kernels)

        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        with torch.no_grad(), fused(self.unet, kernels):
            self.replay = capture(walk, device)

    @torch.no_grad()
    def run(self, streams: Int64[Tensor, "n 2"]) -> Float[Tensor, "n c h w"]:
        """Images of these streams, as many as there were from the first; the next run overwrites them."""
        self.noise.streams.copy_(streams)
        return self.replay()


class GraphedSampler:
    """Images of a student by a graph of the batch size that comes first; another, as of a last batch, runs as it is."""

    def __init__(
        self, student: Student, precision: Precision = "fp32", kernels: Kernels = "auto", capture: Capture = cuda_graph
    ) -> None:
        self.student, self.precision, self.kernels, self.capture = student, precision, kernels, capture
        self.size = 0
        self.chain: GraphedChain | None = None

    def __call__(self, noise: PhiloxStreams) -> Tensor:
        """As `sample_student`."""
        if self.chain is None:
            half = self.precision in TYPES  # whose convolutions want channels_last
            given = (self.student, len(noise), self.precision, half, self.kernels, self.capture)
            self.size, self.chain = len(noise), GraphedChain(*given)
        if len(noise) != self.size:
            return sample_student(self.student, noise, self.precision, self.kernels)
        return self.chain.run(noise.streams)


def graphable(student: Student) -> bool:
    """Whether `GraphedChain` takes this student."""
    return student.schedule.prediction_type == "epsilon" and not student.classes

"""A student's whole chain as one CUDA graph: captured once for a batch size, replayed for other noise streams."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hsivi_cli.engine.optimisation import TYPES, Precision
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.kernels.convert import fused
from hsivi_cli.methods.student import Student, walk_fused

Walk = Callable[[], Tensor]


def cuda_graph(walk: Walk, device: torch.device) -> Walk:
    """`walk`, which uses the same memory whenever it is called, as one launch; its output is overwritten."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # kernels are compiled and libraries choose their algorithms outside of the capture
            walk()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = walk()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class GraphedChain:
    """`run(streams)` draws one batch of images, with a single launch from the CPU. Needs a GPU, but for tests.

    The network is a copy of the student's, in half the bits as a whole for such a precision: autocast would cast the
    weights of a network that is not being trained anew in every layer. `capture(walk, device)` returns what replays
    `walk`. Raises ValueError for a student that does not predict eps or knows classes.
    """

    def __init__(
        self,
        student: Student,
        n: int,
        precision: Precision = "fp32",
        channels_last: bool = False,
        capture: Callable[[Walk, torch.device], Walk] = cuda_graph,
    ) -> None:
        if not graphable(student):
            raise ValueError("only a student that predicts eps, without classes, can be graphed")
        if student.classes or student.schedule.prediction_type != "epsilon":
            raise NotImplementedError("graphs are captured of networks that predict the noise, without classes")
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
            return self.unet(x.to(dtype, memory_format=memory_format), self.times[int(t)]).sample.float()

        def walk() -> Tensor:
            self.noise.rewind()
            return walk_fused(eps, log_gamma, layers, shape, self.noise)

        with torch.no_grad(), fused(self.unet, channels_last=channels_last):
            self.replay = capture(walk, device)

    @torch.no_grad()
    def run(self, streams: Int64[Tensor, "n 2"]) -> Float[Tensor, "n c h w"]:
        """Images of these streams, as many as there were from the first; the next run overwrites them."""
        self.noise.streams.copy_(streams)
        return self.replay()


def graphable(student: Student) -> bool:
    """Whether `GraphedChain` takes this student."""
    return student.schedule.prediction_type == "epsilon" and not student.classes

"""A student's whole chain as one CUDA graph: captured once for a batch size, replayed for other noise streams."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hsivi_cli.engine.optimisation import Precision, autocast
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.kernels.convert import fused
from hsivi_cli.methods.student import Student, walk_fused


class GraphedChain:
    """`run(streams)` draws one batch of images, with a single launch from the CPU. Needs a GPU."""

    def __init__(self, student: Student, n: int, precision: Precision = "fp32", channels_last: bool = False) -> None:
        device = next(student.unet.parameters()).device
        self.noise = PhiloxStreams(0, range(n), device)
        # inside a capture nothing may come from the CPU, so the layers' times go to the GPU before
        times = {int(t): t.to(device) for t in student.layers.times}

        def eps(x: Tensor, t: Tensor) -> Tensor:
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            return student.unet(x, times[int(t)]).sample.float()

        def walk() -> Tensor:
            self.noise.rewind()
            # one autocast around the chain, so that the weights are cast once and not once a layer
            with autocast(precision, device):
                return walk_fused(eps, student.log_gamma.to(device), layers, student.shape, self.noise)

        layers = student.layers
        with torch.no_grad(), fused(student.unet, channels_last=channels_last):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):  # kernels are compiled and libraries choose their algorithms outside of the capture
                    walk()
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.images = walk()

    def run(self, streams: Int64[Tensor, "n 2"]) -> Float[Tensor, "n c h w"]:
        """Images of these streams; the next run overwrites them."""
        self.noise.streams.copy_(streams)
        self.graph.replay()
        return self.images

"""A network compiled by torch for the batch size it first sees; what it computes is the same up to rounding."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from hsivi_cli.kernels.convert import fuse

# weights as constants, packed as the CPU's convolutions like them; another layout of activations gains nothing more
FROZEN: dict[str, Any] = {"freezing": True, "layout_optimization": False}


class CompiledNetwork(nn.Module):
    """`net`, its calls of the first call's batch size compiled; another size, as of a last batch, runs as it is.

    Compiling takes about a minute the first time; torch keeps what it built on disk for the next process. For drawing
    alone: on a CPU later changes of the weights are not seen.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA is no news
        self.net = net
        on_cpu = next(net.parameters()).device.type == "cpu"
        if on_cpu:
            fuse(net, "torch")  # fewer operations; the norms are the compiler's
        self.compiled = torch.compile(net, dynamic=False, options=FROZEN if on_cpu else None)
        self.size: int | None = None

    @property
    def config(self) -> Any:
        """The network's own."""
        return self.net.config

    def forward(self, x: Tensor, *args: Any, **more: Any) -> Any:
        """What the network answers."""
        self.size = self.size or len(x)
        return (self.compiled if len(x) == self.size else self.net)(x, *args, **more)

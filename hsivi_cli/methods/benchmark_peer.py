"""diffusers' pipeline as the peer of `hsivi bench`: on a CPU in a process of its own, as its users run it.

In our process it would share what we do for ourselves there (engine.allocator), and be timed faster than it is.
"""

import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from hsivi_cli.engine.optimisation import Precision, autocast
from hsivi_cli.errors import RunError
from hsivi_cli.methods.student import Student


def pipeline_call(
    unet: nn.Module, schedule: dict[str, Any], nfe: int, batch: int, precision: Precision
) -> Callable[[int], None]:
    """`call(seed)` draws `batch` images by DDIMPipeline with its own noise; `schedule` is its scheduler's config."""
    from diffusers import DDIMPipeline, DDIMScheduler

    device = next(unet.parameters()).device
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(schedule))
    pipeline.set_progress_bar_config(disable=True)

    def call(seed: int) -> None:
        with autocast(precision, device):
            generator = torch.Generator(device).manual_seed(seed)
            pipeline(batch, generator, num_inference_steps=nfe, output_type="np")

    return call


def can_be_piped(student: Student) -> bool:
    """Whether diffusers' pipeline can draw from this student's network: no classes, no learned variances."""
    channels = getattr(student.unet.config, "get", lambda name: None)("out_channels")
    ours = not isinstance(student.unet, ModelMixin)  # a user's own network cannot be handed to another process
    return not (ours or student.classes) and channels in (None, student.shape[0])


class PipelineProcess:
    """`pipeline_call` in another process with as many threads; called like it, it answers when the images are there.

    Raises RunError if the process has died.
    """

    def __init__(self, *given: Any) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), given), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, seed: int) -> None:
        self._ask(seed)

    def cpu_seconds(self) -> float:
        """What that process has spent so far."""
        return self._ask(None)

    def close(self) -> None:
        """Let the process end."""
        self.connection.close()
        self.process.join()

    def _ask(self, what: int | None) -> float:
        try:
            self.connection.send(what)
            answer: float = self.connection.recv()
        except (EOFError, OSError) as err:
            raise RunError("the process with diffusers' pipeline has died: its own words are above") from err
        return answer


def _serve(connection: Connection, threads: int, given: tuple[Any, ...]) -> None:
    """Draw for every seed that comes, until none comes any more; answers are CPU seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    torch.set_num_threads(threads)
    call = pipeline_call(*given)
    while True:
        try:
            seed = connection.recv()
        except EOFError:
            return
        if seed is not None:
            call(seed)
        connection.send(time.process_time())

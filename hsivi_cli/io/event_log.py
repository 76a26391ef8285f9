"""TensorBoard event files of a training, through torch's writer and the package `tensorboard`, which is optional."""

import importlib.util
import math
from pathlib import Path
from typing import Any

from hsivi_cli.errors import InputError

EVENTS = "events.out.tfevents."  # how TensorBoard's files begin


def check_tensorboard() -> None:
    """Raise InputError, saying how to install it, if TensorBoard is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard needs the package tensorboard: pip install 'hsivi[tensorboard]', or leave it out"
        )


class EventLog:
    """Writes scalars into `directory`; steps that are taken again replace what was written of them.

    A run that is resumed, or rolled back, takes steps again that are in an event file already. A new file that begins
    with TensorBoard's purge mark makes it drop them, so that no curve goes back in time. Raises InputError if
    TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        check_tensorboard()
        self._directory, self._step = directory, 0
        self._writer: Any = None

    def on_step(self, step: int) -> None:
        """This step is done; called for every step, so that the first of a resumed run is known exactly."""
        if self._writer is None or step <= self._step:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            self._writer = SummaryWriter(str(self._directory), purge_step=step)
        self._step = step

    def add(self, record: dict[str, Any]) -> None:
        """Write the finite numbers of a log line of the latest step."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, self._step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()

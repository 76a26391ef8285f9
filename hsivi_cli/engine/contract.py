"""The one contract of every method: init / step / sample / state_dict and load_state_dict.

A method is a module with these functions, so that the loop, checkpoints, resume and the tests are written once.
Networks are large and mutable, so `step` updates the state in place and returns the metrics alone.
"""

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Metrics = dict[str, float]


class Method(Protocol):
    """The verbs; `target`, `config` and the state are the method's own types. A state counts its steps in `step`."""

    def init(self, target: Any, config: Any) -> Any:
        """A fresh state; random weights depend on `config.seed` alone."""

    def step(self, state: Any, batch: Tensor | None, generator: torch.Generator) -> Metrics:
        """Advance by one step, in place; every random number comes from `generator`."""

    def sample(self, state: Any, noise: Any) -> Float[Tensor, "n c h w"]:
        """Draw one sample a noise stream (engine.seeds), from the averaged weights."""

    def state_dict(self, state: Any) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain JSON."""

    def load_state_dict(self, state: Any, tree: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in place."""

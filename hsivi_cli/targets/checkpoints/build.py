"""A converted state dict into its network, checked on paper before anything is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.fit import check_fit, count, fit_keys
from hsivi_cli.targets.checkpoints.read import one_line


@dataclass(frozen=True)
class Converted:
    """A foreign checkpoint as a network `network(x, t, class_labels) -> .sample`, in evaluation mode.

    `prediction_type` is diffusers' word for what the first C output channels are (a network that learned its variance
    has 2C); `schedule` holds the diffusers scheduler fields it was trained with, as far as known; `classes` is 0 for an
    unconditional network; `notes` are full sentences for the user: what was inferred, taken for granted or left out.
    """

    network: ModelMixin
    prediction_type: str
    schedule: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    classes: int = 0


def build_network(
    kind: type[ModelMixin], config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> ModelMixin:
    """An instance of the diffusers class `kind` with `config` and exactly `tensors` as its weights.

    Raises InputError where a weight is missing, has another shape, or has no place.
    """
    try:
        with torch.device("meta"):  # without memory: a hostile file must not exhaust it
            expected = kind(**config).state_dict()
    except Exception as err:  # diffusers raises whatever its layers raise
        raise InputError(f"{path} does not describe a {kind.__name__} ({one_line(err)})") from err
    fitted = fit_keys(tensors, expected)
    check_fit(fitted, path, f"the {kind.__name__} that its shapes describe")
    if fitted.unexpected:
        raise InputError(f"{path}: its {kind.__name__} has no place for {count(fitted.unexpected)}")
    network = kind(**config)
    network.load_state_dict(fitted.tensors)
    return network.eval()

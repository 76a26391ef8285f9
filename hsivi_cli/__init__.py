"""Fast diffusion sampling and posterior fitting by hierarchical semi-implicit variational inference."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hsivi_cli.diffusers_names import tell_diffusers

if TYPE_CHECKING:
    from hsivi_cli.methods.pipeline import HSIVIPipeline
    from hsivi_cli.methods.scheduler import HSIVIScheduler
    from hsivi_cli.targets.model import Model, Parameter

__version__ = "0.1.0"
__all__ = ["HSIVIPipeline", "HSIVIScheduler", "Model", "Parameter", "__version__"]

# imported when asked for: they need torch
_HOMES = {
    "HSIVIPipeline": "hsivi_cli.methods.pipeline",
    "HSIVIScheduler": "hsivi_cli.methods.scheduler",
    "Model": "hsivi_cli.targets.model",
    "Parameter": "hsivi_cli.targets.model",
}


def __getattr__(name: str) -> Any:
    """What a user's own Python needs of us: `Model` and `Parameter` for a model file, the rest for diffusers."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


tell_diffusers()

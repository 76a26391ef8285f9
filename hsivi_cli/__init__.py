"""Fast diffusion sampling and posterior fitting by hierarchical semi-implicit variational inference."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hsivi_cli.targets.model import Model, Parameter

__version__ = "0.1.0"
__all__ = ["Model", "Parameter", "__version__"]


def __getattr__(name: str) -> Any:
    """`Model` and `Parameter`, for a user's own model file, imported when asked for: they need torch."""
    if name in ("Model", "Parameter"):
        from hsivi_cli.targets import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

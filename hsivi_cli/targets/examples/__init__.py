"""Named example targets that ship: published benchmarks, with their data in code, and shapes in two dimensions.

Importing this package imports no torch, so that help texts can list the examples.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    from hsivi_cli.targets.density import Density

EXAMPLES: dict[str, str] = {
    "eight-schools": "coaching effects in eight schools, non-centred hierarchy (10 dimensions, exact answers known)",
    "logistic": "Bayesian logistic regression with N(0, 1) weights on standardised columns; wants a data file",
    "brownian": "Brownian motion, unknown scales, missing middle (32 dimensions, exact answers known)",
    "lorenz": "Lorenz convection bridge, missing middle (90 dimensions)",
    "seeds": "random-effects logistic regression of 21 plates of seeds (26 dimensions)",
    "conditioned-diffusion": "a double-well diffusion seen 20 times with noise (100 dimensions)",
    "banana": "a Gaussian bent to a banana (2-D)",
    "multimodal": "two Gaussians four sds apart (2-D)",
    "x-shaped": "two crossed, strongly correlated Gaussians (2-D)",
    "checkerboard": "eight squares of a 4 x 4 board with sigmoid edges (2-D)",
    "rings": "three concentric rings (2-D)",
    "swissroll": "Gaussians along a spiral (2-D)",
}
_MODULES = {
    "eight-schools": "eight_schools",
    "logistic": "logistic",
    "brownian": "brownian",
    "lorenz": "lorenz",
    "seeds": "seeds",
    "conditioned-diffusion": "conditioned_diffusion",
}


def example_density(name: str, data: Mapping[str, Any] | None = None) -> "Density":
    """The named example as a density; `data` is a table (a DataFrame, or columns by name) where the example takes one.

    Raises InputError for a name that EXAMPLES lacks, for data that the example cannot use, and where `logistic` is
    given none.
    """
    if name not in EXAMPLES:
        raise InputError(f"no example is called {name!r}: choose from {', '.join(EXAMPLES)}")
    if data is not None and name not in ("logistic", "eight-schools"):
        raise InputError(f"the example {name} brings its own data: leave the data file out")
    module = import_module(f"{__name__}.{_MODULES.get(name, 'toys')}")
    if name not in _MODULES:
        return module.toy_density(name)
    return module.example(data) if name in ("logistic", "eight-schools") else module.example()

"""Lets diffusers find our classes: `import hsivi_cli`, then `DiffusionPipeline.from_pretrained(student)`.

diffusers looks a pipeline's class up as an attribute of `diffusers`, and a component's in a module of
`diffusers.pipelines` (or, in a local directory, in a module that is imported already). Both modules answer for our
names too once they are imported, before us or after; nothing is imported for it here, no name of theirs is changed.
"""

import sys
import threading
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGE = "hsivi_cli"
NETWORKS = f"{PACKAGE}.networks."
PIPELINES = "diffusers.pipelines"
MODULES = ("diffusers", PIPELINES)
CLASSES = ("HSIVIPipeline", "HSIVIScheduler")


def tell_diffusers() -> None:
    """Make diffusers answer for our names, now where it is imported, else as soon as it is."""
    for name in MODULES:
        if name in sys.modules:
            _extend(sys.modules[name])
    if not all(name in sys.modules for name in MODULES) and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _extend(module: ModuleType) -> None:
    """Give a module a `__getattr__` (PEP 562) for our names; that of its class, which makes it lazy, comes after."""
    if "__getattr__" in vars(module):
        return  # told already; or not as we know it, and then `HSIVIPipeline.from_pretrained` still opens a student

    def __getattr__(name: str) -> Any:
        if name in CLASSES and module.__name__ == "diffusers":
            return getattr(sys.modules[PACKAGE], name)
        # where components live, as `model_index.json` names it: the package, or the module of a network of ours
        if (name == PACKAGE or name.startswith(NETWORKS)) and module.__name__ == PIPELINES:
            try:
                return import_module(name)
            except ModuleNotFoundError:
                pass
        raise AttributeError(f"module {module.__name__} has no attribute {name}")

    vars(module)["__getattr__"] = __getattr__


class _Finder(MetaPathFinder):
    """Finds diffusers as everyone else would, and extends it once it has been executed."""

    def __init__(self) -> None:
        self._in_search = threading.local()  # one import must not hide another thread's

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of one of MODULES, with a loader that tells it our names; None for every other module."""
        if name not in MODULES or getattr(self._in_search, "now", False):
            return None
        self._in_search.now = True
        try:
            spec = find_spec(name)
        finally:
            self._in_search.now = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _extend(sys.modules[name])  # diffusers puts another module in its own place

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

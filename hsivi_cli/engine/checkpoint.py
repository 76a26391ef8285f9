"""Checkpoints: any tree of tensors and plain JSON in one safetensors file, replaced atomically."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import atomic_file

_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a tree of dicts, lists, tensors and JSON scalars into named tensors and a JSON structure that names them.

    Dicts with integer keys (as in an optimiser's state) keep them.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, dict):
            pairs = [[key, visit(value, f"{name}/{key}")] for key, value in node.items()]
            return {_PAIRS: pairs}
        if isinstance(node, list | tuple):
            return [visit(value, f"{name}/{i}") for i, value in enumerate(node)]
        return node

    return tensors, visit(tree, "")


def unpack(tensors: dict[str, Tensor], structure: Any) -> Any:
    """The tree that `pack` was given."""
    if isinstance(structure, dict):
        if _TENSOR in structure:
            return tensors[structure[_TENSOR]]
        return {key: unpack(tensors, value) for key, value in structure[_PAIRS]}
    if isinstance(structure, list):
        return [unpack(tensors, value) for value in structure]
    return structure


def save_checkpoint(path: Path, tree: dict[str, Any]) -> None:
    """Write a checkpoint; a crash at any moment leaves the previous one intact."""
    tensors, structure = pack(tree)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"structure": json.dumps(structure)})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; raises InputError if it is missing or damaged. Nothing is unpickled."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: there is nothing to resume")
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["structure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        tree = unpack(tensors, structure)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as err:
        raise InputError(f"{path} is damaged or no checkpoint of hsivi ({err})") from err
    return tree

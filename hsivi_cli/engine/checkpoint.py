"""Checkpoints: a tree of tensors and plain JSON in one safetensors file with its checksum, replaced atomically."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsivi_cli.errors import InputError
from hsivi_cli.io.files import atomic_file, parse_json
from hsivi_cli.io.run_directory import checkpoint_path, checkpoint_step, checkpoints

_TENSOR = "__tensor__"
_PAIRS = "__pairs__"
REGULAR = 3  # regular checkpoints that are kept in any case, and the only ones that roll-backs go to


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
    text = json.dumps(structure)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"structure": text, "sha256": _digest(tensors, text)})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; raises InputError if it is missing, damaged or not what was written. Nothing is unpickled."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: there is nothing to resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        text = metadata.pop("structure")
        tree = unpack(tensors, parse_json(text))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as err:
        raise InputError(f"{path} is damaged or no checkpoint of hsivi ({err})") from err
    # those of earlier versions have no checksum, and nothing else in its place
    if metadata and metadata != {"sha256": _digest(tensors, text)}:
        raise InputError(f"{path} is damaged: it does not match its checksum")
    if not isinstance(tree, dict):
        raise InputError(f"{path} is no checkpoint of hsivi: it holds no tree")
    return tree


def keep_checkpoint(directory: Path, tree: dict[str, Any], step: int, keep: int, every: int = 0) -> None:
    """Write the checkpoint of `step` and then remove all but the newest `keep`; with `every`, three regular ones stay.

    Those of later steps go too: they are of a course that the run has left, by a roll-back or past a damaged file.
    """
    path = checkpoint_path(directory, step)
    save_checkpoint(path, tree)
    paths = checkpoints(directory)
    now = paths[paths.index(path) :]
    for stale in paths:
        if stale not in now[:keep] and not (every and stale in regular(now, every)[:REGULAR]):
            stale.unlink(missing_ok=True)


def regular(paths: Sequence[Path], every: int) -> list[Path]:
    """The checkpoints of every `every`-th step, the only ones that do not depend on clocks, signals and previews."""
    return [path for path in paths if (step := checkpoint_step(path)) is not None and step % every == 0]


def load_newest(paths: Sequence[Path], tell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The first of these checkpoints that is whole; `tell` hears of each that is not and was passed over.

    Raises InputError if there is none, and without `tell` if the first is damaged.
    """
    damaged = []
    for path in paths:
        try:
            tree = load_checkpoint(path)
        except InputError as err:
            damaged.append(str(err))
            if tell is None:
                more = f": remove it to go on from {paths[1].name}" if len(paths) > 1 else ""
                raise InputError(f"{err}{more}") from err
            continue
        for message in damaged:
            assert tell is not None
            tell(f"{message}: going on from {path.name}")
        return tree
    if damaged:
        raise InputError(f"{damaged[0]}, and no checkpoint beside it is whole: start afresh with another --out")
    raise InputError("there is no checkpoint to resume from")


def first_not_finite(tree: Any) -> str:
    """The name of a tensor in a tree that holds NaN or infinity, empty if all are finite."""
    for name, tensor in _leaves(tree, ""):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return ""


def _leaves(node: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{name}/{key}" if name else str(key))


def _digest(tensors: dict[str, Tensor], structure: str) -> str:
    """SHA-256 of all that a checkpoint is read for: its structure, and name, type, shape and bytes of each tensor."""
    digest = hashlib.sha256(structure.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Weights out of a stranger's file: no code runs, nothing much larger than the file is allocated, faults are one line.

`.pt` files hold more than a network: an optimizer, a step counter, the weights once more as an exponential moving
average (EMA). Generation wants the EMA, so it is preferred, and the notes say which part was taken.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsivi_cli.errors import InputError
from hsivi_cli.io.exported import refuse_program

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
MAX_DEPTH = 8
# what a file may unfold to: shared and expanded tensors make it larger than the file, a hostile one without bound
MAX_GROWTH, SLACK_BYTES = 8, 2**26
AVERAGED = re.compile(r"ema|shadow|averag", re.IGNORECASE)
OPTIMIZER = re.compile(r"optim|^opt|sched|scaler|discriminator", re.IGNORECASE)
RESAVE = (
    "where you trust the file, run torch.save or safetensors.torch.save_file on its state dict alone (plain tensors), "
    "and name that file"
)


@dataclass(frozen=True)
class ForeignTensors:
    """The weights of a foreign file under the names they have there; floating ones in float32, all finite.

    `notes` says in full sentences what was chosen.
    """

    tensors: dict[str, Tensor]
    path: Path
    notes: tuple[str, ...]


def read_tensors(path: Path) -> ForeignTensors:
    """Read `.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin` with `weights_only=True`.

    Raises InputError, in one line, for a file that is missing, damaged, oversized, without named tensors, that holds
    NaN or infinity, or whose pickle wants code to be run.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory: name the file with the weights")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    refuse_program(path, "name a file of weights, or the directory of a network (of a student: that of its teacher)")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        tree: Any = _read_safetensors(path)
    elif suffix in PICKLED:
        tree = _read_pickle(path)
    elif suffix in (".pkl", ".pickle"):
        raise InputError(f"{path} is a pickle, which can run code: it is not opened; {RESAVE}")
    else:
        raise InputError(
            f"{path}: weights are read from .safetensors, {', '.join(PICKLED)}, not from {suffix or 'this'}"
        )
    try:
        found, notes = _choose(tree)
        if not found:
            raise InputError(f"{path} holds no named tensors: it is no checkpoint of a network")
        return ForeignTensors(_checked(found, path), path, notes)
    except (RuntimeError, RecursionError, MemoryError, ValueError, TypeError) as err:
        raise InputError(
            f"{path} holds tensors that cannot be used ({one_line(err)}): fetch or write it again"
        ) from err


def one_line(err: BaseException | str) -> str:
    """The first line of an error, short enough for one line of ours."""
    text = str(err).strip() or type(err).__name__
    return " ".join(text.splitlines()[0].split())[:200]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as err:
        raise InputError(
            f"{path} is damaged or no safetensors file ({one_line(err)}): fetch or write it again"
        ) from err


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mmap: a checkpoint with optimizer state is three times what is needed of it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except pickle.UnpicklingError as err:
        wants = re.search(r"GLOBAL (\S+)", str(err)) or re.search(r"Trying to (?:load|instantiate) (\S+)", str(err))
        if wants or "Unsupported global" in str(err) or "Unsupported class" in str(err):
            what = f"holds {wants[1]}" if wants else "holds Python objects"
            raise InputError(f"{path} {what}, which only running code could read: {RESAVE}") from err
        raise InputError(f"{path} is damaged or no checkpoint ({one_line(err)}): fetch or write it again") from err
    except Exception as err:  # a damaged pickle raises whatever its opcodes lead to
        raise InputError(
            f"{path} is damaged or no checkpoint ({type(err).__name__}: {one_line(err)}): fetch or write it again"
        ) from err


def _check_archive(path: Path) -> None:
    """Refuse compressed archives: torch never writes one, and a small one can unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(
            f"{path} is a compressed archive, which torch.save does not write: unpack it and name the file"
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path} is damaged (its parts are larger than the file): fetch or write it again")


def _named_groups(
    tree: Any, where: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """(path of names, named tensors) of every dict in the tree; each object once, so that no loop is endless."""
    seen = set() if seen is None else seen
    if not isinstance(tree, Mapping) or id(tree) in seen or len(where) > MAX_DEPTH:
        return
    seen.add(id(tree))
    own = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if own:
        yield where, own
    for name, value in tree.items():
        if isinstance(name, str) and not OPTIMIZER.search(name):
            yield from _named_groups(value, (*where, name), seen)


def _choose(tree: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The largest group of tensors, or the averaged one where it is about as large."""
    groups = list(_named_groups(tree))
    if not groups:
        return {}, ()
    where, chosen = max(groups, key=lambda group: len(group[1]))
    averaged = [group for group in groups if any(AVERAGED.search(name) for name in group[0])]
    notes = []
    if averaged:
        best = max(averaged, key=lambda group: len(group[1]))
        if 2 * len(best[1]) >= len(chosen):
            where, chosen = best
    inside = {name[len("ema_model.") :]: value for name, value in chosen.items() if name.startswith("ema_model.")}
    if 3 * len(inside) >= len(chosen):  # lucidrains' EMA keeps both copies in one dict
        where, chosen = (*where, "ema_model"), inside
    if any(AVERAGED.search(name) for name in where):
        notes.append(f"The averaged weights (EMA) of the file were taken: {'.'.join(where)}.")
    elif where:
        notes.append(f"The weights were taken from {'.'.join(where)}.")
    if isinstance(tree, Mapping) and not any(AVERAGED.search(name) for name in where):
        lists = [n for n, v in tree.items() if isinstance(v, Mapping) and isinstance(v.get("shadow_params"), list)]
        if lists:
            notes.append(f"{lists[0]}.shadow_params is a list without names and was left: these are not the averages.")
    return chosen, tuple(notes)


def _checked(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    claimed = 0
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{path}: {name} is no plain tensor (sparse, quantized or a subclass): {RESAVE}")
        if tensor.device.type != "cpu":
            raise InputError(f"{path}: {name} carries no values (device {tensor.device}): {RESAVE}")
        claimed += tensor.numel() * tensor.element_size()
    if claimed > MAX_GROWTH * path.stat().st_size + SLACK_BYTES:
        raise InputError(f"{path} claims {claimed:,} bytes of tensors, far more than the file has: it is not loaded")
    found = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if value.is_floating_point():
            value = value.float()
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"{path}: weight {name} holds NaN or infinity: the checkpoint is broken")
        found[name] = value
    return found

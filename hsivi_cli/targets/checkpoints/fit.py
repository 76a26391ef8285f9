"""Names of a foreign state dict fitted to those that a network expects; what does not fit is reported, not guessed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hsivi_cli.errors import InputError

# modules that wrap a network in place; their names may stand anywhere in a key
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
MAX_PARTS = 8
NAMED, MAX_NAME = 3, 120


@dataclass(frozen=True)
class Fitted:
    """`tensors` has the expected names. `stripped` was taken off the file's names, `added` put before them.

    `missing` and `misshapen` name what the network lacks, `unexpected` (the file's names) what it has no place for,
    `whole` what are whole numbers (or complex ones) in the file alone.
    """

    tensors: dict[str, Tensor]
    stripped: str = ""
    added: str = ""
    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every weight that the network expects is there, with its shape."""
        return not self.missing and not self.misshapen

    @property
    def notes(self) -> tuple[str, ...]:
        """What was changed or left, in full sentences; empty where the names were the network's own."""
        notes = []
        if self.stripped:
            notes.append(f"The prefix {self.stripped!r} was stripped from the names in the file.")
        if self.added:
            notes.append(f"The prefix {self.added!r} was put before the names in the file.")
        if self.unexpected:
            n = len(self.unexpected)
            told = "1 tensor of the file was" if n == 1 else f"{n} tensors of the file were"
            notes.append(f"{told} not used: {_some(self.unexpected)}.")
        return tuple(notes)


def fit_keys(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Fitted:
    """Rename `tensors` to the names of the state dict `expected`, of which only shapes and types are read.

    One common prefix is stripped or added, whichever makes most names fit with their shapes; wrappers of torch.compile,
    FSDP and activation checkpointing are dropped wherever they stand.
    """
    plain = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    origin = {_without_wrappers(name): name for name in tensors}
    if len(plain) != len(tensors):  # two names fell together: leave them
        plain, origin = dict(tensors), {name: name for name in tensors}
    strip, strip_votes = _best_prefix(plain, expected)
    add, add_votes = _best_prefix(expected, plain)
    if add_votes > strip_votes:
        strip = ""
        renamed = {add + name: name for name in plain}
    else:
        add = ""
        renamed = {name[len(strip) :]: name for name in plain if name.startswith(strip)}
    found = {name: plain[old] for name, old in renamed.items() if name in expected}
    misshapen = tuple(
        f"{name} is {_shape(tensor)}, not {_shape(expected[name])}"
        for name, tensor in found.items()
        if tensor.shape != expected[name].shape
    )
    missing = tuple(name for name in expected if name not in found)
    used = {renamed[name] for name in found}
    unexpected = tuple(origin[name] for name in plain if name not in used)
    return Fitted(found, strip, add, missing, misshapen, unexpected, whole_numbers(found, expected))


def whole_numbers(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of tensors that are not of floating point where `expected`, which has all of their names, is."""
    return tuple(
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if expected[name].is_floating_point() and not tensor.is_floating_point()
    )


def check_fit(fitted: Fitted, path: Path, network: str) -> None:
    """Raise InputError in one line where weights are missing or have other shapes or types than `network` expects."""
    if fitted.complete:
        check_floating(fitted.whole, path)
        return
    faults = {"missing": fitted.missing, "of another shape": fitted.misshapen, "without a place": fitted.unexpected}
    said = [f"{count(names)} {fault}" for fault, names in faults.items() if names]
    raise InputError(f"{path} does not fit {network}: {'; '.join(said)}")


def check_floating(whole: Sequence[str], path: Path) -> None:
    """Raise InputError in one line if there are any of `whole_numbers`."""
    if whole:
        raise InputError(f"{path} is not of floating point in {count(whole)}: save the weights as they were trained")


def count(names: Sequence[str]) -> str:
    """How many weights, with the first of their names: "5 weights (a, b, c and 2 more)"."""
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({_some(names)})"


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _best_prefix(names: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, int]:
    """The prefix without which most of `names` are `expected` ones with their shapes, and how many; EMA breaks ties."""
    votes: Counter[str] = Counter({"": 0})
    for name, tensor in names.items():
        parts = name.split(".")
        for cut in range(min(len(parts), MAX_PARTS)):
            tail = ".".join(parts[cut:])
            if tail in expected and expected[tail].shape == tensor.shape:
                votes["".join(part + "." for part in parts[:cut])] += 1
    best = max(votes, key=lambda prefix: (votes[prefix], "ema" in prefix.lower(), -len(prefix)))
    return best, votes[best]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _some(names: Sequence[str]) -> str:
    listed = [" ".join(name.split())[:MAX_NAME] for name in names[:NAMED]]
    return ", ".join(listed) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

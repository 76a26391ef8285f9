"""One command in several processes, through Hugging Face Accelerate: who this process is, and what they do together.

`torchrun --nproc-per-node 8 -m hsivi_cli ...` or `accelerate launch -m hsivi_cli ...` starts the same command in every
process; RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR say which one this is. There is no wrapper around networks:
HSIVI's student learns through a frozen critic, so gradients are summed here, after the backward pass. Work is cut by
rows of a batch that is the same whatever the number of processes.

One process pays nothing: everything here returns what it was given, and Accelerate is not imported. A process that ends
breaks the others' next exchange; where it only stops answering, they end after TIMEOUT. (With NCCL an exchange returns
before it is done: its failure shows where a value is next read, or by NCCL's watchdog after TIMEOUT.)
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hsivi_cli.errors import HsiviError, InputError, RunError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # that an exchange may take: longer than a preview, a checkpoint or the metrics of one
GRACE = 5.0  # seconds that the other processes leave to the first to report an error that may be everybody's
_TOLD = "hsivi/told"

_device: "torch.device | None" = None  # where what is exchanged must lie; None before `start`


def launched() -> int:
    """How many processes a launcher has started with this command."""
    return max(_from_environment("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", default=1), 1)


def talks() -> bool:
    """Whether this is the one process that prints, of those launched."""
    return launched() == 1 or _from_environment("RANK", "OMPI_COMM_WORLD_RANK", default=0) == 0


def count() -> int:
    """How many processes share the work; 1 before `start`, for a script that has a launcher of its own."""
    return 1 if _device is None else launched()


def rank() -> int:
    """The number of this process among them, from 0."""
    return 0 if _device is None else _from_environment("RANK", "OMPI_COMM_WORLD_RANK", default=0)


def is_main() -> bool:
    """Whether this is process 0, the only one that writes."""
    return rank() == 0


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    return min(_from_environment("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", default=count()), count())


def start(device: str) -> str:
    """Join the others, and return this process's own device for what the user asked for: `cpu`, `cuda` or `auto`.

    `cuda` becomes the GPU numbered by LOCAL_RANK. With one process, or when called again, `device` comes back as it is
    (`auto` resolved). Raises InputError if there are fewer GPUs than processes on this machine, RunError if the others
    do not come.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not _on_cpu() else "cpu"
    if launched() == 1:
        return device
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):  # without the last, Accelerate starts alone
        if name not in os.environ and f"OMPI_COMM_WORLD_{name}" not in os.environ:
            raise InputError(f"WORLD_SIZE is {launched()}, and {name} is not set: use torchrun, or unset WORLD_SIZE")
    kind, _, number = device.partition(":")
    if number:
        raise InputError(f"--device {device} names one device for {launched()} processes: use --device {kind}")
    local = _from_environment("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", default=0)
    if kind == "cuda" and local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"LOCAL_RANK {local}, and {gpus} GPUs here: start one process a GPU, or use --device cpu")
    global _device
    if _device is None:
        from accelerate import PartialState

        with _exchange():
            _device = PartialState(cpu=kind == "cpu", timeout=TIMEOUT).device
    return kind if kind == "cpu" else str(_device)


def launched_alone() -> bool:
    """Whether Accelerate was asked for several processes and started one, as it does on a CPU without mpirun."""
    return launched() == 1 and _on_cpu() and "MASTER_ADDR" in os.environ


def end() -> None:
    """Leave the group, when all is done; the processes wait for each other first."""
    global _device
    if _device is not None:
        from accelerate import PartialState

        with contextlib.suppress(RunError):
            agree_on_largest(0)
        PartialState().destroy_process_group()
        _device = None


def speaks() -> bool:
    """Whether this process is the one to report the error that ends it; asked once.

    Process 0 does, unless another has already; another does if process 0 has nothing to say within GRACE seconds.
    """
    if _device is None:
        if not talks():
            time.sleep(GRACE)  # a launcher ends all as soon as one has failed: not before the first has said why
        return talks()
    from torch.distributed.distributed_c10d import _get_default_store  # what the processes met at

    try:
        store, since = _get_default_store(), time.monotonic()
        while not is_main() and time.monotonic() - since < GRACE and store.add(_TOLD, 0) == 0:
            time.sleep(0.05)
        return bool(store.add(_TOLD, 1) == 1)
    except (RuntimeError, ValueError):  # process 0 has ended, and its store with it: it has said why
        return is_main()


def share(n: int, of: int | None = None) -> range:
    """The part of `n` rows that belongs to this process, or to process `of`: contiguous, sizes differ by one."""
    number = rank() if of is None else of
    return range(n * number // count(), n * (number + 1) // count())


def gather(rows: "Tensor", sizes: Sequence[int]) -> "Tensor":
    """All processes' `rows` (size_r, ...), one after the other, in every process; `sizes` has one entry a process."""
    if count() == 1:
        return rows
    import torch

    home, widest = rows.device, max(sizes)
    mine = rows.to(_device).contiguous()
    if len(mine) < widest:
        mine = torch.cat([mine, mine.new_zeros(widest - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(mine) for _ in sizes]
    with _exchange():
        torch.distributed.all_gather(parts, mine)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(home)


def in_turns(work: Callable[[range], "Tensor"], n: int, size: int, first: int = 0) -> "Iterator[Tensor]":
    """`work(batch)` for the batches of `size` of `first .. first + n - 1`, in order, in every process.

    The processes take turns. A batch is one call, whoever makes it, so the results do not depend on how many there are;
    `work` returns rows, one for each of `batch`, on any device.
    """
    batches = [range(start, min(start + size, first + n)) for start in range(first, first + n, size)]
    if count() == 1:
        yield from map(work, batches)
        return
    like: Tensor | None = None  # how rows look: one of these may never have a batch of its own to show it
    for turn in range(0, len(batches), count()):
        now = batches[turn : turn + count()]
        mine = work(now[rank()]) if rank() < len(now) else None
        if like is None:
            like = from_main(lambda: cast("Tensor", mine)[:0].cpu())  # noqa: B023 (called at once)
        sizes = [len(batch) for batch in now] + [0] * (count() - len(now))
        rows = gather(like if mine is None else mine, sizes)
        for batch, part in zip(now, rows.split(sizes[: len(now)]), strict=True):
            assert len(part) == len(batch)
            yield part


def sum_gradients(parameters: "Sequence[Tensor]", sums: "Float[Tensor, ' k']") -> "Float[Tensor, ' k']":
    """Add up the gradients of all processes, in place, and `sums` with them: one exchange.

    A parameter without a gradient counts as zeros. Every process has the same bits afterwards.
    """
    if count() == 1:
        return sums
    import torch

    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.reshape(-1) for g in gradients), sums.to(gradients[0])])
    with _exchange():
        torch.distributed.all_reduce(flat)
    *pieces, total = flat.split([*(p.numel() for p in parameters), len(sums)])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view(parameter.shape)
    return total.to(sums)


def agree_on_largest(value: int) -> int:
    """The largest of all processes' values: how they agree to stop."""
    if count() == 1:
        return value
    import torch

    largest = torch.tensor([value], device=_device)
    with _exchange():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in process 0, in every process; what it raises there is raised in all, so that none waits."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main():
        try:
            told[0] = make()
        except Exception as err:
            failure, told[1] = err, (type(err) if isinstance(err, HsiviError) else RunError, str(err))
    with _exchange():
        broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        kind, message = told[1]
        raise kind(message)
    return told[0]


@contextmanager
def led(held: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """Process 0 holds a context manager, for all: its value, or its refusal, is everybody's."""
    with ExitStack() as stack:
        yield from_main(lambda: stack.enter_context(held()))


@contextmanager
def _exchange() -> Iterator[None]:
    """Raise RunError in one line where the others are gone."""
    try:
        yield
    except RuntimeError as err:  # what gloo, nccl and the store raise
        if "out of memory" in str(err):
            raise
        raise RunError(
            f"another of the {launched()} processes has ended or does not answer ({str(err).splitlines()[0][:120]})"
        ) from err


def _on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")  # accelerate launch --cpu


def _from_environment(*names: str, default: int) -> int:
    for name in names:
        with contextlib.suppress(KeyError, ValueError):
            return int(os.environ[name])
    return default

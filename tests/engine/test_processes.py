"""Several processes: who they are, what they exchange, and that none of them waits for one that is gone."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
import torch
from several import in_processes

from hsivi_cli.engine import processes
from hsivi_cli.errors import InputError, RunError


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_cover_all_rows_once_in_order(count, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: count)
    for n in (1, 2, 5, 64):
        shares = [processes.share(n, of=r) for r in range(count)]
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_imports_no_accelerate_and_returns_what_it_was_given():
    script = (
        "import sys; from hsivi_cli.engine import processes as p; heavy = 'torch' in sys.modules; p.start('cpu'); "
        "assert list(p.in_turns(len, 5, 2)) == [2, 2, 1]; assert p.from_main(lambda: 3) == 3; p.end(); "
        "sys.exit(heavy or 'accelerate' in sys.modules or 'torch.distributed.distributed_c10d' not in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def exchange():
    assert processes.start("auto") == "cpu"
    rank = processes.rank()
    rows = torch.arange(2 * rank, dtype=torch.uint8).reshape(rank, 2) + 10 * rank  # none in process 0
    gathered = processes.gather(rows, list(range(processes.count()))).tolist()
    calls = []

    def work(batch):
        calls.append(list(batch))
        return torch.tensor([[float(i), 0.5] for i in batch])

    turns = [t[:, 0].tolist() for t in processes.in_turns(work, 7, 2, first=3)]
    few = [t.tolist() for t in processes.in_turns(lambda b: torch.tensor(list(b)), 1, 2)]
    a, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    a.grad = torch.full((2, 2), float(rank + 1))
    if rank:
        b.grad = torch.arange(3.0)
    sums = processes.sum_gradients([a, b], torch.tensor([1.0, rank]))
    results = (gathered, turns, few, a.grad.tolist(), b.grad.tolist(), sums.tolist())
    agreed = processes.agree_on_largest(15 if rank == 1 else 0), processes.from_main(lambda: rank)
    processes.end()
    return results, agreed, calls


@pytest.mark.parametrize("count", [2, 3])
def test_exchanges(count):
    found = in_processes(count, exchange)
    results, agreed, _ = found[0]
    assert all(r == results and a == agreed for r, a, _ in found)
    gathered, turns, few, a, b, sums = results
    assert gathered == [[10, 11], [20, 21], [22, 23]][: 1 if count == 2 else 3]
    assert turns == [[3, 4], [5, 6], [7, 8], [9]]
    assert few == [[0]]
    assert a == [[count * (count + 1) / 2] * 2] * 2
    assert b == [0.0, count - 1.0, 2.0 * (count - 1)]
    assert sums == [count, count * (count - 1) / 2]
    assert agreed == (15, 0)
    assert sorted(batch for _, _, calls in found for batch in calls) == [[3, 4], [5, 6], [7, 8], [9]]


def refuse():
    raise InputError("no such run")


def refused():
    processes.start("cpu")
    with pytest.raises(InputError, match="no such run"):
        processes.from_main(refuse)
    entered = []

    @contextlib.contextmanager
    def hold():
        entered.append("in")
        yield "held"
        entered.append("out")

    with processes.led(hold) as value:
        entered.append(value)
    spoke = processes.speaks()
    processes.end()
    return entered, spoke


def test_a_refusal_of_the_first_is_everybodys_and_told_once():
    assert in_processes(2, refused) == [(["in", "held", "out"], True), (["held"], False)]


def left_alone(how):
    processes.start("cpu")
    if processes.rank() == 1:
        if how == "error":
            return processes.speaks()
        os._exit(9)
    began = time.monotonic()
    with pytest.raises(RunError, match="another of the 2 processes has ended"):
        processes.agree_on_largest(0)
    assert time.monotonic() - began < processes.GRACE + 10
    return processes.speaks()


def test_a_process_that_ends_does_not_hang_the_other(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.5)
    assert in_processes(2, left_alone, "error") == [False, True]  # the one that knows why has said it
    with pytest.raises(AssertionError, match="process 1"):
        in_processes(2, left_alone, "killed")


def test_bad_environments_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        processes.start("cpu")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="LOCAL_RANK is not set"):  # Accelerate would start alone
        processes.start("cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="use --device cuda"):
        processes.start("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="LOCAL_RANK 1, and 1 GPUs here"):
        processes.start("cuda")

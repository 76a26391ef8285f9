"""Run a function in several gloo processes, for the tests: forked, so that they cost no imports."""

import multiprocessing
import os
import socket
import traceback

SECONDS = 60


def in_processes(count, function, *arguments):
    """What `function(*arguments)` returns in each of `count` processes, in order; fails if one raises or hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ours, children = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_run, args=(sender, rank, count, port, function, arguments), daemon=True)
        child.start()
        sender.close()
        ours.append(receiver)
        children.append(child)
    try:
        results = [_received(receiver, rank) for rank, receiver in enumerate(ours)]
    finally:
        for child in children:
            child.kill()
            child.join()
    for rank, (kind, result) in enumerate(results):
        assert kind == "ok", f"process {rank}: {result}"
    return [result for _, result in results]


def _received(receiver, rank):
    if not receiver.poll(SECONDS):
        return "hung", f"no result within {SECONDS} s"
    try:
        return receiver.recv()
    except EOFError:
        return "ended", "ended without a result"


def _run(sender, rank, count, port, function, arguments):
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in local.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        sender.send(("ok", function(*arguments)))
    except BaseException:
        sender.send(("raised", traceback.format_exc()))

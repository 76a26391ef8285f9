"""Checkpoints round-trip exactly, survive a kill in mid-write, and refuse anything else."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from hsivi_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from hsivi_cli.errors import InputError


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b and type(a) is type(b)


def test_round_trip_of_an_optimiser_and_scalars(tmp_path):
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(layer.parameters(), 1e-3, amsgrad=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    tree = {"step": 7, "x": 0.1 + 0.2, "none": None, "optimiser": optimiser.state_dict(), "half": torch.ones(2).half()}
    save_checkpoint(tmp_path / "c", tree)
    back = load_checkpoint(tmp_path / "c")
    # tuples (Adam's betas) come back as lists
    tree["optimiser"]["param_groups"][0]["betas"] = list(tree["optimiser"]["param_groups"][0]["betas"])
    assert equal(tree, back)
    optimiser.load_state_dict(back["optimiser"])


@pytest.mark.parametrize("damage", ["truncated", "garbage", "foreign", "missing"])
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": torch.ones(100)})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 300)
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"w": torch.ones(1)}, path)
    else:
        path.unlink()
    with pytest.raises(InputError, match=str(path)):
        load_checkpoint(path)


def test_kill_in_mid_write_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import torch
        import hsivi_cli.engine.checkpoint as checkpoint
        path = Path(sys.argv[1])
        checkpoint.save_checkpoint(path, {"step": 1, "w": torch.ones(10)})
        whole = checkpoint.save_file
        def slow(tensors, target, metadata):
            whole(tensors, target, metadata=metadata)
            data = Path(target).read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])  # half of it is on disk when the kill comes
            print("writing", flush=True)
            time.sleep(60)
        checkpoint.save_file = slow
        checkpoint.save_checkpoint(path, {"step": 2, "w": torch.zeros(10)})
        """
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    back = load_checkpoint(path)
    assert back["step"] == 1
    assert torch.equal(back["w"], torch.ones(10))

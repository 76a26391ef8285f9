"""Checkpoints round-trip exactly, survive a kill in mid-write, and refuse anything else."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from hsivi_cli.engine.checkpoint import first_not_finite, keep_checkpoint, load_checkpoint, pack, save_checkpoint
from hsivi_cli.errors import InputError
from hsivi_cli.io.run_directory import checkpoint_step, checkpoints


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


@pytest.mark.parametrize("structure", ["[" * 100_000, "[" * 500 + "]" * 500, "9" * 5000])
def test_a_hostile_structure_is_refused(tmp_path, structure):
    save_file({"w": torch.ones(1)}, tmp_path / "c", metadata={"structure": structure})
    with pytest.raises(InputError, match="is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_whatever_bit_flips_a_checkpoint_is_what_was_written_or_refused_in_one_line(tmp_path):
    path, draws = tmp_path / "c.safetensors", random.Random(0)
    tree = {"step": 3, "w": torch.randn(4, 5), "half": torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0)}
    save_checkpoint(path, tree)
    whole, refused = path.read_bytes(), []
    assert equal(load_checkpoint(path), tree)
    for _ in range(300):
        data = bytearray(whole)
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(data)
        try:
            assert equal(load_checkpoint(path), tree)  # a bit that says nothing, as in the padding
        except InputError as err:
            refused.append(str(err))
    assert len(refused) > 250
    assert not any("\n" in line for line in refused)


def test_checkpoints_without_a_checksum_are_those_of_earlier_versions_only(tmp_path):
    tensors, structure = pack({"step": 3})
    for metadata, good in (({}, True), ({"sha256": "0" * 64}, False), ({"sha257": "x"}, False)):
        save_file(tensors, tmp_path / "c", {"structure": json.dumps(structure)} | metadata)
        if good:
            assert load_checkpoint(tmp_path / "c") == {"step": 3}
        else:
            with pytest.raises(InputError, match="checksum"):
                load_checkpoint(tmp_path / "c")


def test_the_newest_and_the_regular_ones_stay(tmp_path):
    def kept(step, keep, every=0):
        keep_checkpoint(tmp_path, {"step": step}, step, keep, every)
        return [checkpoint_step(path) for path in checkpoints(tmp_path)]

    assert [kept(step, 2, 10) for step in (0, 4, 10, 13, 20, 21, 22)][-1] == [22, 21, 20, 10, 0]
    assert kept(15, 2, 10) == [15, 10, 0]  # a roll-back: what came later is gone
    assert kept(16, 1) == [16]
    (tmp_path / "checkpoint.safetensors").write_bytes(b"of an earlier version")
    assert kept(17, 3) == [17, 16, None]
    assert kept(18, 1) == [18]


def test_what_is_not_finite_is_named():
    assert first_not_finite({"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64), "s": "nan"}) == ""
    assert (
        first_not_finite({"net": {"w": torch.ones(2)}, "state": [{0: torch.tensor([1.0, torch.inf])}]}) == "state/0/0"
    )


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

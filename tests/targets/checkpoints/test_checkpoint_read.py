"""Weights out of strangers' files: the right ones are found, nothing runs, and every fault is one line."""

import argparse
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from hsivi_cli.errors import InputError
from hsivi_cli.targets.checkpoints.read import read_tensors

NET = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3), "steps": torch.tensor(7)}
AVERAGED = {name: tensor + 1 for name, tensor in NET.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3, 2)}}, "many": {f"p{i}": torch.ones(1) for i in range(9)}}


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("tree", "expected", "said"),
    [
        (NET, NET, []),
        (OrderedDict(NET), NET, []),
        ({"state_dict": NET, "epoch": 3, "name": "x"}, NET, ["The weights were taken from state_dict."]),
        ({"model": NET, "optimizer": OPTIMIZER}, NET, ["The weights were taken from model."]),
        (
            {"model": NET, "ema": {"decay": 0.9, "shadow": AVERAGED}},
            AVERAGED,
            ["(EMA) of the file were taken: ema.shadow."],
        ),
        ({"model": NET, "ema_model": AVERAGED}, AVERAGED, ["(EMA) of the file were taken: ema_model."]),
        ({"model": NET, "ema": {"decay": torch.tensor(0.9)}}, NET, ["The weights were taken from model."]),
        (
            {"model": NET, "ema": {"shadow_params": list(AVERAGED.values())}},
            NET,
            ["The weights were taken from model.", "ema.shadow_params is a list without names"],
        ),
        (
            {
                "ema": {"online_model." + n: t for n, t in NET.items()}
                | {"ema_model." + n: t for n, t in AVERAGED.items()}
            },
            AVERAGED,
            ["ema.ema_model"],
        ),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_network_is_found(tmp_path, tree, expected, said, zipped):
    torch.save(tree, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_tensors(tmp_path / "net.pt")
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())
    assert len(found.notes) == len(said)
    assert all(part in note for part, note in zip(said, found.notes, strict=True))


def test_safetensors_and_halves_become_float32(tmp_path):
    save_file(
        {"a": torch.ones(2, dtype=torch.float16), "n": torch.ones(2, dtype=torch.int64)}, tmp_path / "n.safetensors"
    )
    found = read_tensors(tmp_path / "n.safetensors").tensors
    assert (found["a"].dtype, found["n"].dtype) == (torch.float32, torch.int64)


def looped():
    tree: dict = {"a": NET}
    tree["b"] = tree
    return tree


def wide():
    """A hundred levels that each hold the last twice: 2^100 paths through 100 dicts."""
    tree: dict = {"w": torch.ones(1)}
    for _ in range(100):
        tree = {"left": tree, "right": tree}
    return {"model": NET, "more": tree}


@pytest.mark.parametrize("tree", [looped(), wide()])
def test_trees_that_never_end_do(tmp_path, tree):
    torch.save(tree, tmp_path / "net.pt")
    assert read_tensors(tmp_path / "net.pt").tensors.keys() == NET.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, zipped):
    mark = tmp_path / "ran"
    torch.save({"model": NET, "x": Code(mark)}, tmp_path / "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="which only running code could read") as caught:
        read_tensors(tmp_path / "net.pt")
    assert "mkdir" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Code(mark)))
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Code(mark)))
    for name in ("bare.bin", "bare.pkl"):
        with pytest.raises(InputError):
            read_tensors(tmp_path / name)
    assert not mark.exists()


def test_objects_beside_the_weights_are_named(tmp_path):
    torch.save({"model": NET, "args": argparse.Namespace(lr=1)}, tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"holds argparse\.Namespace, which only running code could read"):
        read_tensors(tmp_path / "net.pt")


def nan(path):
    torch.save({"a": torch.tensor([1.0, float("nan")])}, path)


def infinite_half(path):
    torch.save({"a": torch.tensor([1e30], dtype=torch.float32).half()}, path)


def expanded(path):
    torch.save({"a": torch.ones(1).expand(10**12)}, path)


def sparse(path):
    torch.save({"a": torch.ones(3, 3).to_sparse()}, path)


def on_meta(path):
    torch.save({"a": torch.ones(3, device="meta")}, path)


def compressed(path):
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as old:
        parts = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in parts.items():
            new.writestr(name, content)


def hostile_header(path):
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    ("name", "write", "what"),
    [
        ("net.pt", nan, "weight a holds NaN or infinity"),
        ("net.pt", infinite_half, "weight a holds NaN or infinity"),
        ("net.pt", expanded, "claims 4,000,000,000,000 bytes"),
        ("net.pt", sparse, "a is no plain tensor"),
        ("net.pt", on_meta, "a carries no values"),
        ("net.pt", compressed, "compressed archive"),
        ("net.pt", lambda p: torch.save([torch.ones(3)], p), "holds no named tensors"),
        ("net.pt", lambda p: torch.save({"a": 1, 3: torch.ones(2)}, p), "holds no named tensors"),
        ("net.pt", lambda p: p.write_bytes(b""), "damaged"),
        ("net.pt", lambda p: p.write_bytes(b"PK\x03\x04"), "damaged"),
        ("net.pt", lambda p: p.write_text("hello"), "damaged"),
        ("net.safetensors", hostile_header, "damaged"),
        ("net.safetensors", lambda p: p.write_bytes(b""), "damaged"),
        ("net.safetensors", lambda p: torch.save(NET, p), "damaged"),
        ("net.onnx", lambda p: p.write_bytes(b"x"), "weights are read from .safetensors"),
        ("net.pt", lambda p: p.mkdir(), "is a directory"),
        ("net.pt", lambda p: None, "does not exist"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, name, write, what):
    write(tmp_path / name)
    with pytest.raises(InputError, match=what) as caught:
        read_tensors(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)

"""A student in one file: the same images and hash as its directory, and every broken one named in a line."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hsivi_cli import HSIVIPipeline
from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError
from hsivi_cli.io.files import asset
from hsivi_cli.methods.describe import describe
from hsivi_cli.methods.sampling import open_sampler
from hsivi_cli.methods.student import (
    Student,
    find_students,
    load_student,
    sample_student,
    save_student,
    select_student,
    student_sha256,
)
from hsivi_cli.methods.student_file import KEY, write_student_file
from hsivi_cli.targets.user_network import build_user_network


@pytest.fixture
def packed(tiny_student, tmp_path):
    file = tmp_path / "student.safetensors"
    write_student_file(tiny_student, file)
    return file


def rewrite(file, tensors=None, **fields):
    """The file with other tensors, or other fields of its metadata."""
    with safe_open(file, framework="pt") as header:
        contents = json.loads(header.metadata()[KEY])
    save_file(tensors or {k: v.clone() for k, v in load_file(file).items()}, file, {KEY: json.dumps(contents | fields)})


def test_it_is_the_directory(packed, tiny_student):
    """Byte for byte, once unpacked: the hash is that of the files."""
    ours, theirs = load_student(packed), load_student(tiny_student)
    assert ours.sha256 == theirs.sha256
    assert ours.description == theirs.description
    assert ours.path == packed
    assert torch.equal(*(sample_student(s, PhiloxStreams(0, range(3))) for s in (ours, theirs)))
    assert open_sampler(packed).description == open_sampler(tiny_student).description
    assert describe(packed) == describe(tiny_student) | {"path": str(packed)}
    pipe = HSIVIPipeline.from_pretrained(packed)
    assert torch.equal(pipe.scheduler.log_gamma, theirs.log_gamma)


def test_the_shipped_student_keeps_its_hash(tmp_path):
    write_student_file(asset("mnist/nfe3"), tmp_path / "s.safetensors")
    assert load_student(tmp_path / "s.safetensors").sha256 == student_sha256(asset("mnist/nfe3"))


def test_a_file_can_be_packed_again_and_saved_as_a_directory(packed, tiny_student, tmp_path):
    write_student_file(packed, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == packed.read_bytes()
    save_student(load_student(packed), tmp_path / "directory")
    assert student_sha256(tmp_path / "directory") == student_sha256(tiny_student)


def test_it_is_found_as_its_only_student(packed, tiny_teacher):
    assert find_students(packed) == {3: packed}
    assert select_student(packed, None) == select_student(packed, 3) == packed
    with pytest.raises(InputError, match="students for NFE 3 only"):
        select_student(packed, 5)
    weights = tiny_teacher / "unet" / "diffusion_pytorch_model.safetensors"
    assert find_students(weights) == {}  # a teacher's weights are none
    assert describe(weights)["kind"] == "safetensors"


def test_a_network_of_the_users_own(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.w = torch.nn.Parameter(torch.ones(1))\n    def forward(self, x, t):\n        return self.w * x\n"
    )
    spec = f"{tmp_path / 'net.py'}:Net"
    network = build_user_network(spec, (1, 8, 8)).eval()
    schedule = load_student(asset("mnist/nfe3")).schedule
    save_student(Student(network, torch.tensor(0.0), (0, 200, 800), 0.5, schedule, {}), tmp_path / "s")
    write_student_file(tmp_path / "s", tmp_path / "s.safetensors")
    assert load_student(tmp_path / "s.safetensors", network=spec).sha256 == student_sha256(tmp_path / "s")
    with pytest.raises(InputError, match="add --network"):
        load_student(tmp_path / "s.safetensors")


def broken_gamma(file):
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    rewrite(file, tensors | {"log_gamma": torch.zeros(7)})


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), "damaged"),
        (lambda f: f.write_bytes(b"junk"), "damaged"),
        (lambda f: save_file({"x": torch.zeros(2)}, f), "holds no student"),
        (lambda f: save_file({"x": torch.zeros(2)}, f, metadata={KEY: "[" * 100_000}), "damaged"),
        (lambda f: save_file({"x": torch.zeros(2)}, f, metadata={KEY: "9" * 5000}), "damaged"),
        (lambda f: rewrite(f, description={"a": json.loads("[" * 500 + "]" * 500)}), "nested"),
        (lambda f: rewrite(f, description=[]), "describe no student"),
        (lambda f: rewrite(f, description={"nfe": "3"}), "nfe '3'"),
        (lambda f: rewrite(f, description={"nfe": 3, "format": 99}), "upgrade hsivi"),
        (lambda f: rewrite(f, unet={"_class_name": "AutoencoderKL"}), "AutoencoderKL is not supported"),
        (lambda f: rewrite(f, unet={"sample_size": 8}), "does not fit"),
        (lambda f: rewrite(f, tensors={"log_gamma": torch.zeros(1, 8, 8)}), "other tensors"),
        (lambda f: rewrite(f, tensors=load_file(f) | {"more": torch.zeros(1)}), "other tensors"),
        (broken_gamma, r"shape \(7,\)"),
    ],
)
def test_broken_files_are_named(packed, damage, what):
    damage(packed)
    with pytest.raises(InputError, match=what) as caught:
        open_sampler(packed)
    assert str(packed) in str(caught.value)
    assert "hsivi-" not in str(caught.value)  # where it was unpacked is nobody's business
    assert "\n" not in str(caught.value)


def test_nothing_is_left_behind(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    load_student(packed)
    assert not list((tmp_path / "scratch").iterdir())
    shutil.rmtree(tmp_path / "scratch")

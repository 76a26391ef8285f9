"""Students on disk: a round trip changes nothing, a broken one is named, a run offers the NFE it has."""

import json
import shutil

import pytest
import torch

from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError
from hsivi_cli.methods.student import (
    LOG_GAMMA,
    find_best,
    find_students,
    load_student,
    record_teacher_fid,
    sample_student,
    save_student,
    select_student,
)


@pytest.fixture
def copied(tiny_student, tmp_path):
    path = tmp_path / "student"
    shutil.copytree(tiny_student, path)
    return path


def test_round_trip(tiny_student, tmp_path):
    student = load_student(tiny_student)
    save_student(student, tmp_path / "again")
    again = load_student(tmp_path / "again")
    assert (again.grid, again.eta, again.nfe) == (student.grid, student.eta, student.nfe)
    draws = [sample_student(s, PhiloxStreams(0, range(3))) for s in (student, again)]
    assert torch.equal(*draws)


def test_saving_over_an_older_student_replaces_it_whole(tiny_student, tmp_path):
    target = tmp_path / "s"
    shutil.copytree(tiny_student, target)
    (target / "leftover").write_text("old")
    save_student(load_student(tiny_student), target)
    assert not (target / "leftover").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_last_layer_adds_no_noise(tiny_student):
    student = load_student(tiny_student)

    class Counting(PhiloxStreams):
        draws = 0

        def draw(self, shape, device="cpu"):
            self.draws += 1
            return super().draw(shape, device)

    noise = Counting(0, range(2))
    sample_student(student, noise)
    assert noise.draws == student.nfe  # x_K and one a layer but the last


def test_forwards_are_the_nfe(tiny_student):
    student, calls = load_student(tiny_student), []
    student.unet.register_forward_hook(lambda *args: calls.append(1))
    sample_student(student, PhiloxStreams(0, range(2)))
    assert len(calls) == student.nfe


def edit(path, **fields):
    """Change a student on purpose, as its author may: without its checksums."""
    file = path / "hsivi.json"
    (path / "SHA256SUMS").unlink(missing_ok=True)
    before = {key: value for key, value in json.loads(file.read_text()).items() if key != "chain_sha256"}
    file.write_text(json.dumps(before | fields))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: edit(p, format=99), "format"),
        (lambda p: edit(p, grid=[0, 5]), "--grid"),
        (lambda p: edit(p, grid="quad"), "hsivi.json"),
        (lambda p: edit(p, eta=None), "description"),
        (lambda p: edit(p, schedule={"prediction_type": "flow"}), "flow"),
        (lambda p: (p / "log_gamma.safetensors").unlink(), "log_gamma"),
        (lambda p: (p / "log_gamma.safetensors").write_bytes(b"junk"), "log_gamma"),
        (lambda p: (p / "hsivi.json").write_text("no"), "JSON"),
        (lambda p: shutil.rmtree(p / "unet"), "unet"),
    ],
)
def test_broken_students_are_named(copied, damage, what):
    damage(copied)
    with pytest.raises(InputError, match=what):
        load_student(copied)


def flip(file, where):
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", LOG_GAMMA])
@pytest.mark.parametrize("where", [0.3, 0.9])
def test_a_flipped_bit_is_refused_in_one_line_that_names_the_file(copied, name, where):
    flip(copied / name, where)
    with pytest.raises(InputError, match=f"{name} is damaged: ") as raised:
        load_student(copied)
    assert "\n" not in str(raised.value)


def test_a_chain_that_was_not_written_so_is_refused(copied):
    file = copied / "hsivi.json"
    file.write_text(file.read_text().replace('"eta": 0.2', '"eta": 0.3'))
    with pytest.raises(InputError, match=r"hsivi\.json is damaged: .*eta"):
        load_student(copied)


def test_checksums_are_those_that_sha256sum_reads(copied):
    import subprocess

    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=copied, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == [
        "log_gamma.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_the_best_of_a_run_is_asked_for_by_its_own_path(tiny_student, tmp_path):
    for name in ("nfe3", "nfe3-best", "nfe3-best.tmp"):
        shutil.copytree(tiny_student, tmp_path / name)
    shutil.rmtree(tmp_path / "nfe3-best.tmp")
    assert find_students(tmp_path) == {3: tmp_path / "nfe3"}
    assert find_best(tmp_path) == {3: tmp_path / "nfe3-best"}
    assert select_student(tmp_path / "nfe3-best", 3) == tmp_path / "nfe3-best"


def test_a_run_offers_its_students(tiny_student, tmp_path):
    nfe = load_student(tiny_student).nfe
    shutil.copytree(tiny_student, tmp_path / f"nfe{nfe}")
    assert select_student(tmp_path, nfe) == tmp_path / f"nfe{nfe}"
    assert select_student(tmp_path, None) == tmp_path / f"nfe{nfe}"
    with pytest.raises(InputError, match=f"students for NFE {nfe} only"):
        select_student(tmp_path, nfe + 1)
    with pytest.raises(InputError, match="holds no student"):
        select_student(tmp_path / f"nfe{nfe}" / "unet", nfe)
    with pytest.raises(InputError, match="does not exist"):
        select_student(tmp_path / "none", nfe)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"teacher": "/elsewhere", "started_from": "/tmp/x", "step": 9, "seed": 5, "hsivi_version": "9"}, True),
        ({"teacher_fid": {"value": 1.0}, "preview_fid": {"value": 2.0}, "recipe": {"lr": 1}}, True),
        ({"eta": 0.3}, False),
        ({"grid": [0, 100, 300, 801]}, False),
        ({"schedule": {"beta_schedule": "scaled_linear"}}, False),
    ],
)
def test_the_hash_is_of_what_a_student_computes_with(copied, changes, same):
    before = load_student(copied).sha256
    schedule = json.loads((copied / "hsivi.json").read_text())["schedule"]
    edit(copied, **changes | ({"schedule": schedule | changes["schedule"]} if "schedule" in changes else {}))
    assert (load_student(copied).sha256 == before) == same


def test_the_hash_follows_the_tensors_and_the_architecture(copied, tmp_path):
    from safetensors.torch import load_file, save_file

    edit(copied)
    found = {load_student(copied).sha256}
    for name in ("log_gamma.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        tensors = load_file(copied / name)
        first = next(iter(tensors))
        (copied / name).unlink()
        save_file(tensors | {first: tensors[first] + 1e-3}, copied / name)
        found.add(load_student(copied).sha256)
    config = json.loads((copied / "unet" / "config.json").read_text())
    (copied / "unet" / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-3}))
    found.add(load_student(copied).sha256)
    assert len(found) == 4
    # who wrote the file is no part of the network
    (copied / "unet" / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-3, "_diffusers_version": "0"}))
    assert load_student(copied).sha256 in found


MEASURED = {"value": 1.5, "n": 5000, "solver": "ddpm", "nfe": 1000, "reference_sha256": "a", "extractor_sha256": "b"}


def test_a_teachers_fid_is_recorded_whole_or_not_at_all(copied):
    fields = MEASURED | {"teacher_sha256": load_student(copied).description["teacher_sha256"], "source": "drawn.npy"}
    for wrong in ({"value": float("nan")}, {"value": -1.0}, {"value": None}, {"n": "many"}, {"nfe": True}):
        with pytest.raises(InputError, match="cannot be recorded"):
            record_teacher_fid(copied, fields | wrong)
    for missing in ("extractor_sha256", "solver"):
        with pytest.raises(InputError, match=f"cannot be recorded: {missing}"):
            record_teacher_fid(copied, {name: value for name, value in fields.items() if name != missing})
    with pytest.raises(InputError, match="another teacher"):
        record_teacher_fid(copied, fields | {"teacher_sha256": "c"})
    assert "teacher_fid" not in load_student(copied).description
    before = load_student(copied).description
    record_teacher_fid(copied, fields)
    assert load_student(copied).description == before | {"teacher_fid": fields}
    assert [path.name for path in copied.parent.iterdir()] == ["student"]  # no lock where there is no run

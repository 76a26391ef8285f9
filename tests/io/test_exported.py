"""Programs that torch saved are known by the names in their archive, and refused where others are wanted."""

import json
import zipfile

import pytest

from hsivi_cli.cli.app import main
from hsivi_cli.errors import InputError
from hsivi_cli.io.exported import saved_program

TORCHSCRIPT = ("s/data.pkl", "s/code/__torch__/net.py", "s/constants.pkl", "s/version")
TORCH_EXPORT = ("archive/models/model.json", "archive/data/sample_inputs/model.pt", "archive/archive_format")


def archive(path, names, description=None, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name in names:
            file.writestr(name, b"no pickle, no code")
        if description is not None:
            file.writestr(f"{names[0].split('/')[0]}/extra/hsivi.json", description)
    return path


@pytest.mark.parametrize(
    ("name", "names", "format", "opener"),
    [
        ("s.pt", TORCHSCRIPT, "torchscript", "torch.jit.load"),
        ("s.pt2", TORCH_EXPORT, "torch-export", "torch.export.load"),
        ("s.bin", TORCH_EXPORT, "torch-export", "torch.export.load"),
    ],
)
def test_an_exported_sampler_is_described_and_refused_elsewhere(tmp_path, capsys, name, names, format, opener):
    path = archive(tmp_path / name, names, json.dumps({"format": 1, "nfe": 5, "grid": [0, 32, 800]}))
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["format"], facts["nfe"], facts["grid"]) == (
        "exported sampler",
        format,
        5,
        [0, 32, 800],
    )
    assert opener in facts["opened_by"]
    out = str(tmp_path / "g.png")
    for arguments, instead in (
        (["sample", str(path), "--out", out], "student's directory"),
        (["evaluate", str(path), "--reference", "digits"], "student's directory"),
        (["export", str(path), "--out", str(tmp_path / "again.pt")], "student's directory"),
        (["distill", "--score-net", str(path), "--dry-run"], "teacher"),
    ):
        assert main(arguments) == 2
        stderr = capsys.readouterr().err
        assert f"{name} is an exported sampler ({format}), which torch alone opens, by {opener}: name" in stderr
        assert instead in stderr


def test_other_archives(tmp_path, capsys):
    assert saved_program(archive(tmp_path / "weights.pt", ("s/data.pkl", "s/data/0"))) is None
    (tmp_path / "text.pt").write_text("PK, but no archive")
    assert saved_program(tmp_path / "text.pt") is None
    assert saved_program(tmp_path) is None
    # of somebody else: no description
    assert main(["inspect", str(archive(tmp_path / "net.pt", TORCHSCRIPT))]) == 0
    assert "exported sampler" not in capsys.readouterr().out
    with pytest.raises(InputError, match="is damaged"):
        saved_program(archive(tmp_path / "broken.pt", TORCHSCRIPT, "{"))


def test_what_torch_writes(tiny_student, tmp_path):
    from hsivi_cli.methods.export import export_student
    from hsivi_cli.methods.student import load_student

    student = load_student(tiny_student)
    for name, kind in (("s.pt", "torchscript"), ("s.pt2", "torch-export")):
        export_student(student, tmp_path / name, kind)
        assert saved_program(tmp_path / name).format == kind
        assert saved_program(tmp_path / name).description == student.description

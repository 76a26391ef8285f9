"""`hsivi evaluate` from the command line: results on stdout, the story on stderr, exit codes."""

import io
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from hsivi_cli.cli.app import main
from hsivi_cli.evaluation import metrics
from hsivi_cli.io.images import read_images


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSETS", 2)


def evaluate(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(["evaluate", *argv, "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def array(tmp_path):
    """28x28 noise in a file."""
    path = tmp_path / "noise.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (80, 28, 28), dtype=np.uint8))
    return str(path)


def test_import_is_light():
    code = (
        "import sys; import hsivi_cli.cli.evaluate; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_json_is_all_of_stdout(capsys, array):
    code, out, err = evaluate(capsys, array, "--reference", "digits", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["metrics"]["fid@80"] > 10
    assert set(found["metrics"]) == {
        f"{m}@80" for m in ("fid", "kid", "kid_std", "isc", "isc_std", "precision", "recall")
    }
    assert found["protocol"]["reference"]["n"] == 60_000
    assert found["protocol"]["samples"]["quantisation"]
    assert "warning" in err


def test_table(capsys, array):
    code, out, _ = evaluate(capsys, array, "--reference", "digits", "-n", "70")
    assert code == 0
    assert "fid@70" in out
    assert "weights_sha256" in out


def test_gate_prints_first(capsys, array):
    code, out, err = evaluate(capsys, array, "--reference", "digits", "--json", "--max-fid", "0.5")
    assert code == 3
    assert json.loads(out)["metrics"]["fid@80"] > 0.5
    assert "--max-fid" in err


def test_stream(capsys, monkeypatch):
    buffer = io.BytesIO()
    np.save(buffer, read_images("digits", 100).images)
    np.save(buffer, read_images("digits", 100).images)
    buffer.seek(0)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))
    code, out, _ = evaluate(capsys, "-", "--reference", "digits", "--json")
    assert code == 0
    assert "fid@200" in json.loads(out)["metrics"]


def test_subset_is_random_and_says_so(capsys, array):
    _, out, _ = evaluate(capsys, array, "--reference", "digits", "-n", "70", "--json")
    assert json.loads(out)["protocol"]["samples"]["subset"] == "70 of 80, at random, seed 2020"
    _, out, _ = evaluate(capsys, array, "--reference", "digits", "-n", "80", "--json")
    assert "subset" not in json.loads(out)["protocol"]["samples"]


def test_teacher_fid_needs_the_same_protocol(capsys, tiny_run, tmp_path):
    from hsivi_cli.evaluation.reference import fid_against
    from hsivi_cli.io.files import read_json

    meter = fid_against("digits", (8, 8, 1))
    known = {"value": 1.5, "n": 8, "solver": "ddim", "nfe": 50}
    known |= {"reference_sha256": meter.reference_sha256, "extractor_sha256": meter.extractor_sha256}
    shutil.copytree(tiny_run / "nfe3", tmp_path / "nfe3")
    fields = read_json(tiny_run / "nfe3" / "hsivi.json")
    for teacher_fid, n, expected in ((known, "8", known), (known, "9", None), (1.5, "8", None)):
        (tmp_path / "nfe3" / "hsivi.json").write_text(json.dumps(fields | {"teacher_fid": teacher_fid}))
        _, out, _ = evaluate(capsys, str(tmp_path), "--nfe", "3", "-n", n, "--reference", "digits", "--json")
        assert json.loads(out)["protocol"]["samples"].get("teacher_fid") == expected


def test_student_does_not_depend_on_the_batch(capsys, tiny_run):
    """But for rounding, which moves a pixel by one grey level at most (see tests/methods/test_sampling.py)."""
    found = []
    for batch in ("3", "8"):
        argv = (str(tiny_run), "--nfe", "3", "-n", "8", "--reference", "digits", "--json", "--batch-size", batch)
        code, out, _ = evaluate(capsys, *argv)
        assert code == 0
        found.append(json.loads(out))
    samples = found[0]["protocol"]["samples"]
    fids = [json_["metrics"]["fid@8"] for json_ in found]
    assert fids[0] == pytest.approx(fids[1], rel=1e-2)
    assert (samples["nfe"], samples["seed"]) == (3, 0)
    assert samples["model"]["sha256"]
    assert "teacher_fid" not in samples


def test_teacher(capsys, tiny_teacher):
    argv = ("--reference", "digits", "--json", "-n", "6")
    code, out, _ = evaluate(capsys, str(tiny_teacher), "--solver", "ddim", "--nfe", "3", *argv)
    assert code == 0
    assert json.loads(out)["protocol"]["samples"]["model"]["solver"] == "ddim"
    code, out, err = evaluate(capsys, str(tiny_teacher), *argv)
    assert (code, out) == (2, "")
    assert "--solver" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{array}", "--reference", "{small}"], "8x8 grey"),
        (["{array}", "--reference", "missing.npz"], "does not exist"),
        (["missing.npy", "--reference", "digits"], "does not exist"),
        (["{array}", "--reference", "digits", "--nfe", "5"], "--nfe is for models"),
        (["{array}", "--reference", "digits", "--clip"], "--clip is for models"),
        (["{array}", "--reference", "digits", "--order", "2"], "--order is for models"),
        (["{array}", "--reference", "digits", "--graph"], "--graph is for models"),
        (["{array}", "--reference", "digits", "--kernels", "torch"], "--kernels is for models"),
        (["{array}", "--reference", "digits", "--max-fid", "nan"], "--max-fid"),
        (["{array}", "--reference", "digits", "--features", "inception"], "nothing is downloaded"),
        (["{array}", "--reference", "digits", "--features", "what"], "unknown"),
        (["{array}", "--reference", "digits", "--device", "nonsense"], "not available"),
        (["{large}", "--reference", "digits", "--features", "digits"], "12x12"),
        (["{large}", "--reference", "{stats}", "--features", "digits"], "3 features"),
        (["{array}"], "--reference"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, monkeypatch, array, argv, says):
    monkeypatch.delenv("HSIVI_INCEPTION_WEIGHTS", raising=False)
    for name, size in (("small", 8), ("large", 12)):
        np.save(tmp_path / f"{name}.npy", np.zeros((4, size, size), np.uint8))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    paths = {"small": tmp_path / "small.npy", "large": tmp_path / "large.npy", "stats": tmp_path / "stats.npz"}
    code = main(["evaluate", *(a.format(array=array, **paths) for a in argv)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("error:") == 1


def test_shipped_statistics_belong_to_digits(capsys, tmp_path, array):
    import torch

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(-1).flatten(1)

    torch.jit.save(torch.jit.script(Mean()), str(tmp_path / "mean.pt"))
    code, _, err = evaluate(capsys, array, "--reference", "digits", "--features", str(tmp_path / "mean.pt"))
    assert code == 2
    assert "--features digits" in err
    code, out, _ = evaluate(capsys, array, "--reference", array, "--features", str(tmp_path / "mean.pt"), "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["isc@80"] is None


def test_precision_is_stated_and_moves_little(capsys, tiny_run):
    found = {}
    argv = (str(tiny_run), "--nfe", "3", "-n", "40", "--reference", "digits", "--json", "--precision")
    for precision in ("fp32", "bf16"):
        code, out, _ = evaluate(capsys, *argv, precision)
        assert code == 0
        found[precision] = json.loads(out)
        assert found[precision]["protocol"]["samples"]["model"]["precision"] == precision
    fids = [found[p]["metrics"]["fid@40"] for p in ("fp32", "bf16")]
    assert fids[0] != fids[1]
    assert fids[0] == pytest.approx(fids[1], rel=0.05)
    code, out, err = evaluate(capsys, *argv, "fp8")
    assert (code, out) == (2, "")
    assert "--precision 'fp8' is unknown" in err


def test_absurd_numbers_are_refused(capsys, tiny_run):
    for n in ("10000000000000", "1" + "0" * 30):
        code, out, err = evaluate(capsys, str(tiny_run), "--nfe", "3", "-n", n, "--reference", "digits")
        assert (code, out) == (2, "")
        assert f"-n {n} takes" in err


@pytest.fixture
def run_copy(tiny_run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(tiny_run, path)
    (path / "config.json").write_text("{}")
    return path


TEACHER = ("--solver", "ddim", "--nfe", "4", "-n", "9", "--reference", "digits", "--json")


def test_a_recorded_teacher_stands_beside_its_students(capsys, tiny_teacher, run_copy):
    """In both students of a run; the ratio is shown at the same N and against the same reference only."""
    from hsivi_cli.methods.student import load_student

    before = {nfe: load_student(run_copy / f"nfe{nfe}").sha256 for nfe in (3, 5)}
    code, out, err = evaluate(capsys, str(tiny_teacher), *TEACHER, "--record", str(run_copy))
    assert code == 0
    teacher = json.loads(out)
    assert err.count("recorded as the teacher's FID") == 2
    assert not (run_copy / ".lock").exists()
    student = (str(run_copy), "--nfe", "3", "--reference", "digits")
    code, out, _ = evaluate(capsys, *student, "-n", "9", "--json")
    assert code == 0
    found = json.loads(out)
    recorded = found["protocol"]["samples"]["teacher_fid"]
    assert recorded["value"] == teacher["metrics"]["fid@9"]
    assert (recorded["solver"], recorded["nfe"], recorded["n"], recorded["seed"]) == ("ddim", 4, 9, 0)
    assert recorded["samples_sha256"] == teacher["protocol"]["samples"]["sha256"]
    ratio = found["metrics"]["fid@9"] / recorded["value"]
    assert found["metrics"]["fid_over_teacher@9"] == pytest.approx(ratio)
    assert "by ddim at NFE 4" in found["notes"]["fid_over_teacher@9"]
    _, out, _ = evaluate(capsys, *student, "-n", "9")
    assert "fid_over_teacher@9" in out
    _, out, _ = evaluate(capsys, *student, "-n", "8", "--json")
    assert "fid_over_teacher@8" not in json.loads(out)["metrics"]
    # what was measured on a student does not change what it is
    assert {nfe: load_student(run_copy / f"nfe{nfe}").sha256 for nfe in (3, 5)} == before


def test_only_a_students_own_teacher_is_recorded(capsys, tiny_teacher, run_copy, teacher_copy, array, monkeypatch):
    from hsivi_cli.cli import drawing
    from hsivi_cli.io.run_directory import lock_run

    monkeypatch.setattr(drawing, "draw_all", lambda *a: pytest.fail("drawn before the check"))
    before = (run_copy / "nfe3" / "hsivi.json").read_text()

    def refused(says, *argv):
        code, out, err = evaluate(capsys, *argv)
        assert (code, out) == (2, "")
        assert says in err

    refused("another teacher", str(teacher_copy(beta_end=0.03)), *TEACHER, "--record", str(run_copy / "nfe3"))
    refused("no student", str(tiny_teacher), *TEACHER, "--record", "nowhere")
    refused("--record writes", array, "--reference", "digits", "--record", str(run_copy))
    refused("--record writes", str(run_copy), "--nfe", "3", "--reference", "digits", "--record", str(run_copy))
    with lock_run(run_copy):
        refused("in use", str(tiny_teacher), *TEACHER, "--record", str(run_copy))
    assert (run_copy / "nfe3" / "hsivi.json").read_text() == before

import io
import json
import shutil

import numpy as np
import pytest

from hsivi_cli.cli.app import main


def fails(capsys, code, says, *argv):
    assert main(["sample", *map(str, argv)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert "Traceback" not in err


def test_stream_is_the_only_thing_on_stdout(tiny_run, capfdbinary):
    assert main(["sample", str(tiny_run), "--nfe", "5", "-n", "3", "--out", "-", "--device", "cpu"]) == 0
    out, err = capfdbinary.readouterr()
    assert np.load(io.BytesIO(out)).shape == (3, 8, 8, 1)
    assert b"NFE 5" in err


def test_json_says_what_made_the_images(tiny_teacher, tmp_path, capsys):
    out = str(tmp_path / "grid.png")
    argv = ["sample", str(tiny_teacher), "--solver", "ddim", "--nfe", "10", "-n", "4", "--out", out, "--json"]
    assert main(argv) == 0
    result, story = capsys.readouterr()
    payload = json.loads(result)
    assert (payload["out"], payload["n"], payload["nfe"]) == (out, 4, 10)
    assert payload["sampler"]["spacing"] == "leading"
    assert payload["images_per_second"] > 0
    assert payload["kernels"] == ("auto" if payload["device"] == "cpu" else "torch")
    assert "ddim (leading)" in story


def test_solver_options_reach_the_solver(tiny_teacher, tmp_path, capsys):
    argv = ["sample", str(tiny_teacher), "--solver", "dpm++", "--nfe", "5", "-n", "2", "--json"]
    assert main([*argv, "--spacing", "quad", "--order", "3", "--clip", "--out", str(tmp_path / "a.npy")]) == 0
    result, story = capsys.readouterr()
    sampler = json.loads(result)["sampler"]
    assert (sampler["spacing"], sampler["order"], sampler["clip"]) == ("quad", 3, True)
    assert "dpm++ (quad, order 3, clipped), NFE 5" in story


def test_fused_modules_draw_the_same_images(tiny_student, tmp_path):
    files = [tmp_path / f"{kernels}.npy" for kernels in ("auto", "torch")]
    for file in files:
        argv = ["sample", str(tiny_student), "-n", "5", "--device", "cpu", "--kernels", file.stem, "--out", str(file)]
        assert main(argv) == 0
    fused, plain = (np.load(file).astype(int) for file in files)
    assert abs(fused - plain).max() <= 1
    assert (fused != plain).mean() < 0.01


def test_prints_the_path(tiny_student, tmp_path, capsys):
    out = str(tmp_path / "a.npz")
    assert main(["sample", str(tiny_student), "-n", "2", "--out", out]) == 0
    assert capsys.readouterr().out == out + "\n"


def test_bad_usage(tiny_run, tiny_teacher, tmp_path, capsys):
    taken = tmp_path / "taken.png"
    taken.touch()
    file = tmp_path / "file"
    file.touch()
    out = ("--out", tmp_path / "new.png")
    fails(capsys, 2, "does not exist", tmp_path / "none", *out)
    fails(capsys, 2, "is a file", file, *out)
    fails(capsys, 2, "--kernels 'cuda' is unknown", tiny_run, "--nfe", 3, "--kernels", "cuda", *out)
    fails(
        capsys, 2, "use --kernels auto or torch", tiny_run, "--nfe", 3, "--kernels", "triton", "--device", "cpu", *out
    )
    fails(capsys, 2, "--graph: it needs an NVIDIA GPU", tiny_run, "--nfe", 3, "--graph", "--device", "cpu", *out)
    fails(capsys, 2, "--graph is for students", tiny_teacher, "--solver", "ddim", "--graph", *out)
    both = "choose one of them"
    fails(capsys, 2, both, tiny_run, "--nfe", 3, "--kernels", "triton", "--compile", "--device", "cpu", *out)
    fails(capsys, 2, "NFE 3, 5 only", tiny_run, "--nfe", 4, *out)
    fails(capsys, 2, "--solver", tiny_teacher, *out)
    fails(capsys, 2, "drop --solver", tiny_run, "--solver", "ddim", *out)
    fails(capsys, 2, "dpm++", tiny_teacher, "--solver", "heun", *out)
    fails(capsys, 2, "only 1000 times", tiny_teacher, "--solver", "ddim", "--nfe", 2000, *out)
    fails(capsys, 2, "use leading, trailing, linspace", tiny_teacher, "--solver", "deis", "--spacing", "quad", *out)
    fails(capsys, 2, "--order belongs", tiny_teacher, "--solver", "ddim", "--order", 2, *out)
    fails(capsys, 2, "--clip belongs", tiny_run, "--nfe", 3, "--clip", *out)
    fails(capsys, 2, "exists already", tiny_run, "--nfe", 3, "--out", taken)
    fails(capsys, 2, "unknown extension", tiny_run, "--nfe", 3, "--out", tmp_path / "a.gif")
    fails(capsys, 2, "cannot be written", tiny_run, "--nfe", 3, "--out", "/proc/a.npy")
    fails(capsys, 2, "both want stdout", tiny_run, "--nfe", 3, "--out", "-", "--json")
    assert not (tmp_path / "new.png").exists()


def test_unsupported_prediction_type(teacher_copy, tmp_path, capsys):
    teacher = teacher_copy(prediction_type="flow")
    fails(capsys, 2, "flow", teacher, "--solver", "ddim", "--out", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("damage", "says"), [("truncate", "damaged"), ("pickle", "pickle"), ("nan", "NaN"), ("missing", "does not exist")]
)
def test_broken_weights(damage, says, teacher_copy, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    teacher = teacher_copy()
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "nan":
        tensors = load_file(weights)
        tensors["conv_in.bias"] = torch.full_like(tensors["conv_in.bias"], float("nan"))
        weights.unlink()
        save_file(tensors, weights)
    else:
        weights.unlink()
        if damage == "pickle":
            (teacher / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    fails(capsys, 2, says, teacher, "--solver", "ddim", "--out", tmp_path / "a.png")


def test_broken_student(tiny_student, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(tiny_student, student)
    (student / "hsivi.json").write_text("{")
    fails(capsys, 2, "hsivi.json", student, "--out", tmp_path / "a.png")


def test_bf16_draws_nearly_the_same_images_and_says_so(tiny_student, tmp_path, capsys):
    drawn = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / f"{precision}.npy"
        argv = ["sample", str(tiny_student), "-n", "16", "--precision", precision, "--out", str(out), "--json"]
        assert main(argv) == 0
        assert json.loads(capsys.readouterr().out)["sampler"]["precision"] == precision
        drawn[precision] = np.load(out).astype(int)
    apart = np.abs(drawn["bf16"] - drawn["fp32"])
    assert apart.max() > 0  # otherwise the option does nothing
    assert apart.mean() < 2  # grey levels of 256; bf16 keeps 8 bits
    # the noise is the same: another seed is far away
    argv = ["sample", str(tiny_student), "-n", "16", "--seed", "1", "--out", str(tmp_path / "other.npy")]
    assert main(argv) == 0
    assert np.abs(np.load(tmp_path / "other.npy").astype(int) - drawn["fp32"]).mean() > 20
    capsys.readouterr()
    fails(capsys, 2, "--precision", tiny_student, "--precision", "fp8", "--out", tmp_path / "a.png")


def test_bf16_reaches_a_solver_too(tiny_teacher, tmp_path, capsys):
    argv = ["sample", str(tiny_teacher), "--solver", "ddim", "--nfe", "3", "-n", "2", "--precision", "bf16", "--json"]
    assert main([*argv, "--out", str(tmp_path / "a.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["sampler"]["precision"] == "bf16"


@pytest.mark.parametrize("out", ["a.npy", "a.npz", "a.png", "folder", "-"])
@pytest.mark.parametrize("n", [10**13, 2**63 - 1, 10**30])
def test_absurd_numbers_are_refused_before_anything_is_drawn(out, n, tiny_student, tmp_path, monkeypatch, capsys):
    from hsivi_cli.methods import sampling

    monkeypatch.setattr(sampling, "draw_images", lambda *a, **k: pytest.fail("drawn"))
    out = out if out == "-" else tmp_path / out
    fails(capsys, 2, f"-n {n} takes", tiny_student, "-n", n, "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_long_draws_say_how_long(tiny_student, tmp_path, monkeypatch, capsys):
    from hsivi_cli.cli import drawing

    argv = ["sample", str(tiny_student), "-n", "4", "--batch-size", "2"]
    assert main([*argv, "--out", str(tmp_path / "a.npy")]) == 0
    assert "in all" not in capsys.readouterr().err
    monkeypatch.setattr(drawing, "LONG", 0.0)
    assert main([*argv, "--out", str(tmp_path / "b.npy")]) == 0
    assert "about 0 minutes in all, going by the first 2 images" in capsys.readouterr().err
    # with one batch there is nothing left to announce
    assert main(["sample", str(tiny_student), "-n", "4", "--out", str(tmp_path / "c.npy")]) == 0
    assert "in all" not in capsys.readouterr().err

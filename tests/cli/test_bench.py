import json

import pytest
import torch

from hsivi_cli.cli.app import main
from hsivi_cli.engine.timing import Timing
from hsivi_cli.kernels import convert
from hsivi_cli.methods import benchmark_kernels, benchmark_same
from hsivi_cli.methods.benchmark import EAGER, OURS, PIPELINE, Machine, Row, relative_to_best, run_case, sample_case
from hsivi_cli.methods.benchmark_kernels import Captured, kernel_cases, rotations
from hsivi_cli.methods.student import Student, load_student
from hsivi_cli.targets.score_net import load_score_net


def test_sampling_beside_its_peers(tiny_student, tmp_path, capsys):
    plot = tmp_path / "times.png"
    argv = ["bench", str(tiny_student), "--batch", "2", "--repeats", "2", "--device", "cpu", "--plot", str(plot)]
    assert main([*argv, "--what", "sample,distill", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    sides = {row["side"] for row in payload["rows"] if row["case"] == "sample, NFE 3"}
    assert sides == {OURS, EAGER, PIPELINE}
    assert all(row["timing"]["median"] > 0 for row in payload["rows"])
    assert {row["case"] for row in payload["rows"]} == {"sample, NFE 3", "distillation step, NFE 3"}
    assert payload["rows"][0]["matmul_share"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_table_names_the_fastest(tiny_student, capsys):
    assert main(["bench", str(tiny_student), "--batch", "1", "--repeats", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("fastest") == 3
    assert out.count("x the fastest") == 2


def test_kernels_count_their_bytes():
    machine = Machine("cpu", 1e9, {"fp32": 1e9})
    cases = list(kernel_cases(torch.device("cpu"), 2, "fp32", False, (8, 4, 4)))
    image = 2 * 3 * 16 * 4
    norms, losses = [2 * 1024, 5 * 1024] * 2, [passes * image for passes in (3, 6, 3, 7, 6)]
    upsampling = [5 * 2 * 8 * 2 * 2 * 4]
    assert [case.bytes for case in cases] == norms + upsampling + losses
    for case in cases:
        row, *_ = run_case(case, machine, 1, torch.device("cpu"))
        assert row.bandwidth_share == pytest.approx(case.bytes / row.timing.median / 1e9)


def test_ratios_are_within_a_case():
    timing = [Timing(t, t, t, t, 1) for t in (2.0, 1.0, 5.0)]
    rows = [Row(case, "side", 1, "fp32", t, None, None) for case, t in zip("aab", timing, strict=True)]
    assert relative_to_best(rows) == [2.0, 1.0, 1.0]


def test_bad_usage(tiny_student, capsys):
    for argv, says in [
        (["--what", "speed"], "choose from"),
        (["--check"], "Triton's"),
        (["--batch", "x"], "--batch"),
        (["--batch", "1,0"], "positive"),
    ]:
        assert main(["bench", str(tiny_student), "--device", "cpu", *argv]) == 2
        assert says.replace("Triton's", "--kernels triton") in capsys.readouterr().err


def test_same_images_and_losses(tiny_student, capsys):
    argv = ["bench", str(tiny_student), "--what", "same", "--batch", "3", "--images", "7", "--steps", "2"]
    assert main([*argv, "--device", "cpu", "--json"]) == 0
    images, losses = json.loads(capsys.readouterr().out)["same"]
    assert (images["n"], images["with_kernels"], images["fid_with"]) == (7, "auto", None)
    assert images["max_difference"] <= 1
    assert losses["steps"] == 2
    assert set(losses["max_relative_difference"]) == {"critic_loss", "student_loss", "fisher", "critic_gap"}
    assert max(losses["max_relative_difference"].values()) < 0.05
    assert main([*argv, "--device", "cpu"]) == 0
    assert "max difference" in capsys.readouterr().out


def test_negative_control_other_images_and_losses_are_seen(tiny_student, monkeypatch):
    student = load_student(tiny_student)
    norm = convert.group_norm_silu
    monkeypatch.setattr(convert, "group_norm_silu", lambda *a, **k: 1.01 * norm(*a, **k))
    assert benchmark_same.same_images(student, 4, 4, "fp32", lambda lot: float(lot.mean())).max_difference > 1
    assert benchmark_same.same_losses(student, 2, 4, "fp32").max_relative_difference["critic_loss"] > 1e-4


@pytest.mark.parametrize("arguments", [{"num_class_embeds": 3}, {"out_channels": 2}])
def test_classes_and_learned_variances_without_the_peer_that_cannot_draw_them(make_teacher, arguments):
    teacher = load_score_net(make_teacher({}, **arguments))
    student = Student(teacher.unet, torch.tensor(-0.5), (0, 200, 800), 0.5, teacher.schedule, {})
    rows = run_case(sample_case(student, 2, "fp32"), Machine("cpu", 1e9, {"fp32": 1e9}), 1, torch.device("cpu"))
    assert {row.side for row in rows} == {OURS, EAGER}
    assert all(row.matmul_share > 0 for row in rows)


def test_on_a_gpu_kernels_are_timed_in_a_graph_of_one_call_an_input(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmark_kernels, "cuda_graph", lambda walk, device: walk)
    side = Captured(calls.append, 5, torch.device("cuda"))
    for i in range(2):
        side(i)
    assert calls == [0, 1, 2, 3, 4] * 2
    gpu = torch.device("cuda")
    assert rotations(gpu, 2**26) == 2
    assert rotations(gpu, 2**20) * 2**20 > 50 * 2**20  # the largest cache there is
    assert rotations(gpu, 1) == 512

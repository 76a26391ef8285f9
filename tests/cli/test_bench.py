import json

import pytest
import torch

from hsivi_cli.cli.app import main
from hsivi_cli.engine.timing import Timing
from hsivi_cli.methods.benchmark import EAGER, OURS, PIPELINE, Machine, Row, relative_to_best, run_case
from hsivi_cli.methods.benchmark_kernels import kernel_cases


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
    assert [case.bytes for case in cases] == [2 * 1024, 5 * 1024, 2 * 1024, 5 * 1024, 3 * 2 * 3 * 16 * 4]
    for case in cases:
        (row,) = run_case(case, machine, 1, torch.device("cpu"))
        assert row.bandwidth_share == pytest.approx(case.bytes / row.timing.median / 1e9)


def test_ratios_are_within_a_case():
    timing = [Timing(t, t, t, t, 1) for t in (2.0, 1.0, 5.0)]
    rows = [Row(case, "side", 1, "fp32", t, None, None) for case, t in zip("aab", timing, strict=True)]
    assert relative_to_best(rows) == [2.0, 1.0, 1.0]


def test_bad_usage(tiny_student, capsys):
    for argv, says in [(["--what", "speed"], "choose from"), (["--check"], "Triton's"), (["--batch", "x"], "--batch")]:
        assert main(["bench", str(tiny_student), "--device", "cpu", *argv]) == 2
        assert says.replace("Triton's", "--kernels triton") in capsys.readouterr().err

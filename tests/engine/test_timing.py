import time

import pytest
import torch

from hsivi_cli.engine.timing import copy_bandwidth, matmul_rate, summarise, time_sides

CPU = torch.device("cpu")


def test_sides_take_turns_and_see_every_input():
    calls = []
    sides = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    timings = time_sides(sides, 3, CPU, inner=2, warmup=1)
    assert calls[:2] == [("a", 0), ("b", 0)]
    order = [name for name, _ in calls[2:]]
    assert order == list("aabbbbaaaabb")
    assert [i for name, i in calls[2:] if name == "a"] == list(range(6))
    assert timings["a"].repeats == 3


def test_a_slower_side_is_slower():
    timings = time_sides({"slow": lambda _: time.sleep(0.02), "fast": lambda _: None}, 3, CPU)
    assert timings["slow"].median >= 0.02 > timings["fast"].median
    assert timings["slow"].cpu < 0.02  # sleeping is not computing


def test_median_and_quartiles():
    timing = summarise([1.0, 2.0, 3.0, 4.0, 100.0], [0.5] * 5)
    assert (timing.median, timing.cpu) == (3.0, 0.5)
    assert timing.low < timing.median < timing.high
    assert summarise([1.0], [1.0]).low == 1.0


def test_the_machine_has_a_bandwidth_and_a_rate():
    assert copy_bandwidth(CPU, 2**20) > 1e6
    assert matmul_rate(CPU, torch.float32, 32) == pytest.approx(matmul_rate(CPU, torch.float32, 32), rel=50)


def test_a_side_that_fails_is_left_out_and_told():
    def broken(i):
        raise RuntimeError("out of memory")

    told = []
    sides = {"broken": broken, "fine": lambda _: None}
    timings = time_sides(sides, 2, CPU, failed=lambda name, error: told.append((name, str(error))))
    assert list(timings) == ["fine"]
    assert told == [("broken", "out of memory")]
    with pytest.raises(RuntimeError, match="out of memory"):
        time_sides(sides, 2, CPU)
    assert time_sides({"broken": broken}, 2, CPU, failed=lambda name, error: None) == {}


def test_a_side_may_do_many_calls_in_one_or_work_elsewhere():
    class Captured:
        calls = 10

        def __call__(self, i):
            time.sleep(0.02)

        def cpu_seconds(self):
            return 5.0

    timing = time_sides({"captured": Captured()}, 3, CPU, inner=10)["captured"]
    assert 0.002 <= timing.median < 0.02
    assert timing.cpu == 0

import json

import numpy as np
import pytest
import torch

from hsivi_cli.engine.seeds import PhiloxStreams
from hsivi_cli.errors import InputError, RunError
from hsivi_cli.kernels.philox import make_streams, normals
from hsivi_cli.methods.sampling import Sampler, draw_images, open_sampler, solver_sampler, to_uint8
from hsivi_cli.targets.score_net import load_score_net


def fake_sampler(run):
    return Sampler("fake", 1, (1, 8, 8), run, {})


def drawn(sampler, n=8, seed=0, batch_size=8, **options):
    return np.concatenate(list(draw_images(sampler, n, seed, batch_size, **options)))


@pytest.mark.parametrize("solver", [None, "ddim", "ddpm", "unipc"])
def test_images_do_not_depend_on_the_batch_size(solver, tiny_student, tiny_teacher):
    sampler = open_sampler(tiny_teacher if solver else tiny_student, 3, solver)
    whole = drawn(sampler)
    assert whole.shape == (8, 8, 8, 1)
    assert whole.dtype == np.uint8
    for batch_size in (1, 3):
        # convolutions and matrix products round differently for another batch size (1e-6 of the range), so a value on
        # the edge between two grey levels may fall to the other side
        apart = np.abs(drawn(sampler, batch_size=batch_size).astype(int) - whole)
        assert apart.max() <= 1
        assert (apart > 0).mean() < 4e-3
    assert np.abs(drawn(sampler, n=3, first=5, batch_size=2).astype(int) - whole[5:]).max() <= 1


def test_noise_alone_is_exactly_independent_of_the_batch_size():
    sampler = fake_sampler(lambda noise: noise.draw((1, 8, 8)) * 0.3 + noise.draw((1, 8, 8)) * 0.1)
    for batch_size in (1, 3, 5):
        np.testing.assert_array_equal(drawn(sampler, batch_size=batch_size), drawn(sampler))


def test_images_are_drawn_by_philox():
    # the kernels' noise, on every device: known answers of its integers are in tests/kernels/test_philox.py
    sampler = fake_sampler(lambda noise: torch.stack([noise.draw((1, 8, 8)) for _ in range(2)]).mul(0.2).sum(0))
    streams = make_streams(2**40, range(5, 8))
    want = 0.2 * (normals(streams, 0, (1, 8, 8)) + normals(streams, 1, (1, 8, 8)))
    np.testing.assert_array_equal(drawn(sampler, n=3, seed=2**40, first=5), to_uint8(want))


def test_another_seed_gives_other_images(tiny_student):
    sampler = open_sampler(tiny_student)
    assert (drawn(sampler, seed=1) != drawn(sampler)).any()


def test_quantisation_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 3.0]).reshape(1, 1, 1, 6)
    assert to_uint8(values).flatten().tolist() == [0, 0, 0, 1, 255, 255]


def test_descriptions_are_plain_json_and_name_what_matters(tiny_student, tiny_teacher):
    student = json.loads(json.dumps(open_sampler(tiny_student).description))
    assert student["kind"] == "student"
    assert len(student["sha256"]) == len(student["teacher_sha256"]) == 64
    solver = json.loads(json.dumps(solver_sampler(load_score_net(tiny_teacher), "ddim", 10).description))
    assert (solver["solver"], solver["spacing"], solver["nfe"]) == ("ddim", "leading", 10)
    assert (solver["order"], solver["clip"]) == (None, False)
    assert solver["teacher_sha256"] == student["teacher_sha256"]


def test_names_say_how_a_solver_ran(tiny_teacher):
    score_net = load_score_net(tiny_teacher)
    assert solver_sampler(score_net, "ddim", 10).name == "ddim (leading), NFE 10"
    sampler = solver_sampler(score_net, "dpm++", 5, "quad", 3, clip=True)
    assert sampler.name == "dpm++ (quad, order 3, clipped), NFE 5"
    assert (sampler.description["order"], sampler.description["clip"]) == (3, True)
    assert sampler.description["times"] == [800, 512, 288, 128, 32]
    # the tiny teacher is untrained, so its predictions need the clipping
    plain = solver_sampler(score_net, "dpm++", 5, "quad", 3)
    assert (drawn(sampler, n=2) != drawn(plain, n=2)).any()


def test_reports_progress_a_batch():
    counts = []
    drawn(fake_sampler(lambda noise: noise.draw((1, 8, 8))), n=7, batch_size=3, on_batch=counts.append)
    assert counts == [3, 3, 1]


def test_failures_while_running_are_one_line():
    with pytest.raises(RunError, match=r"image 0 .*not finite"):
        drawn(fake_sampler(lambda noise: noise.draw((1, 8, 8)) * float("nan")))

    def full(noise: PhiloxStreams):
        raise torch.OutOfMemoryError("CUDA out of memory")

    # the command line has the words for this
    with pytest.raises(torch.OutOfMemoryError):
        drawn(fake_sampler(full))
    with pytest.raises(InputError, match="too large"):
        drawn(fake_sampler(lambda noise: noise.draw((1, 8, 8))), seed=2**64)


def test_open_sampler_names_the_way_out(tiny_run, tiny_teacher, tmp_path):
    with pytest.raises(InputError, match="--solver ddim"):
        open_sampler(tiny_teacher, 3)
    with pytest.raises(InputError, match="drop --solver"):
        open_sampler(tiny_run, 3, "ddim")
    with pytest.raises(InputError, match="NFE 3, 5: choose one"):
        open_sampler(tiny_run)
    with pytest.raises(InputError, match="NFE 3, 5 only"):
        open_sampler(tiny_run, 7)
    with pytest.raises(InputError, match="pass --solver too"):
        open_sampler(tiny_run, 3, spacing="leading")
    with pytest.raises(InputError, match="--order belongs"):
        open_sampler(tiny_run, 3, order=2)
    with pytest.raises(InputError, match="--clip belongs"):
        open_sampler(tiny_run, 3, clip=True)
    with pytest.raises(InputError, match="does not exist"):
        open_sampler(tmp_path / "nothing", 3)

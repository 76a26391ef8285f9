"""Schedules and grids against diffusers, the public recipe's numbers, and nonsense."""

import pytest
import torch

from hsivi_cli.bridges.schedule import make_grid, schedule_from_config
from hsivi_cli.errors import InputError


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_abar_is_that_of_diffusers(kind):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule=kind).alphas_cumprod.double()
    # diffusers accumulates in float32
    torch.testing.assert_close(schedule_from_config({"beta_schedule": kind}).abar, theirs, rtol=2e-4, atol=1e-7)


def test_config_round_trip_and_trained_betas():
    linear = schedule_from_config({})
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    listed = schedule_from_config({"trained_betas": betas})
    torch.testing.assert_close(schedule_from_config(listed.config).abar, linear.abar)


def test_quad_grid_of_the_published_recipe():
    assert make_grid("quad", 10, schedule_from_config({})) == (0, 8, 32, 72, 128, 200, 288, 392, 512, 648, 800)


def test_uniform_grid():
    assert make_grid("uniform", 4, schedule_from_config({})) == (0, 200, 400, 600, 800)
    assert len(make_grid("uniform", 15, schedule_from_config({}))) == 16


@pytest.mark.parametrize("times", [[0, 5, 5, 9], [0, 5, 3, 9], [-1, 5, 6, 9], [0, 5, 6, 1000], [0, 5, 9]])
def test_bad_grids_are_refused(times):
    with pytest.raises(InputError, match="--grid"):
        make_grid(times, 3, schedule_from_config({}))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"prediction_type": "flow"}, "flow"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "too large"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"rescale_betas_zero_snr": True}, "zero_snr"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
        ({"beta_start": 0.5, "beta_end": 1.5}, "betas"),
        ({"trained_betas": ["a"]}, "trained_betas"),
    ],
)
def test_unsupported_schedules_are_refused(config, what):
    with pytest.raises(InputError, match=what):
        schedule_from_config(config)

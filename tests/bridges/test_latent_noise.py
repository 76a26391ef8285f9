"""The tables of the latent's noising process: published values, and the identities that tie them together."""

import math

import pytest
import torch

from hsivi_cli.bridges.latent_noise import NOISES, make_noise
from hsivi_cli.errors import InputError

CASES = [(name, times) for name in NOISES for times in (1, 2, 10, 40)]


@pytest.mark.parametrize(
    ("times", "left"), [(5, 0.951), (10, 0.904), (20, 0.817), (40, 0.667), (50, 0.603), (100, 0.364)]
)
def test_the_public_codes_schedule_keeps_most_of_z(times, left):
    assert float(make_noise("unscaled", times).abar[-1]) == pytest.approx(left, abs=5.1e-4)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("times", [10, 20, 40])
def test_the_others_keep_next_to_nothing(name, times):
    assert float(make_noise(name, times).abar[-1]) < 2e-4


@pytest.mark.parametrize(("name", "times"), CASES)
def test_given_z_two_steps_of_noise_are_as_one(name, times):
    """r(y_{t-1} | y_t, z) is the Bayes rule of the forward steps, for every t."""
    noise = make_noise(name, times)
    z = 1.7
    for t in range(1, times + 1):
        before, after = noise.abar[t - 1], noise.abar[t]
        # the mean of y_t given z goes to the mean of y_{t-1}, and the variances add up
        mean = noise.w0[t] * z + noise.w1[t] * after.sqrt() * z
        assert float(mean - before.sqrt() * z) == pytest.approx(0, abs=2e-12)
        total = noise.w1[t] ** 2 * (1 - after) + noise.btilde[t]
        assert float(total - (1 - before)) == pytest.approx(0, abs=2e-12)
        # precision of y_{t-1}: from z, and from y_t
        if t > 1:
            precision = 1 / (1 - before) + noise.alpha[t] / noise.beta[t]
            assert float(noise.btilde[t] * precision) == pytest.approx(1, abs=1e-11)
    assert float(noise.btilde[1]) == 0
    assert float(noise.w0[1]) == pytest.approx(1, abs=1e-15)
    assert float(noise.w1[1]) == 0


@pytest.mark.parametrize("name", NOISES)
def test_a_ddim_step_with_the_true_noise_stays_on_its_line(name):
    noise = make_noise(name, 12)
    z, eps = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.1, 0.4], dtype=torch.float64)
    for t in range(1, 13):
        y = noise.diffuse(z, torch.tensor(t), eps)
        clean = (y - (1 - noise.abar[t]).sqrt() * eps) / noise.abar[t].sqrt()
        step = noise.abar[t - 1].sqrt() * clean + (1 - noise.abar[t - 1]).sqrt() * eps
        assert torch.allclose(step, noise.diffuse(z, torch.tensor(t - 1), eps), atol=1e-10)


def test_diffusing_takes_a_time_for_each_row():
    noise = make_noise("cosine", 7)
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (3, 5, 2)))
    times = torch.randint(0, 8, (3, 5), generator=generator)
    found = noise.diffuse(z, times, eps)
    for k in range(3):
        for i in range(5):
            assert torch.equal(found[k, i], noise.diffuse(z[i], times[k, i], eps[k, i]))
    assert torch.equal(noise.diffuse(z, torch.tensor(0), eps[0]), z)
    assert noise.to(torch.zeros(1)).abar.dtype == torch.float32
    assert noise.times == 7


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="cosine, linear, unscaled"):
        make_noise("quadratic", 20)
    for times in (0, 100_000):
        with pytest.raises(InputError, match="--diffusion-steps"):
            make_noise("cosine", times)
    assert math.isfinite(float(make_noise("linear", 1000).abar.sum()))

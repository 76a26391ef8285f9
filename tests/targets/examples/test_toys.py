"""The 2-D toys are normalised, and smooth wherever a chain may wander."""

import math

import pytest
import torch

from hsivi_cli.targets.examples import example_density
from hsivi_cli.targets.examples.toys import CORNERS, TOYS


@pytest.mark.parametrize("name", TOYS)
def test_integral_is_one(name):
    density = example_density(name)
    across = torch.linspace(-7.5, 7.5, 301, dtype=torch.float64)
    up = torch.linspace(-22, 8, 601, dtype=torch.float64) if name == "banana" else across
    grid = torch.cartesian_prod(across, up)
    cell = float((across[1] - across[0]) * (up[1] - up[0]))
    total = float(torch.logsumexp(density.log_prob(grid), 0)) + math.log(cell)
    assert abs(total - density.log_z) < 1e-4


@pytest.mark.parametrize("name", TOYS)
def test_far_away_the_gradient_points_home(name):
    density = example_density(name)
    far = torch.tensor([[60.0, -40.0], [-50.0, 70.0], [0.0, -90.0]], dtype=torch.float64)
    gradient = density.gradient(far)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(density.log_prob(far)).all()
    if name != "banana":
        assert ((gradient * far).sum(1) < 0).all()
    assert torch.isfinite(density.gradient(torch.zeros(1, 2, dtype=torch.float64))).all()


def test_checkerboard_has_eight_squares_that_touch_at_corners_only():
    assert len(CORNERS) == 8
    apart = (CORNERS[:, None] - CORNERS).abs().sum(-1)
    assert apart[apart > 0].min() == 4
    density = example_density("checkerboard")
    centres = density.log_prob(torch.stack([CORNERS[0] + 1, CORNERS[0] + torch.tensor([1.0, 3.0])]))
    assert abs(float(centres[0]) + math.log(32)) < 1e-6
    assert centres[1] < -15


def test_ring_draws_grow_outwards_with_the_circumference():
    """Radii have density r exp(-(r - R)^2 / 2 s^2): the innermost ring shows the factor r best, by s^2 / R."""
    drawn = example_density("rings").exact_draws(100_000, torch.Generator().manual_seed(1)).norm(dim=1)
    inner = drawn[drawn < 1.75]
    radius = torch.linspace(0, 1.75, 5001, dtype=torch.float64)
    across = torch.stack([radius, torch.zeros_like(radius)], 1)
    weight = radius * example_density("rings").log_prob(across).exp()
    expected = (weight * radius).sum() / weight.sum()
    assert (inner.mean() - expected).abs() < 5 * inner.std() / math.sqrt(len(inner))
    share = 2 * math.pi * weight.sum() * radius[1]
    assert abs(len(inner) / len(drawn) - float(share)) < 5 * math.sqrt(0.25 / len(drawn))

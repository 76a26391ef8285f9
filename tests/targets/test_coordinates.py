"""Maps to intervals: bounds, inverses, and derivatives against autograd."""

import math

import pytest
import torch

from hsivi_cli.targets.coordinates import Coordinates

INF = math.inf
MIXED = Coordinates([-INF, 0.0, 2.0, -1.0], [INF, INF, INF, 3.0], [1.0, 5.0, 0.1, 1.0], [1.0, 0.2, 1.0, 1.0])


def test_derivatives_inverse_and_bounds():
    z = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul_(3).requires_grad_(True)
    mapped = MIXED.map(z)
    (slope,) = torch.autograd.grad(mapped.x.sum(), z, create_graph=True)
    torch.testing.assert_close(mapped.slope, slope)
    torch.testing.assert_close(mapped.log_slope, slope.log())
    (bend,) = torch.autograd.grad(mapped.log_slope.sum(), z)
    torch.testing.assert_close(mapped.bend.detach(), bend)
    torch.testing.assert_close(MIXED.invert(mapped.x), z)
    assert bool((mapped.x[:, 1] > 0).all() and (mapped.x[:, 2] > 2).all())
    assert bool((mapped.x[:, 3].abs() <= 3).all())


def test_extreme_free_coordinates_do_not_poison_gradients():
    z = torch.tensor([[1e4, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(MIXED.map(z).x.sum(), z)
    assert bool(gradient.isfinite().all())


def test_all_free_is_the_identity_and_an_upper_bound_alone_is_refused():
    z = torch.randn(3, 2, dtype=torch.float64)
    free = Coordinates([-INF] * 2, [INF] * 2)
    assert torch.equal(free.map(z).x, z)
    with pytest.raises(ValueError, match="bounded above"):
        Coordinates([-INF], [0.0])

"""Jensen-Shannon divergence on a grid: identities, a closed form, and the floor of a finite sample."""

import math

import torch

from hsivi_cli.evaluation.divergence import Window, cell_masses, draws_floor, histogram, jensen_shannon, window_around

F64 = torch.float64
WINDOW = Window((-4.0, -3.0), (4.0, 3.0), 40)


def log_normal(z):
    return -0.5 * z.square().sum(1) - math.log(2 * math.pi) + 0.7


def test_masses_are_those_of_the_density():
    masses = cell_masses(log_normal, 0.7, WINDOW)
    inside = math.erf(4 / math.sqrt(2)) * math.erf(3 / math.sqrt(2))
    assert abs(float(masses[:-1].sum()) - inside) < 1e-5
    assert abs(float(masses.sum()) - 1) < 1e-12
    # the cell [0, 0.2) x [0, 0.15)
    cell = 0.25 * math.erf(0.2 / math.sqrt(2)) * math.erf(0.15 / math.sqrt(2))
    assert abs(float(masses[20 * 40 + 20]) - cell) < 1e-6


def test_histogram_counts_every_draw_once():
    draws = torch.tensor([[0.1, 0.1], [0.1, 0.1], [9.0, 0.0], [float("nan"), 0.0]], dtype=F64)
    shares = histogram(draws, WINDOW)
    assert float(shares[20 * 40 + 20]) == 0.5
    assert float(shares[-1]) == 0.5
    assert float(shares.sum()) == 1


def test_divergence_is_zero_symmetric_and_at_most_log_two():
    p, q = torch.tensor([0.5, 0.5, 0.0], dtype=F64), torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    assert jensen_shannon(p, p) == 0
    assert abs(jensen_shannon(p, q) - jensen_shannon(q, p)) < 1e-15
    assert abs(jensen_shannon(p, torch.tensor([0.0, 0.0, 2.0], dtype=F64)) - math.log(2)) < 1e-12
    a, b = torch.tensor([0.75, 0.25], dtype=F64), torch.tensor([0.25, 0.75], dtype=F64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert abs(jensen_shannon(a, b) - expected) < 1e-15


def test_masses_that_vanish_in_floating_point_count_nothing():
    p, q = torch.tensor([1.0, 5e-324], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    assert abs(jensen_shannon(p, q)) < 1e-300


def test_exact_draws_score_the_floor_and_shifted_ones_far_more():
    n = 100_000
    draws = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    window = window_around(draws)
    masses = cell_masses(log_normal, 0.7, window)
    exact, floor = jensen_shannon(histogram(draws, window), masses), draws_floor(masses, n)
    assert 0.6 * floor < exact < 1.4 * floor
    assert jensen_shannon(histogram(draws + 0.3, window), masses) > 5 * exact


def test_window_holds_the_draws_with_room():
    draws = torch.tensor([[0.0, -1.0], [10.0, 1.0]], dtype=F64)
    window = window_around(draws, cells=5, margin=0.1)
    assert window == Window((-1.0, -1.2), (11.0, 1.2), 5)

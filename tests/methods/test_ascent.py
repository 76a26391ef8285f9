"""Many climbs in step: each ends where it would end alone, in far fewer evaluations, and none is left hanging."""

import threading

import pytest
import torch

from hsivi_cli.methods.ascent import ascend
from hsivi_cli.targets.density import Density

CENTRES = torch.tensor([[0.0, 0.0], [6.0, -2.0]], dtype=torch.float64)


def bumps(calls=None, fail_after=None):
    def log_prob(z):
        if calls is not None:
            calls.append(len(z))
            if fail_after is not None and len(calls) > fail_after:
                raise KeyboardInterrupt
        distance = (z[:, None] - CENTRES).square().sum(-1)
        return torch.logsumexp(-0.5 * distance * torch.tensor([1.0, 9.0], dtype=torch.float64), 1)

    return Density("bumps", 2, log_prob)


def starts():
    return torch.cat([CENTRES + shift for shift in (0.5, -0.4, 0.9)])


def test_each_climb_ends_on_the_bump_below_which_it_began():
    found = ascend(bumps(), starts())
    torch.testing.assert_close(found, CENTRES.repeat(3, 1), atol=1e-4, rtol=0)


def test_climbs_in_step_are_those_made_alone_in_as_many_batches_as_the_longest():
    calls = []
    together = ascend(bumps(calls), starts())
    lengths = []
    for start, end in zip(starts(), together, strict=True):
        own = []
        torch.testing.assert_close(ascend(bumps(own), start[None])[0], end, rtol=1e-9, atol=1e-9)
        lengths.append(len(own))
    assert len(calls) == max(lengths)
    assert sum(calls) == sum(lengths)


def test_ctrl_c_in_the_density_stops_every_climb():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        ascend(bumps([], fail_after=3), starts())
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(5)
    assert threading.active_count() == before


def test_points_of_no_density_are_left_where_they_are():
    empty = Density("empty", 1, lambda z: torch.where(z[:, 0] < 0, -0.5 * z[:, 0] ** 2, torch.nan))
    found = ascend(empty, torch.tensor([[3.0], [-2.0]], dtype=torch.float64))
    assert float(found[0]) == 3.0
    assert abs(float(found[1])) < 2.0

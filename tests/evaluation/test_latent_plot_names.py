"""Names on the map: none covers another, none strays without need, and long ones stay in the legend."""

import numpy as np
from matplotlib.figure import Figure

from hsivi_cli.evaluation.latent_plot_names import move_apart, name_on_map


def overlaps(centres, sizes):
    reach = 0.5 * (sizes[:, None] + sizes[None])
    both = (np.abs(centres[:, None] - centres[None]) < 0.97 * reach).all(2)
    return int(np.triu(both, 1).sum())


def test_names_are_moved_apart_and_no_further():
    sizes = np.tile([16.0, 9.0], (26, 1))
    centres = np.random.default_rng(0).normal(0, 40, (26, 2))
    centres[1] = centres[0]
    found = move_apart(centres, sizes)
    assert overlaps(centres, sizes) > 5
    assert overlaps(found, sizes) == 0
    assert np.median(np.abs(found - centres)) < 5
    lonely = np.array([[0.0, 0.0], [100.0, 0.0]])
    np.testing.assert_allclose(move_apart(lonely, sizes[:2]), lonely, atol=0.01)


def names_drawn(names):
    panel = Figure().subplots()
    panel.set(xlim=(0, 1), ylim=(0, 1))
    name_on_map(panel, [np.full((3, 2), 0.5)] * len(names), names, ["yellow"] * len(names))
    return panel.texts


def test_short_names_are_written_dark_enough_and_long_ones_are_not():
    texts = names_drawn(["CEU", "GBR"])
    assert [text.get_text() for text in texts] == ["CEU", "GBR"]
    assert max(np.dot(text.get_color(), (0.3, 0.59, 0.11)) for text in texts) < 0.34
    assert not names_drawn(["CEU"])
    assert not names_drawn(["CEU", "a long name"])
    assert not names_drawn([str(i) for i in range(41)])

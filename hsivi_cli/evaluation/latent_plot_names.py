"""Names of categories on the map itself, next to where their rows are, moved apart where they would overlap."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES, LONGEST_NAME = 40, 8
"""More, or longer ones, only cover the map: they are in the legend."""
FONT, CHARACTER, LINE = 7.5, 5.2, 9.0  # points: size, width of a bold character, height of a line
DARK, BRIGHTNESS = 0.33, (0.3, 0.59, 0.11)
ROUNDS, BACK = 400, 0.02
LEADER = 9.0  # points that a name is moved before a line leads back to its rows


def name_on_map(
    panel: "Axes", places: Sequence[Float[np.ndarray, "n 2"]], names: Sequence[str], colours: Sequence[Any]
) -> None:
    """Write each name at the median of its rows, in its colour or a darker one.

    The panel's limits must be final, and its sides equal.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    if not 2 <= len(names) <= MOST_NAMES or max(map(len, names)) > LONGEST_NAME:
        return
    box = panel.get_position()
    width, height = np.array(panel.figure.bbox.size) / panel.figure.dpi * 72 * (box.width, box.height)
    side = min(width, height)
    low = np.array([panel.get_xlim()[0], panel.get_ylim()[0]])
    span = np.array([np.ptp(panel.get_xlim()), np.ptp(panel.get_ylim())])
    anchors = (np.stack([np.median(place, 0) for place in places]) - low) / span * side
    sizes = np.array([[CHARACTER * len(name), LINE] for name in names])
    moved = move_apart(anchors, sizes)
    halo = [withStroke(linewidth=2.2, foreground="white", alpha=0.9)]
    for name, shade, start, end in zip(names, map(to_rgb, colours), anchors, moved, strict=True):
        colour = tuple(part * min(1.0, DARK / float(np.dot(shade, BRIGHTNESS))) for part in shade)
        (x, y), (at_x, at_y) = end / side * span + low, start / side * span + low
        if np.hypot(*(end - start)) > LEADER:
            panel.plot([x, at_x], [y, at_y], color=colour, linewidth=0.6, zorder=4, path_effects=halo)
        panel.text(
            x, y, name, color=colour, fontsize=FONT, fontweight="bold", ha="center", va="center", zorder=5,
            path_effects=halo, parse_math=False,
        )  # fmt: skip


def move_apart(centres: Float[np.ndarray, "n 2"], sizes: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Centres of boxes of those sizes after they have pushed each other aside, each drawn back to where it began."""
    found = centres + 1e-3 * np.arange(len(centres))[:, None]  # two at one place must know which way to go
    reach = 0.5 * (sizes[:, None] + sizes[None])
    for round_ in range(ROUNDS):
        apart = found[:, None] - found[None]
        overlap = np.clip(reach - np.abs(apart), 0, None)
        overlap[np.arange(len(found)), np.arange(len(found))] = 0
        touching = overlap.min(2) > 0
        # the shorter way out; a box has many neighbours, so that a whole step would overshoot
        way = np.where(overlap == overlap.min(2, keepdims=True), np.sign(apart) * overlap, 0.0) * touching[:, :, None]
        pull = BACK * (centres - found) if round_ < ROUNDS - 50 else 0.0
        found = found + 0.25 * way.sum(1) + pull
    return found

"""The map: latents of rows as a scatter, coloured by any column, legible for a dozen rows or a hundred thousand.

Two dimensions are drawn as they are, more by the principal components of their means (the picture says so), one as a
strip for each category. Formats and style are those of `posterior_plot`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.latent_plot_names import name_on_map
from hsivi_cli.evaluation.posterior_plot import BLUE, INK, MUTED, new_figure, save_figure, shortened, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "#c4c8cf"
MOST_CATEGORIES = 40  # smaller ones go together
FEW_NUMBERS = 12  # whole numbers with as many different values are categories
ELLIPSES = 400  # more only blacken it
LEGEND_ROWS = 34
LONGEST = 2.5  # ranges further apart have units of their own
_HUES = (0.60, 0.06, 0.36, 0.94, 0.76, 0.13, 0.50, 0.85, 0.25, 0.68)
"""Of groups, neighbours far apart."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True)
class Category:
    """Rows of one label: `at` are their indices, `group` the heading in the legend."""

    label: str
    group: str
    at: np.ndarray
    colour: tuple[float, float, float] | str
    marker: str


def plot_map(
    path: Path,
    mean: Float[np.ndarray, "n d"],
    colour: Sequence[Any] | np.ndarray | None = None,
    name: str = "",
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    sd: Float[np.ndarray, "n d"] | None = None,
    circles: Float[np.ndarray, "K 3"] | None = None,
    title: str = "",
) -> None:
    """Draw latents, coloured by the n values of the column `name`; NaN, None and "" are grey.

    Text, booleans and few whole numbers are categories, other numbers a colour bar. `groups`, another column, orders
    the legend and gives the categories of a group shades of one hue. `sd` draws ellipses of one standard deviation,
    for at most 400 rows spread evenly; `circles` are centres and radii in two latents. Short names of categories stand
    on the map too. Raises InputError where lengths differ; rows that are not finite are left out, and the picture says
    how many.
    """
    mean = np.asarray(mean, np.float64)
    if mean.ndim != 2 or 0 in mean.shape:
        raise InputError(f"the latents have shape {mean.shape}: there is nothing to draw")
    for what, values in (("colours", colour), ("groups", groups), ("standard deviations", sd)):
        if values is not None and len(values) != len(mean):
            raise InputError(f"{len(mean)} rows of latents and {len(values)} {what}: one a row is needed")
    finite = np.isfinite(mean).all(1)
    if not finite.any():
        raise InputError("no row of the latents is finite: the training has diverged")
    notes = [] if finite.all() else [f"{(~finite).sum()} rows that are not finite left out"]
    mean = mean[finite]
    spread = None if sd is None else np.asarray(sd, np.float64)[finite]
    column = None if colour is None else np.asarray(colour, object)[finite]
    grouped = None if groups is None else np.asarray(groups, object)[finite]
    place, covariance, labels, note = _project(mean, spread)
    notes += [note] if note else []
    numbers = None if column is None else _numbers(column)
    kinds = [] if column is None or numbers is not None else categories(column, grouped)
    rings = circles if circles is not None and mean.shape[1] == 2 else np.zeros((0, 3))
    _draw(path, place, covariance, labels, kinds, numbers, name, title, rings, notes)


def categories(column: np.ndarray, groups: np.ndarray | None = None) -> list[Category]:
    """The different values of a column, by group and then by name, missing ones last, with colours and markers."""
    names = np.array(["" if _missing(value) else _label(value) for value in column], object)
    of = (
        np.array(["" if _missing(value) else _label(value) for value in groups], object) if groups is not None else None
    )
    found = [label for label in dict.fromkeys(names) if label]
    sizes = {label: int((names == label).sum()) for label in found}
    kept = sorted(found, key=lambda label: -sizes[label])[:MOST_CATEGORIES]
    home = {label: _commonest(of[names == label]) if of is not None else "" for label in kept}
    order = sorted(kept, key=lambda label: (home[label], *_by_number(label)))
    colours = _colours([home[label] for label in order])
    listed = [
        Category(label, home[label], np.flatnonzero(names == label), colour, marker)
        for label, (colour, marker) in zip(order, colours, strict=True)
    ]
    others = [label for label in found if label not in home]
    if others:
        at = np.flatnonzero(np.isin(names, others))
        listed.append(Category(f"{len(others)} others", "", at, MUTED, "."))
    if (names == "").any():
        listed.append(Category("missing", "", np.flatnonzero(names == ""), MISSING, "."))
    return listed


def _colours(home: list[str]) -> list[tuple[Any, str]]:
    """A hue a group, its members from dark to light; without groups the hues turn. Markers tell near shades apart."""
    import colorsys

    heads = list(dict.fromkeys(home))
    if len(heads) == 1:
        count = len(home)
        if count <= len(_HUES):
            return [(colorsys.hls_to_rgb(_HUES[i], 0.45, 0.72), "o") for i in range(count)]
        return [(colorsys.hls_to_rgb(i / count, (0.36, 0.56)[i % 2], 0.75), _MARKERS[i % 3]) for i in range(count)]
    shades = []
    for index, head in enumerate(home):
        members = [i for i, other in enumerate(home) if other == head]
        rank, count = members.index(index), len(members)
        hue = _HUES[heads.index(head) % len(_HUES)]
        share = rank / max(count - 1, 1)
        light = 0.45 if count == 1 else 0.28 + 0.40 * share
        # along with the lightness the hue turns a little, so that neighbours stay apart
        turned = (hue + 0.05 * (share - 0.5)) % 1
        shades.append((colorsys.hls_to_rgb(turned, light, 0.78), _MARKERS[rank % len(_MARKERS)]))
    return shades


def _project(
    mean: np.ndarray, sd: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, str], str | None]:
    """Places (n, 1 or 2), covariances (n, 2, 2), names of the axes, and what to say."""
    d = mean.shape[1]
    if d == 1:
        return mean, None, ("z1", ""), None
    if d == 2:
        covariance = None if sd is None else sd[:, :, None] ** 2 * np.eye(2)
        return mean, covariance, ("z1", "z2"), None
    centred = mean - mean.mean(0)
    _, size, basis = np.linalg.svd(centred, full_matrices=False)
    axes = np.zeros((2, d))
    axes[: min(2, len(basis))] = basis[:2]
    axes *= np.where(axes[np.arange(2), np.abs(axes).argmax(1)] < 0, -1.0, 1.0)[:, None]
    share = (size[:2] ** 2).sum() / max((size**2).sum(), 1e-300)
    covariance = None if sd is None else np.einsum("aj,nj,bj->nab", axes, sd**2, axes)
    note = f"principal components of the {d} latent dimensions, {share:.0%} of the variance of the means"
    return centred @ axes.T, covariance, ("component 1", "component 2"), note


def _draw(
    path: Path, place: np.ndarray, covariance: np.ndarray | None, labels: tuple[str, str],
    kinds: list[Category], numbers: np.ndarray | None, name: str, title: str, rings: np.ndarray, notes: list[str],
) -> None:  # fmt: skip
    from matplotlib.patches import Circle

    strip = place.shape[1] == 1
    columns = _legend_columns(kinds)
    lines, across = [line for column in columns for line in column], len(columns)
    widest = max((len(text) for text, _ in lines), default=0)
    beside = across * (0.4 + 0.065 * widest) if lines and not strip else 1.0 if numbers is not None else 0.1
    strips = len(kinds) or 1
    height = max(1.9, 0.7 + 0.3 * strips) if strip else 5.8
    figure = new_figure((6.35 if beside > 0.1 or strip else 5.9) + beside, height + (0.3 if notes else 0))
    panel = figure.subplots()
    tidy(panel)
    aside = np.zeros(len(place))
    if strip:
        aside = _strips(panel, place[:, 0], kinds)
    points = np.column_stack([place, aside]) if strip else place
    size = float(np.clip(20_000 / len(place), 2.5, 34))
    alpha = float(np.clip(1.6 - 0.22 * math.log10(len(place)) * 1.2, 0.35, 0.9))
    style: dict[str, Any] = {"s": size, "linewidth": 0, "alpha": alpha, "rasterized": len(place) > 3000}
    if not strip and covariance is not None:
        _ellipses(panel, points, covariance, kinds, numbers is not None)
    if numbers is not None:
        _draw_numbers(figure, panel, points, numbers, name, style)
    elif kinds:
        # missing and other rows lie below; elsewhere no category hides another by its place in the legend
        for kind in kinds:
            if kind.colour in (MISSING, MUTED):
                at = points[kind.at]
                panel.scatter(at[:, 0], at[:, 1], color=kind.colour, marker="o", **style | {"s": size * 0.7})
        _scatter_mixed(panel, points, [kind for kind in kinds if kind.colour not in (MISSING, MUTED)], style)
    else:
        panel.scatter(points[:, 0], points[:, 1], color=BLUE, **style)
    _limits(panel, points, strip)
    for x, y, radius in rings:
        panel.add_patch(Circle((x, y), radius, fill=False, edgecolor=INK, linewidth=0.7, alpha=0.45))
    named = [kind for kind in kinds if kind.colour not in (MISSING, MUTED)]
    if named and not strip:
        name_on_map(panel, [points[k.at] for k in named], [k.label for k in named], [k.colour for k in named])
    panel.set_xlabel(labels[0], fontsize=8.5, color=MUTED)
    panel.set_ylabel(labels[1], fontsize=8.5, color=MUTED)
    if lines and not strip:
        _legend(figure, lines, name, across)
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=7.5, color=MUTED, x=0.01, ha="left")
    save_figure(figure, path, title)


def _scatter_mixed(panel: "Axes", points: np.ndarray, kinds: list[Category], style: dict[str, Any]) -> None:
    """Categories in a few interleaved passes: the last of them must not cover the others."""
    passes = 8
    for part in range(passes):
        for kind in kinds:
            at = points[kind.at[part::passes]]
            if len(at):
                # squares and triangles look larger than discs of the same area
                panel.scatter(at[:, 0], at[:, 1], color=[kind.colour], marker=kind.marker, **style)


def _draw_numbers(
    figure: Any, panel: "Axes", points: np.ndarray, numbers: np.ndarray, name: str, style: dict[str, Any]
) -> None:
    known = np.isfinite(numbers)
    panel.scatter(points[~known, 0], points[~known, 1], color=MISSING, **style)
    if not known.any():
        return
    low, high = np.quantile(numbers[known], [0.01, 0.99])  # an outlier must not take all the colours
    if low == high:
        low, high = float(numbers[known].min()), float(numbers[known].max())
    shown = panel.scatter(
        points[known, 0], points[known, 1], c=numbers[known], cmap="viridis", vmin=low, vmax=high, **style
    )
    shown_bar = shown if style["alpha"] == 1 else _opaque(low, high)
    beyond = (numbers[known].min() < low, numbers[known].max() > high)
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    bar = figure.colorbar(shown_bar, ax=panel, shrink=0.75, aspect=28, pad=0.02, extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, colors=MUTED, width=0.6, length=2.5)
    told = f"{shortened(name)} (grey: missing)" if (~known).any() else shortened(name)
    bar.set_label(told, fontsize=8.5, color=INK, parse_math=False)


def _opaque(low: float, high: float) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(low, high), "viridis")


def _ellipses(panel: "Axes", points: np.ndarray, covariance: np.ndarray, kinds: list[Category], numbered: bool) -> None:
    """One standard deviation around rows spread evenly over all."""
    from matplotlib.collections import EllipseCollection
    from matplotlib.colors import to_rgba

    at = np.unique(np.linspace(0, len(points) - 1, min(len(points), ELLIPSES)).astype(int))
    at = at[np.isfinite(covariance[at]).all((1, 2))]
    if not len(at):
        return
    colours = np.tile(to_rgba(BLUE), (len(points), 1))
    for kind in kinds:
        colours[kind.at] = to_rgba(kind.colour)
    if numbered:
        colours[:] = to_rgba(MUTED)
    variances, axes = np.linalg.eigh(covariance[at])
    width = 2 * np.sqrt(np.maximum(variances, 0))
    angle = np.degrees(np.arctan2(axes[:, 1, 1], axes[:, 0, 1]))
    patches = EllipseCollection(
        width[:, 1], width[:, 0], angle, units="xy", offsets=points[at],
        offset_transform=panel.transData, facecolors="none", edgecolors=colours[at], linewidths=0.5, alpha=0.35,
    )  # fmt: skip
    panel.add_collection(patches)


def _strips(panel: "Axes", z: np.ndarray, kinds: list[Category]) -> np.ndarray:
    """Heights of the points of 1-D latents: a strip a category, the points spread in it, its name on the axis."""
    jitter = np.random.default_rng(0).uniform(-0.32, 0.32, len(z))
    if not kinds:
        panel.set_yticks([])
        return jitter
    rows = np.zeros(len(z))
    for index, kind in enumerate(kinds):
        rows[kind.at] = -index
    panel.set_yticks(-np.arange(len(kinds)), [shortened(kind.label, 22) for kind in kinds])
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.spines["left"].set_visible(False)
    return rows + jitter


def _limits(panel: "Axes", points: np.ndarray, strip: bool) -> None:
    low, high = points.min(0), points.max(0)
    span = high - low
    if not strip and span.max() < LONGEST * span.min():  # one unit is the same both ways, or a ring were no ring
        low, high = (low + high - span.max()) / 2, (low + high + span.max()) / 2
    margin = 0.04 * np.maximum(high - low, 1e-9)
    panel.set_xlim(low[0] - margin[0], high[0] + margin[0])
    if strip:
        panel.set_ylim(low[1] - 0.2, high[1] + 0.2)
        return
    panel.set_ylim(low[1] - margin[1], high[1] + margin[1])
    panel.set_box_aspect(1)
    panel.locator_params(nbins=6)


def _legend_columns(kinds: list[Category]) -> list[list[tuple[str, Category | None]]]:
    """A line a category with its number of rows, under the headings of groups, which are lines without one.

    A group starts a new column rather than be torn apart; columns are made equally long, as matplotlib wants them.
    """
    blocks: list[list[tuple[str, Category | None]]] = []
    last = None
    for kind in kinds:
        if kind.group != last or not kind.group:
            blocks.append([(shortened(kind.group, 22), None)] if kind.group else [])
        last = kind.group
        blocks[-1].append((f"{shortened(kind.label, 22)}  {len(kind.at)}", kind))
    columns: list[list[tuple[str, Category | None]]] = []
    total = sum(len(block) for block in blocks)
    target = math.ceil(total / max(1, math.ceil(total / LEGEND_ROWS)))
    for block in blocks:
        if not columns or len(columns[-1]) + (len(block) + 1) // 2 > target:
            columns.append([])
        columns[-1] += block
    longest = max((len(column) for column in columns), default=0)
    return [column + [("", None)] * (longest - len(column)) for column in columns]


def _legend(figure: Any, lines: list[tuple[str, Category | None]], name: str, across: int) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for text, kind in lines:
        shape = "" if kind is None else "o" if kind.marker == "." else kind.marker
        colour: Any = "none" if kind is None else kind.colour
        mark = Line2D([], [], linestyle="", marker=shape, color=colour, markersize=5.5, markeredgewidth=0, label=text)
        handles.append(mark)
    legend = figure.legend(
        handles=handles, loc="outside right center", ncols=across, frameon=False, fontsize=8, labelcolor=INK,
        handletextpad=0.3, labelspacing=0.32, columnspacing=1.0, title=shortened(name),
        title_fontproperties={"size": 9, "weight": "bold"}, alignment="left",
    )  # fmt: skip
    for text, (_, kind) in zip(legend.get_texts(), lines, strict=True):
        text.set_parse_math(False)
        if kind is None:
            text.set(fontweight="bold", color=MUTED)


def _numbers(column: np.ndarray) -> np.ndarray | None:
    """The column as numbers, NaN for missing; None where it is one of categories."""
    if any(isinstance(value, str | bool | np.bool_) for value in column if not _missing(value)):
        return None
    try:
        numbers = np.array([np.nan if _missing(value) else float(value) for value in column])
    except (TypeError, ValueError):
        return None
    known = numbers[np.isfinite(numbers)]
    whole = bool(len(known)) and bool((known == np.round(known)).all())
    return None if whole and len(np.unique(known)) <= FEW_NUMBERS else numbers


def _missing(value: Any) -> bool:
    return value is None or value == "" or value != value or str(value) in ("<NA>", "NaT")


def _label(value: Any) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _commonest(values: np.ndarray) -> str:
    labels, counts = np.unique(values.astype(str), return_counts=True)
    return str(labels[counts.argmax()])


def _by_number(label: str) -> tuple[int, float, str]:
    """Numbers by size, before text by letter."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)

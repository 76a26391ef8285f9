"""Pictures of a fit (ELBO trace, marginals, pairs) and of its calibration, legible for one parameter or a thousand."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.calibration import FALSE_ALARM, SbcResult
from hsivi_cli.evaluation.uniformity import simultaneous_band
from hsivi_cli.io.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXTENSIONS = (".png", ".pdf", ".svg")
MARGINALS, PAIRS = 12, 5
WEAK = 0.15  # correlations below that are not worth one of few panels
POINTS = 1500  # draws in a scatter: more only blacken it
INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
BLUE, PALE, ORANGE, RED = "#1d4ed8", "#bfdbfe", "#c2410c", "#b91c1c"
_NAME = 26  # letters of a name that fit a panel


@dataclass(frozen=True)
class Trace:
    """The training objective: `elbo[i]` at step `steps[i]`, in nats."""

    steps: Sequence[float]
    elbo: Sequence[float]


def check_plot_path(path: Path, force: bool = False) -> None:
    """Raises InputError if `path` has no known extension, exists (unless `force`) or its folder does not."""
    if path.suffix.lower() not in EXTENSIONS:
        raise InputError(f"--plot {path}: unknown extension {path.suffix or '(none)'}: use {', '.join(EXTENSIONS)}")
    if path.exists() and not force:
        raise InputError(f"--plot {path} exists already: choose another path, or replace it with --force")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: the folder {path.absolute().parent} does not exist: make it first")


def plot_fit(
    path: Path,
    columns: Sequence[str],
    values: Float64[np.ndarray, "n p"],
    trace: Trace | None = None,
    reference: Float64[np.ndarray, "m p"] | None = None,
    title: str = "",
) -> None:
    """Draw the ELBO's trace, the marginals (at most 12) and the pairs of the most correlated parameters (at most 5).

    Marginals show the 90 % interval shaded and the median as a line; `reference` draws, with the same columns, are
    outlined. What is left out is said. Nothing but finite values is drawn. The format is the extension's: PNG, PDF or
    SVG; the file is written in one step.
    """
    values = np.asarray(values, np.float64)
    truth = None if reference is None else np.asarray(reference, np.float64)
    paired = most_correlated(values, PAIRS)
    shown = _shown(len(columns), paired)
    across = 1 if len(shown) == 1 else 2 if len(shown) <= 4 else 3 if len(shown) <= 9 else 4
    down = math.ceil(len(shown) / across)
    left = max(1.95 * across, 4.4)
    right = max(1.6 * (len(paired) - 1), 3.2) if len(paired) > 1 else 0.0
    height = max(1.55 * down + (2.1 if trace is not None else 0), right - 0.6 if right else 0, 3.4) + 0.9
    figure = new_figure(left + right + 0.9, height)
    widths = [left, right] if right else [left]
    body, *pairs = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    if trace is not None:
        (top,), (body,) = body.subfigures(2, 1, squeeze=False, height_ratios=[2.1, max(1.55 * down, height - 3.0)])
        _draw_trace(top.subplots(), trace)
    panels = body.subplots(down, across, squeeze=False).ravel()
    for panel, j in zip(panels, shown, strict=False):
        draw_marginal(panel, columns[j], values[:, j], None if truth is None else truth[:, j])
    for panel in panels[len(shown) :]:
        panel.axis("off")
    if pairs:
        _draw_pairs(pairs[0], [columns[j] for j in paired], values[:, paired])
        all_of_them = len(columns) == len(paired)
        chosen = f"Most correlated ({len(paired)} of {len(columns)} parameters)"
        heading(pairs[0], "Pairs" if all_of_them else chosen)
    left_out = "" if len(columns) == len(shown) else f" ({len(shown)} of {len(columns)} parameters)"
    outlined = ", reference outlined" if truth is not None else ""
    heading(body, f"Marginals with 90 % interval{outlined}{left_out}")
    save_figure(figure, path, title)


def plot_sbc(path: Path, result: SbcResult) -> None:
    """Draw each column's rank distribution minus the diagonal in its 95 % band (worst first, at most 11), and coverage.

    A line that leaves the band upwards on the left has ranks too low: draws biased high; one that leaves it on both
    sides, up and then down, is overconfident.
    """
    worst = np.argsort([test.p for test in result.tests], kind="stable")[: MARGINALS - 1]
    across = min(4, len(worst) + 1)
    down = math.ceil((len(worst) + 1) / across)
    figure = new_figure(2.7 * across + 0.6, 2.1 * down + 0.9)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    band = simultaneous_band(result.replications, result.draws)
    for panel, j in zip(panels, worst, strict=False):
        draw_ranks(panel, result, int(j), band)
    _draw_coverage(panels[len(worst)], result)
    for panel in panels[len(worst) + 1 :]:
        panel.axis("off")
    left_out = "" if len(worst) == len(result.columns) else f" (worst {len(worst)} of {len(result.columns)})"
    figure.supxlabel("rank of the truth among the draws, as a share", fontsize=9, color=MUTED)
    figure.supylabel(f"share of ranks below, minus expected{left_out}", fontsize=9, color=MUTED)
    save_figure(figure, path, result.verdict)


def most_correlated(values: Float64[np.ndarray, "n p"], count: int) -> list[int]:
    """Up to `count` columns: the most correlated pair, then whichever is most correlated with one of those before."""
    x = values[np.isfinite(values).all(1)][:2000]
    moving = np.flatnonzero(x.std(0) > 0) if len(x) > 2 else np.arange(0)
    if len(moving) < 2:
        return []
    r = np.abs(np.corrcoef(x[:, moving], rowvar=False))
    np.fill_diagonal(r, -1)
    chosen = [int(place) for place in np.unravel_index(int(r.argmax()), r.shape)]
    while len(chosen) < min(count, len(moving)):
        strongest = r[chosen].max(0)
        strongest[chosen] = -1
        if strongest.max() < WEAK and len(moving) > count:
            break
        chosen.append(int(strongest.argmax()))
    return sorted(int(moving[j]) for j in chosen)


def density_curve(x: Float64[np.ndarray, " n"], bins: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A smooth density over the draws' central 99.6 %, folded back at the draws' ends so that bounds stay bounds."""
    start, unit = float(x.min()), float(np.ptp(x))
    x = (x - start) / unit  # so that no square of a tiny scale is lost
    low, high = np.quantile(x, [0.002, 0.998])
    if low == high:  # nearly all draws are the same
        low, high = 0.0, 1.0
    inner = np.quantile(x, [0.25, 0.75])
    spread = min(float(x.std()), float(inner[1] - inner[0]) / 1.34) or float(x.std())
    bandwidth = 1.06 * spread * len(x) ** -0.2  # Scott's
    edges = np.linspace(low, high, bins + 1)
    step = edges[1] - edges[0]
    counts = np.histogram(x, edges)[0] / (len(x) * step)
    reach = min(max(1, math.ceil(4 * bandwidth / step)), bins)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / bandwidth) ** 2)
    smooth = np.convolve(np.pad(counts, reach, mode="symmetric"), kernel / kernel.sum(), mode="valid")
    return start + unit * (edges[1:] + edges[:-1]) / 2, smooth / unit


def _shown(count: int, paired: list[int]) -> list[int]:
    """All columns, or the first ones and those of the pairs, 12 together."""
    if count <= MARGINALS:
        return list(range(count))
    others = [j for j in range(MARGINALS) if j not in paired]
    return sorted([*paired, *others[: MARGINALS - len(paired)]])


def _draw_trace(panel: "Axes", trace: Trace) -> None:
    steps, elbo = np.asarray(trace.steps, float), np.asarray(trace.elbo, float)
    finite = np.isfinite(elbo)
    steps, elbo = steps[finite], elbo[finite]
    tidy(panel)
    panel.set_xlabel("step", fontsize=8, color=MUTED)
    panel.set_title("ELBO in training", fontsize=9.5, color=INK, loc="left", fontweight="bold")
    if len(elbo) < 2:
        panel.text(0.5, 0.5, "no trace", transform=panel.transAxes, ha="center", color=MUTED)
        return
    window = max(1, len(elbo) // 50)
    smooth = np.convolve(elbo, np.ones(window) / window, mode="valid")
    panel.plot(steps, elbo, color=PALE, linewidth=0.8)
    panel.plot(steps[(window - 1) // 2 :][: len(smooth)], smooth, color=BLUE, linewidth=1.6)
    # a start far below would press the rest flat: the axis holds what comes after the first tenth
    settled = elbo[len(elbo) // 10 :]
    low, high = float(np.quantile(settled, 0.005)), float(elbo.max())
    margin = 0.08 * (high - low) or 1.0
    panel.set_ylim(max(low, float(elbo.min())) - margin, high + margin)
    if elbo.min() < low - margin:
        panel.annotate(
            f"starts at {elbo[0]:.4g}", (0.99, 0.05), xycoords="axes fraction", ha="right", fontsize=7.5, color=MUTED
        )
    last = f"{elbo[-max(1, len(elbo) // 10) :].mean():.5g} over the last tenth"
    panel.set_title(last, fontsize=8, color=MUTED, loc="right")


def draw_marginal(panel: "Axes", name: str, column: np.ndarray, truth: np.ndarray | None) -> None:
    """One parameter's marginal density, with its median."""
    x = column[np.isfinite(column)]
    tidy(panel)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_title(shortened(name), fontsize=8.5, color=INK, loc="left", parse_math=False, pad=3)
    if len(x) < 2 or np.ptp(x) == 0:
        said = f"always {x[0]:.4g}" if len(x) else "not finite"
        panel.text(0.5, 0.4, said, transform=panel.transAxes, ha="center", color=MUTED, fontsize=8)
        panel.set_xticks([])
        return
    place, height = density_curve(x)
    low, middle, high = np.quantile(x, [0.05, 0.5, 0.95])
    inside = (place >= low) & (place <= high)
    panel.fill_between(place, height, color=PALE, alpha=0.45, linewidth=0)
    panel.fill_between(place[inside], height[inside], color=PALE, linewidth=0)
    panel.plot(place, height, color=BLUE, linewidth=1.3)
    panel.vlines(middle, 0, float(np.interp(middle, place, height)), color=BLUE, linewidth=1.0)
    if truth is not None and np.ptp(truth[np.isfinite(truth)]) > 0:
        panel.plot(*density_curve(truth[np.isfinite(truth)]), color=ORANGE, linewidth=1.2, linestyle=(0, (4, 2)))
    panel.set_ylim(0, None)
    width = place[-1] - place[0]
    marks = [low, middle, high] if min(middle - low, high - middle) > 0.17 * width else [low, high]
    panel.set_xticks(marks, [_number(mark, high - low) for mark in marks])


def _draw_pairs(area: Any, names: list[str], values: np.ndarray) -> None:
    x = values[np.isfinite(values).all(1)]
    points = x[np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int)]
    size = len(names) - 1
    limits = np.quantile(x, [0.002, 0.998], axis=0)
    margin = 0.06 * (limits[1] - limits[0])
    panels = area.subplots(size, size, squeeze=False)
    for row in range(size):
        for column in range(size):
            panel = panels[row, column]
            if column > row:
                panel.axis("off")
                continue
            across, up = column, row + 1
            tidy(panel)
            panel.set_box_aspect(1)
            panel.scatter(points[:, across], points[:, up], s=4, color=BLUE, alpha=0.18, linewidth=0, rasterized=True)
            panel.set_xlim(limits[0, across] - margin[across], limits[1, across] + margin[across])
            panel.set_ylim(limits[0, up] - margin[up], limits[1, up] + margin[up])
            r = np.corrcoef(x[:, across], x[:, up])[0, 1]
            panel.set_title(f"r = {r:z.2f}", fontsize=7.5, color=MUTED, pad=2)
            panel.tick_params(labelbottom=row == size - 1, labelleft=column == 0)
            panel.locator_params(nbins=3)
            for axis in (panel.xaxis, panel.yaxis):
                axis.get_offset_text().set(fontsize=7, color=MUTED)
            if row == size - 1:
                panel.set_xlabel(shortened(names[across], 18), fontsize=8, color=INK, parse_math=False)
            if column == 0:
                panel.set_ylabel(shortened(names[up], 18), fontsize=8, color=INK, parse_math=False)


def draw_ranks(panel: "Axes", result: SbcResult, j: int, band: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """One parameter's ranks of the truth as a difference of shares, with the simultaneous band."""
    points, lower, upper = band
    below = np.bincount(result.ranks[:, j], minlength=result.draws + 1).cumsum()[:-1] / result.replications
    fails = result.p_values[j] < FALSE_ALARM
    tidy(panel)
    panel.fill_between(points, lower - points, upper - points, color=GRID, linewidth=0, step="mid")
    panel.axhline(0, color=MUTED, linewidth=0.6)
    panel.step(points, below - points, color=RED if fails else BLUE, linewidth=1.4, where="mid")
    panel.set_title(shortened(result.columns[j], 20), fontsize=8.5, color=INK, loc="left", parse_math=False, pad=3)
    panel.set_title(f"p = {result.p_values[j]:.2g}", fontsize=8, color=RED if fails else MUTED, loc="right", pad=3)
    panel.set_xlim(0, 1)
    panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    panel.locator_params(axis="y", nbins=4)


def _draw_coverage(panel: "Axes", result: SbcResult) -> None:
    tidy(panel)
    panel.set_title("Truths inside the interval of", fontsize=8.5, color=INK, loc="left", pad=3)
    fails = result.p_values < FALSE_ALARM
    aside = np.linspace(-0.2, 0.2, len(fails)) if len(fails) > 1 else np.zeros(1)
    for place, row in enumerate(result.coverage):
        panel.fill_between(
            place + np.array([-0.35, 0.35]), row.expected - 2 * row.se, row.expected + 2 * row.se, color=GRID
        )
        panel.hlines(row.expected, place - 0.35, place + 0.35, color=MUTED, linewidth=0.8)
        panel.scatter(place + aside, row.observed, s=9, c=np.where(fails, RED, BLUE), alpha=0.7, linewidth=0)
    panel.set_xticks(range(len(result.coverage)), [f"{row.level:.0%}" for row in result.coverage])
    lowest = min(float(row.observed.min()) for row in result.coverage)
    panel.set_ylim(min(0.35, lowest - 0.05), 1.03)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no pyplot: it would keep the figure, and ask for a screen
    return figure


def tidy(panel: "Axes") -> None:
    """A panel with few spines and small, quiet ticks."""
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(MUTED)
        panel.spines[side].set_linewidth(0.6)
    panel.tick_params(labelsize=7.5, colors=MUTED, width=0.6, length=2.5)


def heading(area: Any, text: str) -> None:
    """A heading over a subfigure."""
    area.suptitle(text, fontsize=9.5, color=INK, x=0.004, ha="left", fontweight="bold")


def shortened(name: str, limit: int = _NAME) -> str:
    """A long name with its middle left out: the end often tells parameters apart."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[len(name) - (limit - limit // 2) :]}"


def _number(value: float, range_: float) -> str:
    """Digits enough to tell two ends of an interval apart, no more."""
    if range_ <= 0 or not 1e-4 < abs(value) + range_ < 1e5:
        return f"{value:z.2g}"
    return f"{value:z.{max(0, 1 - math.floor(math.log10(range_)))}f}"


def save_figure(figure: "Figure", path: Path, title: str) -> None:
    """Write the figure in one step, with its title."""
    check_plot_path(path, force=True)
    if title:
        letters = int(figure.get_figwidth() / 0.088)  # of the title's size, on average
        figure.suptitle(textwrap.fill(title, letters), fontsize=10.5, color=INK, x=0.006, ha="left", parse_math=False)
    kind = path.suffix.lower()[1:]
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)

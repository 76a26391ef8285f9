"""Pictures of an amortised posterior: is the encoder calibrated, and what does it say of several observations.

Legible for one column or fifty, two observations or a hundred thousand. Formats and colours are those of
`posterior_plot`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from hsivi_cli.errors import InputError
from hsivi_cli.evaluation.amortised_calibration import DENSITY, CoverageCurve
from hsivi_cli.evaluation.calibration import FALSE_ALARM, JOINT, SbcResult
from hsivi_cli.evaluation.posterior_plot import (
    BLUE,
    GRID,
    INK,
    MARGINALS,
    MUTED,
    ORANGE,
    POINTS,
    RED,
    draw_marginal,
    draw_ranks,
    heading,
    new_figure,
    save_figure,
    shortened,
    tidy,
)
from hsivi_cli.evaluation.uniformity import simultaneous_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD_KHAT, LARGEST_KHAT = 0.5, 0.7  # Vehtari, Simpson, Gelman, Yao, Gabry (arXiv 1507.02646): weights are good, useful
KHAT_TOP = 2.0  # larger ones are drawn there
OBSERVATIONS, PARAMETERS, MANY = 6, 4, 100  # panels across and down, and intervals side by side
_TITLE: dict[str, Any] = {"fontsize": 9.5, "color": INK, "loc": "left", "fontweight": "bold", "pad": 5}


def plot_encoder_check(
    path: Path,
    sbc: SbcResult,
    coverage: CoverageCurve,
    khats: Float64[np.ndarray, " B"] | None = None,
    title: str | None = None,
) -> None:
    """Draw the coverage of regions of highest density, TARP, the k-hat of each observation, and ranks by column.

    Curves stay within the grey 95 % band where the encoder is right; below it, coverage is overconfident. Rank panels
    are the worst first, at most 12, as in `plot_sbc`. `khats` may be NaN or infinite, which counts as the largest.
    The title is the verdict of `sbc` unless given. Format by the extension; written in one step.
    """
    shown = [j for j in np.argsort([test.p for test in sbc.tests], kind="stable") if sbc.columns[j] not in _ASIDE]
    left_out = f" (worst {MARGINALS} of {len(shown)})" if len(shown) > MARGINALS else ""
    shown = shown[:MARGINALS]
    across = len(shown) if len(shown) <= 4 else 3 if len(shown) <= 6 else 4
    down = math.ceil(len(shown) / max(across, 1))
    joint = JOINT in sbc.columns
    count = 1 + joint + (khats is not None)
    top_height, bottom_height = 3.3, (1.7 * down + 0.75) if shown else 0.0
    figure = new_figure(max(3.3 * count, 2.5 * across) + 0.4, top_height + bottom_height + 0.5)
    heights = [top_height, bottom_height] if shown else [top_height]
    top, *bottom = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = iter(top.subplots(1, count, squeeze=False)[0])
    band = (coverage.levels, coverage.lower, coverage.upper)
    p = _p_value(sbc, DENSITY)
    fails = not coverage.inside if p is None else p < FALSE_ALARM
    panel = next(panels)
    _draw_curve(panel, "Regions of highest density", band, coverage.observed, fails, p)
    panel.text(0.96, 0.04, "overconfident", transform=panel.transAxes, ha="right", fontsize=7.5, color=MUTED)
    # as a rule the ranks are those of the same simulations, and finding the band takes a while
    if len(coverage.levels) != sbc.draws:
        band = simultaneous_band(sbc.replications, sbc.draws)
    if joint:
        ranks = sbc.ranks[:, sbc.columns.index(JOINT)]
        below = np.bincount(ranks, minlength=sbc.draws + 1).cumsum()[:-1] / sbc.replications
        p = _p_value(sbc, JOINT)
        _draw_curve(next(panels), "All together (TARP)", band, below, p is not None and p < FALSE_ALARM, p)
    if khats is not None:
        _draw_khats(next(panels), np.asarray(khats, np.float64))
    if shown:
        heading(bottom[0], f"Ranks of the truth among {sbc.draws} draws: share below, minus expected{left_out}")
        grid = bottom[0].subplots(down, across, squeeze=False).ravel()
        for panel, j in zip(grid, shown, strict=False):
            draw_ranks(panel, sbc, int(j), band)
        for panel in grid[len(shown) :]:
            panel.axis("off")
    save_figure(figure, path, sbc.verdict if title is None else title)


def plot_amortised(
    path: Path,
    columns: Sequence[str],
    draws: Float64[np.ndarray, "B n p"],
    title: str = "",
    truths: Float64[np.ndarray, "B p"] | None = None,
) -> None:
    """Draw the posteriors of several observations: six of them, evenly spaced, one by one, and up to 100 side by side.

    Two parameters are scattered against each other. Otherwise the marginals of the four parameters that observations
    tell most about, with 90 % intervals, and beside them the means and intervals of all observations, sorted by the
    mean. `truths` are marked. What is left out is said. Nothing but finite values is drawn. Raises InputError where
    columns and draws do not go together, or there is nothing to draw.
    """
    draws = np.asarray(draws, np.float64)
    if draws.ndim != 3 or not draws.size or draws.shape[2] != len(columns):
        raise InputError(f"--plot: draws of shape {draws.shape} for {len(columns)} parameters: nothing can be drawn")
    truth = None if truths is None else np.asarray(truths, np.float64)
    if truth is not None and truth.shape != (len(draws), len(columns)):
        raise InputError(f"--plot: truths of shape {truth.shape} do not go with draws of {draws.shape}")
    rows = _evenly(len(draws), OBSERVATIONS)
    if len(columns) == 2:
        _plot_pairs(path, columns, draws, rows, title, truth)
    else:
        _plot_marginals(path, columns, draws, rows, title, truth)


def most_informed(draws: Float64[np.ndarray, "B n p"], count: int) -> list[int]:
    """Up to `count` parameters, in order: those whose means differ most between observations, in posterior sds."""
    p = draws.shape[2]
    if len(draws) == 1:
        return list(range(min(p, count)))
    finite = np.where(np.isfinite(draws), draws, np.nan)
    told = np.zeros(p)
    for j in range(p):
        usable = finite[~np.isnan(finite[:, :, j]).all(1), :, j]
        if len(usable) > 1:
            usable = usable / (np.nanmax(np.abs(usable)) or 1.0)  # so that no square leaves float64
            told[j] = np.nanmean(usable, 1).std() / (np.nanstd(usable, 1).mean() or 1.0)
    return sorted(np.argsort(-told, kind="stable")[:count].tolist())


_ASIDE = (DENSITY, JOINT)  # have panels of their own


def _p_value(sbc: SbcResult, column: str) -> float | None:
    return float(sbc.p_values[sbc.columns.index(column)]) if column in sbc.columns else None


def _evenly(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _draw_curve(
    panel: "Axes", name: str, band: tuple[np.ndarray, ...], observed: np.ndarray, fails: bool, p: float | None
) -> None:
    """Expected coverage against level, with the diagonal and its band."""
    levels, lower, upper = band
    tidy(panel)
    panel.set_box_aspect(1)
    panel.fill_between([0, *levels, 1], [0, *lower, 1], [0, *upper, 1], color=GRID, linewidth=0)
    panel.plot([0, 1], [0, 1], color=MUTED, linewidth=0.6)
    panel.plot([0, *levels, 1], [0, *observed, 1], color=RED if fails else BLUE, linewidth=1.6)
    panel.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    panel.set_title(name, **_TITLE)
    panel.set_xlabel("credibility level", fontsize=8, color=MUTED)
    panel.set_ylabel("share of truths inside", fontsize=8, color=MUTED)
    off = observed - levels
    said = f"largest deviation {off[np.abs(off).argmax()]:+z.2f}" + ("" if p is None else f"\np = {p:.2g}")
    panel.text(0.04, 0.96, said, transform=panel.transAxes, va="top", fontsize=8, color=RED if fails else MUTED)


def _draw_khats(panel: "Axes", khats: np.ndarray) -> None:
    """Sorted k-hats of importance sampling from the encoder, one an observation."""
    tidy(panel)
    panel.set_box_aspect(1)
    panel.set_title("k-hat of the encoder", **_TITLE)
    panel.set_xlabel("observations, sorted", fontsize=8, color=MUTED)
    if not len(khats):
        panel.text(0.5, 0.5, "no observation", transform=panel.transAxes, ha="center", color=MUTED, fontsize=8)
        return
    height = np.sort(np.where(np.isnan(khats), np.inf, khats))
    good, bad, beyond = (height <= GOOD_KHAT).sum(), (height > LARGEST_KHAT).sum(), (height > KHAT_TOP).sum()
    within = np.clip(height, -0.5, KHAT_TOP)
    top, bottom = max(1.0, float(within[-1]) + 0.1), min(0.0, float(within[0]) - 0.1)
    place = np.arange(1, len(height) + 1)
    if len(height) <= 200:
        panel.scatter(place, within, s=9, c=np.where(height > LARGEST_KHAT, RED, BLUE), linewidth=0, zorder=3)
    else:
        keep = np.array(_evenly(len(height), 2000))
        for part, colour in ((keep[keep < len(height) - bad], BLUE), (keep[keep >= len(height) - bad], RED)):
            panel.plot(place[part], within[part], color=colour, linewidth=1.8, zorder=3)
    panel.axhspan(LARGEST_KHAT, top, color=GRID, alpha=0.6, linewidth=0)
    panel.axhline(GOOD_KHAT, color=MUTED, linewidth=0.7, dashes=(4, 3))
    panel.axhline(LARGEST_KHAT, color=MUTED, linewidth=0.7)
    panel.set(xlim=(0.5 - 0.02 * len(height), 0.5 + 1.02 * len(height)), ylim=(bottom, top))
    ticks = [*np.arange(0, top, 0.5), LARGEST_KHAT]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.locator_params(axis="x", nbins=4, integer=True)
    said = f"{good} of {len(height)} at most {GOOD_KHAT:g}\n{bad} above {LARGEST_KHAT:g}"
    said += f"\n{beyond} above {KHAT_TOP:g}, or without a k-hat" if beyond else ""
    panel.text(0.04, 0.96, said, transform=panel.transAxes, va="top", fontsize=8, color=RED if bad else MUTED)


def _plot_pairs(
    path: Path, columns: Sequence[str], draws: np.ndarray, rows: list[int], title: str, truth: np.ndarray | None
) -> None:
    across = len(rows) if len(rows) <= 3 else 2 if len(rows) == 4 else 3
    down = math.ceil(len(rows) / across)
    figure = new_figure(3.0 * across + 0.5, 2.9 * down + 0.9)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, row in zip(panels, rows, strict=False):
        _draw_cloud(panel, draws[row], f"observation {row + 1}", None if truth is None else truth[row])
    for panel in panels[len(rows) :]:
        panel.axis("off")
    figure.supxlabel(shortened(columns[0]), fontsize=9, color=INK, parse_math=False)
    figure.supylabel(shortened(columns[1]), fontsize=9, color=INK, parse_math=False)
    save_figure(figure, path, _said(title, len(rows), len(draws), truth))


def _draw_cloud(panel: "Axes", x: np.ndarray, name: str, truth: np.ndarray | None) -> None:
    tidy(panel)
    panel.set_box_aspect(1)
    panel.set_title(name, fontsize=8.5, color=INK, loc="left", pad=3)
    x = x[np.isfinite(x).all(1)]
    if not len(x):
        panel.text(0.5, 0.5, "not finite", transform=panel.transAxes, ha="center", color=MUTED, fontsize=8)
        return
    points = x[np.linspace(0, len(x) - 1, min(len(x), 2 * POINTS)).astype(int)]
    panel.scatter(points[:, 0], points[:, 1], s=4, color=BLUE, alpha=0.25, linewidth=0, rasterized=True)
    limits = np.quantile(x, [0.002, 0.998], axis=0)
    if truth is not None and np.isfinite(truth).all():
        panel.scatter(truth[:1], truth[1:], s=45, marker="x", color=ORANGE, linewidth=1.6, zorder=3)
        limits = np.stack([np.minimum(limits[0], truth), np.maximum(limits[1], truth)])
    margin = 0.06 * (limits[1] - limits[0])
    margin = np.where(margin > 0, margin, 0.05 * np.abs(limits[0]) + 1e-300)
    panel.set_xlim(limits[0, 0] - margin[0], limits[1, 0] + margin[0])
    panel.set_ylim(limits[0, 1] - margin[1], limits[1, 1] + margin[1])
    panel.locator_params(nbins=4)
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_offset_text().set(fontsize=7, color=MUTED)


def _plot_marginals(
    path: Path, columns: Sequence[str], draws: np.ndarray, rows: list[int], title: str, truth: np.ndarray | None
) -> None:
    side = _evenly(len(draws), MANY)
    shown = most_informed(draws[side], PARAMETERS)
    several = len(draws) > 1
    width = 1.65 * len(rows)
    figure = new_figure(max(width + (3.2 if several else 0) + 0.7, 4.8), 1.65 * len(shown) + 1.1)
    widths = [max(width, 3.0), 3.2] if several else [1.0]
    body, *beside = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    grid = body.subplots(len(shown), len(rows), squeeze=False)
    for panels, j in zip(grid, shown, strict=True):
        for panel, row in zip(panels, rows, strict=True):
            name = f"observation {row + 1}" if j == shown[0] else ""
            draw_marginal(panel, name, draws[row, :, j], None)
            if truth is not None and np.isfinite(truth[row, j]):
                panel.axvline(truth[row, j], color=ORANGE, linewidth=1.4, zorder=3)
        panels[0].set_ylabel(shortened(columns[j], 18), fontsize=8.5, color=INK, parse_math=False)
    left_out = "" if len(shown) == len(columns) else f" ({len(shown)} of {len(columns)} parameters)"
    heading(body, f"Marginals with 90 % interval{left_out}")
    if beside:
        for panel, j in zip(beside[0].subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            _draw_intervals(panel, draws[side, :, j], None if truth is None else truth[side, j], len(side) > len(rows))
        heading(beside[0], f"{len(side)} of {len(draws)} observations" if len(side) < len(draws) else "Side by side")
    save_figure(figure, path, _said(title, len(rows), len(draws), truth))


def _draw_intervals(panel: "Axes", x: np.ndarray, truth: np.ndarray | None, many: bool) -> None:
    """Mean and 90 % interval of every observation; many in the order of their means, few by number."""
    tidy(panel)
    panel.set_xticks([])
    number = np.flatnonzero(np.isfinite(x).any(1))
    if not len(number):
        panel.text(0.5, 0.4, "not finite", transform=panel.transAxes, ha="center", color=MUTED, fontsize=8)
        return
    x = np.where(np.isfinite(x), x, np.nan)
    size = 8 if many else 16
    if many:
        number = number[np.argsort(np.nanmean(x[number], 1), kind="stable")]
    low, high = np.nanquantile(x[number], [0.05, 0.95], axis=1)
    place = np.arange(len(number))
    panel.vlines(place, low, high, color=BLUE, alpha=0.45, linewidth=min(3.0, 120 / len(place)))
    panel.scatter(place, np.nanmean(x[number], 1), s=size, color=BLUE, linewidth=0, zorder=3)
    if truth is not None:
        panel.scatter(place, truth[number], s=size, marker="x", color=ORANGE, linewidth=1.0, zorder=4)
    panel.set_xlim(-0.8, len(place) - 0.2)
    if not many:
        panel.set_xticks(place, [f"{j + 1}" for j in number])
    panel.locator_params(axis="y", nbins=4)
    panel.yaxis.get_offset_text().set(fontsize=7, color=MUTED)


def _said(title: str, shown: int, count: int, truth: np.ndarray | None) -> str:
    notes = [f"{shown} of {count} observations"] if shown < count else []
    notes += ["truths in orange"] if truth is not None else []
    return "; ".join([part for part in (title, ", ".join(notes)) if part])

"""Curves as PNG: direct labels, readable at the width of a phone, on light or dark paper."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the curves."""

    ink: str
    faint: str
    paper: str


LIGHT, DARK = Theme("#334155", "#e2e8f0", "#ffffff"), Theme("#cbd5e1", "#334155", "#1e293b")
# In inches, with 11-point type: shown 358 pixels wide, on a phone, the type is still 12 pixels high.
SIZE = (4.6, 3.1)
LABEL_WIDTH = 11
MOST_MARKERS = 24


@dataclass(frozen=True)
class Curve:
    """A line of a figure; underscores in its name are shown as spaces. colour: "" is the ink. low, high: a band around it, () is none."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = ""
    is_dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def plot_curves(
    path: str | Path,
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    unit: str = "",
    theme: Theme = LIGHT,
    is_log: bool = False,
    least_span: float = 0.0,
) -> Path:
    """Draw curves with their names at their right ends and write a PNG; unit: "fraction" shows the y axis as 0 to 100 %.

    is_log: both axes are logarithmic. least_span: the y axis spans at least so much, so that a trifle does not look like a cliff.
    Raises ValueError when there is nothing to draw.
    """
    if not any(len(curve.x) for curve in curves):
        raise ValueError(f"the figure {title!r} got no points; a curve needs at least one: measure something first")
    figure, axes = new_figure(title, theme)
    for curve in curves:
        marker = "o" if len(curve.x) <= MOST_MARKERS else None
        dashes = (3, 2) if curve.is_dashed else (None, None)
        if len(curve.low):
            axes.fill_between(curve.x, curve.low, curve.high, color=curve.colour or theme.ink, alpha=0.18, lw=0)
        axes.plot(curve.x, curve.y, color=curve.colour or theme.ink, lw=2, marker=marker, ms=3.5, dashes=dashes, clip_on=False)
    _scale_axes(axes, curves, unit, is_log, least_span)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _label_ends(axes, curves, theme)
    return save_figure(figure, path)


def new_figure(title: str, theme: Theme = LIGHT) -> tuple[Any, Any]:
    """Make a figure with axes in the common style, without touching matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=theme.paper)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=theme.ink)
    axes.grid(True, color=theme.faint, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=theme.ink, labelsize=10, length=0)
    axes.xaxis.label.set(color=theme.ink, fontsize=11)
    axes.yaxis.label.set(color=theme.ink, fontsize=11)
    return figure, axes


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write the PNG, without the library's name and version in it, so that equal data give equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=220, metadata={"Software": None})
    return path


def spread(centres: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move labels, given by centre and height as fractions of the axis, as little as keeps their order and parts them."""
    order = sorted(range(len(centres)), key=lambda index: centres[index])
    placed = list(centres)
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + (heights[below] + heights[above]) / 2)
    # Pushed up past the top, the pile comes down again as a whole, each label only as far as it must.
    ceiling = 1.0
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling - heights[index] / 2)
        ceiling = placed[index] - heights[index] / 2
    return placed


def _scale_axes(axes: Any, curves: Sequence[Curve], unit: str, is_log: bool, least_span: float) -> None:
    """Choose scales, ticks and limits."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if unit == "fraction":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, min(1.0, 1.1 * max([*(value for curve in curves for value in (*curve.y, *curve.high)), 0.01])))
    if is_log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        return
    bottom, top = axes.get_ylim()
    if top - bottom < least_span:
        axes.set_ylim((bottom + top - least_span) / 2, (bottom + top + least_span) / 2)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _label_ends(axes: Any, curves: Sequence[Curve], theme: Theme) -> None:
    """Write each curve's name right of its last point, moved apart where ends lie close."""
    drawn = [curve for curve in curves if len(curve.x)]
    texts = ["\n".join(textwrap.wrap(curve.name.replace("_", " "), LABEL_WIDTH, break_long_words=False)) for curve in drawn]
    # Asking for the limits makes matplotlib bring them up to date.
    axes.get_xlim(), axes.get_ylim()
    ends = axes.transAxes.inverted().transform(axes.transData.transform([(curve.x[-1], curve.y[-1]) for curve in drawn]))
    heights = [0.075 * (1 + text.count("\n")) + 0.02 for text in texts]
    for curve, text, share in zip(drawn, texts, spread([float(end[1]) for end in ends], heights), strict=True):
        axes.annotate(
            text, xy=(1.02, share), xycoords="axes fraction", color=curve.colour or theme.ink, fontsize=10, fontweight="bold",
            va="center", ha="left", linespacing=1.0, annotation_clip=False,
        )  # fmt: skip

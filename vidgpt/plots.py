"""Curves and maps as PNG: one colour for each forecaster everywhere, direct labels, readable at the width of a phone."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgpt.evaluation import TokenReport

COLOURS = {
    "model": "#2563eb",
    "prediction": "#2563eb",
    "validation": "#2563eb",
    "training": "#94a3b8",
    "copy_last_frame": "#d97706",
    "tokenizer_ceiling": "#059669",
    "unigram_by_position": "#7c3aed",
    "unigram": "#be185d",
    "uniform": "#64748b",
    "real": "#0f172a",
}
INK, FAINT = "#334155", "#e2e8f0"
# In inches, with 11-point type: shown 358 pixels wide, on a phone, the type is still 12 pixels high.
SIZE = (4.6, 3.1)
LABEL_WIDTH = 11


@dataclass(frozen=True)
class Curve:
    """A line of a figure; its name is a key of COLOURS, underscores are shown as spaces."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def plot_curves(path: str | Path, curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, unit: str = "") -> Path:
    """Draw curves with their names at their right ends and write a PNG; unit: "fraction" shows the y axis as 0 to 100 %.

    Raises ValueError when there is nothing to draw.
    """
    if not any(len(curve.x) for curve in curves):
        raise ValueError(f"the figure {title!r} got no points; a curve needs at least one: measure something first")
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = _new_figure(title)
    for curve in curves:
        colour = COLOURS.get(curve.name, INK)
        marker = "o" if len(curve.x) <= 24 else None
        dashes = (3, 2) if curve.name in ("copy_last_frame", "real") else (None, None)
        axes.plot(curve.x, curve.y, color=colour, lw=2, marker=marker, ms=3.5, dashes=dashes, clip_on=False)
    if unit == "fraction":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, min(1.0, 1.1 * max([*(value for curve in curves for value in curve.y), 0.01])))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _label_ends(axes, curves)
    return _save(figure, path)


def plot_losses(metrics: str | Path, path: str | Path, *, title: str = "Loss", y_label: str = "nats per token") -> Path:
    """Draw "loss" and "validation_loss" by "step" of a run's metrics.jsonl; the training loss is a running mean.

    Raises ValueError when the file has neither.
    """
    rows = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines() if line.strip()]
    training, validation = _points("training", rows, "loss"), _points("validation", rows, "validation_loss")
    smooth = Curve("training", training.x, _running_mean(training.y, max(1, len(training.y) // 100)))
    curves = [curve for curve in (smooth, validation) if curve.x]
    return plot_curves(path, curves, title=title, x_label="optimizer step", y_label=y_label)


def plot_accuracy_by_horizon(report: TokenReport, path: str | Path) -> Path:
    """Draw free-running accuracy by horizon beside copying the last given frame; raises ValueError without that regime."""
    rows = [] if report.free_running is None else report.free_running.by_frame()
    figures = {"model": "top1_accuracy_fraction", "copy_last_frame": "copy_last_given_frame_accuracy_fraction"}
    curves = [_points(name, rows, key, x="horizon_frames") for name, key in figures.items()]
    title, x_label = "Free-running token accuracy", "horizon (latent frames)"
    return plot_curves(path, curves, title=title, x_label=x_label, y_label="right tokens", unit="fraction")


def plot_changes_by_horizon(report: TokenReport, path: str | Path) -> Path:
    """Draw the share of tokens that change from frame to frame, real and generated: a frozen rollout falls to zero."""
    rows = [] if report.free_running is None else report.free_running.by_frame()
    figures = {"model": "changed_tokens_generated_fraction", "real": "changed_tokens_real_fraction"}
    curves = [_points(name, rows, key, x="horizon_frames") for name, key in figures.items()]
    title, x_label = "Tokens that change, free-running", "horizon (latent frames)"
    return plot_curves(path, curves, title=title, x_label=x_label, y_label="changed tokens", unit="fraction")


def plot_accuracy_by_frame(report: TokenReport, path: str | Path) -> Path:
    """Draw teacher-forced accuracy by frame index, beside every baseline."""
    # Smoothing touches the copy baseline's probabilities only, never its accuracy.
    curves = [
        _points(name.removesuffix("_smoothed"), meter.by_frame(), "top1_accuracy_fraction", x="frame_index")
        for name, meter in report.teacher_forced.items()
    ]
    return plot_curves(
        path, curves, title="Teacher-forced token accuracy", x_label="latent frame", y_label="right tokens", unit="fraction"
    )


def plot_psnr_by_horizon(psnr_db: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Draw PSNR by horizon; psnr_db: "prediction", "copy_last_frame", "tokenizer_ceiling", first predicted frame first."""
    curves = [Curve(name, range(1, len(values) + 1), values) for name, values in psnr_db.items()]
    return plot_curves(path, curves, title="Predicted frames against real ones", x_label="horizon (frames)", y_label="PSNR (dB)")


def plot_accuracy_by_position(report: TokenReport, path: str | Path) -> Path:
    """Draw the model's teacher-forced accuracy as a map over the token grid."""
    cells = {
        (int(row["row"] or 0), int(row["column"] or 0)): row["top1_accuracy_fraction"]
        for row in report.teacher_forced["model"].by_position()
    }
    height, width = (1 + max(place[axis] for place in cells) for axis in (0, 1))
    values = [[float(cells[y, x] or 0.0) for x in range(width)] for y in range(height)]
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = _new_figure("Teacher-forced accuracy by place")
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.set_xlabel("token column")
    axes.set_ylabel("token row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), fraction=0.05)
    bar.set_label("right tokens", color=INK, fontsize=11)
    bar.ax.tick_params(colors=INK, labelsize=10, length=0)
    bar.outline.set_visible(False)
    return _save(figure, path)


def _points(name: str, rows: Sequence[Mapping[str, Any]], key: str, x: str = "step") -> Curve:
    """Take one figure of rows as a curve, leaving out rows where it is missing or undefined."""
    kept = [row for row in rows if row.get(key) is not None and row.get(x) is not None]
    return Curve(name, [float(row[x]) for row in kept], [float(row[key]) for row in kept])


def _running_mean(values: Sequence[float], span: int) -> list[float]:
    """Average each value with up to span - 1 before it."""
    return [sum(values[max(0, end - span) : end]) / min(span, end) for end in range(1, len(values) + 1)]


def _new_figure(title: str) -> tuple[Any, Any]:
    """Make a figure with axes in the common style, without touching matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.grid(True, color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=10, length=0)
    axes.xaxis.label.set(color=INK, fontsize=11)
    axes.yaxis.label.set(color=INK, fontsize=11)
    return figure, axes


def _label_ends(axes: Any, curves: Sequence[Curve]) -> None:
    """Write each curve's name right of its last point, moved apart where ends lie close."""
    drawn = [curve for curve in curves if len(curve.x)]
    texts = ["\n".join(textwrap.wrap(curve.name.replace("_", " "), LABEL_WIDTH)) for curve in drawn]
    bottom, top = axes.get_ylim()
    shares = [(float(curve.y[-1]) - bottom) / (top - bottom) for curve in drawn]
    heights = [0.075 * (1 + text.count("\n")) + 0.02 for text in texts]
    for curve, text, share in zip(drawn, texts, spread(shares, heights), strict=True):
        axes.annotate(
            text, xy=(1.02, share), xycoords="axes fraction", color=COLOURS.get(curve.name, INK), fontsize=10, fontweight="bold",
            va="center", ha="left", linespacing=1.0, annotation_clip=False,
        )  # fmt: skip


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


def _save(figure: Any, path: str | Path) -> Path:
    """Write the PNG, without the library's name and version in it, so that equal data give equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=220, metadata={"Software": None})
    return path

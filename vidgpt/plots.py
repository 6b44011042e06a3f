"""Curves and maps of a token evaluation as PNG: one colour for each forecaster everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgpt.evaluation import TokenReport
from vidtok.plots import LIGHT, Curve, new_figure, plot_curves, save_figure

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
DASHED = ("copy_last_frame", "real")


def plot_losses(metrics: str | Path, path: str | Path, *, title: str = "Loss", y_label: str = "nats per token") -> Path:
    """Draw "loss" and "validation_loss" by "step" of a run's metrics.jsonl; the training loss is a running mean.

    Raises ValueError when the file has neither.
    """
    rows = [json.loads(line) for line in Path(metrics).read_text(encoding="utf-8").splitlines() if line.strip()]
    training, validation = _points("training", rows, "loss"), _points("validation", rows, "validation_loss")
    smooth = _curve("training", training.x, _running_mean(training.y, max(1, len(training.y) // 100)))
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
    curves = [_curve(name, range(1, len(values) + 1), values) for name, values in psnr_db.items()]
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

    figure, axes = new_figure("Teacher-forced accuracy by place")
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.set_xlabel("token column")
    axes.set_ylabel("token row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), fraction=0.05)
    bar.set_label("right tokens", color=LIGHT.ink, fontsize=11)
    bar.ax.tick_params(colors=LIGHT.ink, labelsize=10, length=0)
    bar.outline.set_visible(False)
    return save_figure(figure, path)


def _points(name: str, rows: Sequence[Mapping[str, Any]], key: str, x: str = "step") -> Curve:
    """Take one figure of rows as a curve, leaving out rows where it is missing or undefined."""
    kept = [row for row in rows if row.get(key) is not None and row.get(x) is not None]
    return _curve(name, [float(row[x]) for row in kept], [float(row[key]) for row in kept])


def _curve(name: str, x: Sequence[float], y: Sequence[float]) -> Curve:
    """Give a forecaster's curve in its colour."""
    return Curve(name, x, y, COLOURS.get(name, ""), name in DASHED)


def _running_mean(values: Sequence[float], span: int) -> list[float]:
    """Average each value with up to span - 1 before it."""
    return [sum(values[max(0, end - span) : end]) / min(span, end) for end in range(1, len(values) + 1)]

"""Curves and maps of a token evaluation as PNG: one colour for each forecaster everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidgpt.evaluation import TokenReport
from vidgpt.metrics import HIGH, LOW
from vidtok.plots import LIGHT, Curve, new_figure, plot_curves, save_figure

COLOURS = {
    "model": "#2563eb",
    "prediction": "#2563eb",
    "validation": "#2563eb",
    "training": "#94a3b8",
    "copy_last_frame": "#d97706",
    "linear_extrapolation": "#be185d",
    "tokenizer_ceiling": "#059669",
    "unigram_by_position": "#7c3aed",
    "unigram": "#be185d",
    "uniform": "#64748b",
    "true_law": "#0891b2",
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
    rows = report.free_running["model"].by_frame(report.setting.bootstrap) if report.free_running else []
    figures = {"model": "top1_accuracy_fraction", "copy_last_frame": "copy_last_given_frame_accuracy_fraction"}
    curves = [_points(name, rows, key, x="horizon_frames") for name, key in figures.items()]
    title, x_label = "Free-running token accuracy", "horizon (latent frames)"
    return plot_curves(path, curves, title=title, x_label=x_label, y_label="right tokens", unit="fraction")


def plot_changes_by_horizon(report: TokenReport, path: str | Path) -> Path:
    """Draw the share of tokens that change from frame to frame, real and generated: a frozen rollout falls to zero."""
    rows = report.free_running["model"].by_frame(report.setting.bootstrap) if report.free_running else []
    figures = {"model": "changed_tokens_generated_fraction", "real": "changed_tokens_real_fraction"}
    curves = [_points(name, rows, key, x="horizon_frames") for name, key in figures.items()]
    title, x_label = "Tokens that change, free-running", "horizon (latent frames)"
    return plot_curves(path, curves, title=title, x_label=x_label, y_label="changed tokens", unit="fraction")


def plot_accuracy_by_frame(report: TokenReport, path: str | Path) -> Path:
    """Draw teacher-forced accuracy by frame index, beside every baseline."""
    # Smoothing touches the copy baseline's probabilities only, never its accuracy.
    curves = [
        _points(
            name.removesuffix("_smoothed"), meter.by_frame(report.setting.bootstrap), "top1_accuracy_fraction", x="frame_index"
        )
        for name, meter in report.teacher_forced.items()
    ]
    return plot_curves(
        path, curves, title="Teacher-forced token accuracy", x_label="latent frame", y_label="right tokens", unit="fraction"
    )


def plot_psnr_by_horizon(psnr_db: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Draw PSNR by horizon; psnr_db: "prediction", "copy_last_frame", "tokenizer_ceiling", first predicted frame first."""
    curves = [_curve(name, range(1, len(values) + 1), values) for name, values in psnr_db.items()]
    return plot_curves(path, curves, title="Predicted frames against real ones", x_label="horizon (frames)", y_label="PSNR (dB)")


def plot_pixels_by_horizon(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], keys: Mapping[str, str], path: str | Path, *, title: str, y_label: str
) -> Path:
    """Draw a figure of frames by horizon; rows: of each forecaster, with "horizon_frames"; keys: the figure's name in its rows."""
    curves = [_points(name, rows[name], key, x="horizon_frames") for name, key in keys.items()]
    return plot_curves(path, curves, title=title, x_label="horizon (frames)", y_label=y_label)


def plot_accuracy_by_position(report: TokenReport, path: str | Path) -> Path:
    """Draw the model's teacher-forced accuracy as a map over the token grid."""
    rows = report.teacher_forced["model"].by_position()
    return _plot_maps(path, "Teacher-forced accuracy by place", {"": _grid(rows, "top1_accuracy_fraction")}, "right tokens")


def plot_changes_by_position(report: TokenReport, path: str | Path) -> Path:
    """Draw where tokens change in reality and in the model's rollouts, and where these are wrong, as maps over the token grid."""
    rows = report.free_running["model"].by_position()
    right = _grid(rows, "top1_accuracy_fraction")
    maps = {
        "change, real": _grid(rows, "changed_tokens_real_fraction"),
        "change, predicted": _grid(rows, "changed_tokens_generated_fraction"),
        "wrong": [[1 - value for value in line] for line in right],
    }
    return _plot_maps(path, "Free-running, by place", maps, "of the tokens")


def _grid(rows: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """Put a figure of rows with "row" and "column" into a grid; what is not known counts as 0."""
    cells = {(int(row["row"]), int(row["column"])): row[key] for row in rows}
    height, width = (1 + max(place[axis] for place in cells) for axis in (0, 1))
    return [[float(cells[y, x] or 0.0) for x in range(width)] for y in range(height)]


def _plot_maps(path: str | Path, title: str, maps: Mapping[str, list[list[float]]], label: str) -> Path:
    """Draw maps of fractions side by side, all on one scale of 0 to 1."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, first = new_figure(title)
    every = [first]
    if len(maps) > 1:
        first.remove()
        figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=LIGHT.ink)
        every = list(figure.subplots(1, len(maps)))
    for axes, (name, values) in zip(every, maps.items(), strict=True):
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=LIGHT.ink, labelsize=10, length=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6 if len(maps) == 1 else 3, integer=True))
        if name:
            axes.set_title(name, fontsize=11, color=LIGHT.ink)
        else:
            axes.set_xlabel("token column")
            axes.set_ylabel("token row")
    place = {"fraction": 0.05} if len(maps) == 1 else {"orientation": "horizontal", "shrink": 0.8}
    bar = figure.colorbar(image, ax=every, format=PercentFormatter(1.0, decimals=0), **place)
    bar.set_label(label, color=LIGHT.ink, fontsize=11)
    bar.ax.tick_params(colors=LIGHT.ink, labelsize=10, length=0)
    bar.outline.set_visible(False)
    return save_figure(figure, path)


def _points(name: str, rows: Sequence[Mapping[str, Any]], key: str, x: str = "step") -> Curve:
    """Take one figure of rows as a curve with the band of its interval, leaving out rows where it is missing or undefined."""
    kept = [row for row in rows if row.get(key) is not None and row.get(x) is not None]
    has_band = bool(kept) and all(row.get(key + end) is not None for row in kept for end in (LOW, HIGH))
    low, high = ([float(row[key + end]) for row in kept] if has_band else [] for end in (LOW, HIGH))
    curve = _curve(name, [float(row[x]) for row in kept], [float(row[key]) for row in kept])
    return replace(curve, low=low, high=high)


def _curve(name: str, x: Sequence[float], y: Sequence[float]) -> Curve:
    """Give a forecaster's curve in its colour."""
    return Curve(name, x, y, COLOURS.get(name, ""), name in DASHED)


def _running_mean(values: Sequence[float], span: int) -> list[float]:
    """Average each value with up to span - 1 before it."""
    return [sum(values[max(0, end - span) : end]) / min(span, end) for end in range(1, len(values) + 1)]

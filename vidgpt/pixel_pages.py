"""What was measured in pixels, for the report: the worst and best clips in motion, curves, tables and a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import repeat
from torch import Tensor

from vidgpt import plots
from vidgpt.clip_frames import RECONSTRUCTION
from vidgpt.metrics import HIGH, LOW
from vidgpt.pixel_evaluation import ShownFuture
from vidgpt.pixel_report import CEILING, MODEL, PixelReport
from vidgpt.report import Clip
from vidtok.card import Card
from vidtok.page_parts import Cell, Figure, Measured, Table, difference_frames
from vidtok.video import to_frames
from vidtok.video_metrics.table import FLOOR, REAL

DIFFERENCE_GAIN = 4
# What a token does, and the colour of its square: in blue what is right, in red and amber what is not.
STILL, MOVED, MISSED, INVENTED = (226, 232, 240), (37, 99, 235), (220, 38, 38), (245, 158, 11)
GIVEN_MOVED = (100, 116, 139)
LEGEND = {
    "token changes, rightly predicted": MOVED,
    "changes, wrongly predicted": MISSED,
    "should not change": INVENTED,
}
CURVES = {
    "psnr_db": ("PSNR (dB)", "PSNR of predicted frames"),
    "ssim": ("SSIM", "SSIM of predicted frames"),
    "dtssd_grey_levels_of_255": ("dtSSD (grey levels of 255)", "Wrong changes from frame to frame"),
    "flicker_second_difference_grey_levels_of_255": ("second difference (of 255)", "Flicker, beside the real clips' own"),
}
PIXEL_PICTURES = tuple(f"pixels_{name}_by_horizon.png" for name in CURVES)
FIDELITY = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "vmaf": "VMAF",
    "mse_sum_over_pixels_moving_mnist": "MSE, frame sum",
    "mae_sum_over_pixels_moving_mnist": "MAE, frame sum",
    "dtssd_grey_levels_of_255": "dtSSD",
    "psnr_db_moving_pixels": "PSNR, moving pixels",
}
MOTION = {
    "motion_lucas_kanade_pixels_per_frame": "motion, pixels a frame",
    "motion_lucas_kanade_pixels_per_frame_ratio_to_real": "ratio to real",
    "flicker_second_difference_grey_levels_of_255": "flicker",
    "flicker_second_difference_grey_levels_of_255_ratio_to_real": "ratio to real",
    "flicker_static_above_source_grey_levels_of_255": "still flicker above real",
    "warping_error_lucas_kanade_mse": "warping error",
    "fie_smooth_linear_grey_levels_of_255": "interpolation error, linear",
    "fie_smooth_lucas_kanade_grey_levels_of_255": "interpolation error, flow",
    "psnr_db_drift_slope_per_frame": "PSNR drift, dB a frame",
    "psnr_db_half_life_frames": "PSNR half-life, frames",
}


def pixel_headline(pixels: PixelReport) -> list[str]:
    """Give the line that a person wants to read first, and why a distance is missing."""
    protocol = pixels.protocol
    shown = _measured(pixels.summary[MODEL], _key(pixels, MODEL, "psnr_db"))
    psnr = f"{shown.value} dB ({shown.interval})" if isinstance(shown, Measured) else f"{shown} dB"
    samples = f", mean of {protocol['samples_count']} samples" if protocol["samples_count"] > 1 else ""
    ceiling = "" if protocol["reference"] == RECONSTRUCTION else f", tokenizer's ceiling {pixels.summary[CEILING]['psnr_db']:.2f}"
    reference = "the tokenizer's reconstruction" if _is_reconstruction(pixels) else "the source frames"
    lines = [
        f"free-running in pixels, {protocol['clips_count']} clips of {protocol['future_frames_count']} future frames against {reference}: "
        f"PSNR {psnr}{samples}; copy-last-frame {pixels.summary[FLOOR]['psnr_db']:.2f}{ceiling}"
    ]
    missing = {value for key, value in pixels.summary[MODEL].items() if key.endswith("_missing_because")}
    return [*lines, *sorted(missing)]


def pixel_figures(pixels: PixelReport, folder: Path) -> list[Figure]:
    """Draw figures by horizon, with bands of their intervals, as PNG files in folder."""
    figures = []
    for (figure, (label, title)), file in zip(CURVES.items(), PIXEL_PICTURES, strict=True):
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in pixels.by_horizon:
            rows.setdefault(row["forecaster"], []).append(row)
        # A perfect ceiling would flatten the others.
        left_out = [CEILING] if _is_reconstruction(pixels) else []
        names = {name: _key(pixels, name, figure) for name in pixels.rows if name not in left_out}
        known = {name: key for name, key in names.items() if any(row.get(key) is not None for row in rows[name])}
        if len(known) > 1:
            path = plots.plot_pixels_by_horizon(rows, known, folder / file, title=title, y_label=label)
            figures.append(Figure(path, f"{title}: mean over clips, bands of 95 % intervals"))
    return figures


def pixel_tables(pixels: PixelReport) -> list[Table]:
    """Give fidelity and motion of every row, a column a figure; of several samples their mean and their best."""
    against = "what the tokenizer makes of the real tokens" if _is_reconstruction(pixels) else "the source frames"
    episodes = len(set(pixels.episodes))
    intervals = f"with 95 % intervals over {episodes} episodes" if episodes > 1 else "of one episode, and so without intervals"
    mean = f"each future frame, then the mean over clips, {intervals}"
    left_out = "" if pixels.table.is_flow else "; what needs optical flow is left out (optical_flow=false)"
    tables = [
        _table(
            f"Pixels: predicted frames against {against}; {mean}", pixels, FIDELITY, [row for row in pixels.rows if row != REAL]
        ),
        _table(
            f"Pixels: motion and what changes with the horizon; good is what is like the real clips{left_out}",
            pixels,
            MOTION,
            pixels.rows,
        ),
    ]
    names = [f"{meter.detector.figure}_distance" for meter in pixels.distances]
    if names:
        header = ["", *(name.replace("_", " ") for name in names), "real clips", "generated clips", "frames"]
        rows: list[list[Cell]] = []
        for row in pixels.rows[:-1]:
            card = pixels.distances[0].card(row)
            values = [pixels.summary[row][name] for name in names]
            rows.append([row.replace("_", " "), *map(_rounded, values), card.num_real, card.num_generated, card.frames])
        title = "Fréchet distances of whole futures; the proxy is no FVD, and only like protocols compare"
        biased = [
            meter.detector.figure
            for meter in pixels.distances
            if any(meter.card(row).is_covariance_singular for row in pixels.rows[:-1])
        ]
        if biased:
            title += f"; biased upwards by no more clips than features: {', '.join(biased)}"
        tables.append(Table(title, header, rows))
    return tables


def shown_clips(shown: Sequence[ShownFuture], pixels: PixelReport, card: Card) -> list[Clip]:
    """Give the clips in motion: real, predicted, their difference, the tokens, and the ceiling where it is not the reference."""
    clips = []
    for clip in shown:
        real, predicted, ceiling = (to_frames(clip.videos[name]) for name in ("real", "predicted", CEILING))
        is_reconstruction = _is_reconstruction(pixels)
        rows = {
            "real tokens, decoded" if is_reconstruction else "real": real,
            "predicted": predicted,
            f"difference × {DIFFERENCE_GAIN}": difference_frames(predicted, real, DIFFERENCE_GAIN),
            "tokens": token_frames(clip.real, clip.predicted, clip.context, card, len(real)),
            **({} if is_reconstruction else {"tokenizer's ceiling": ceiling}),
        }
        clips.append(Clip(rows, len(real) - clip.future_frames, clip.title))
    return clips


def token_frames(real: Tensor, predicted: Tensor, context: int, card: Card, frames: int) -> np.ndarray:
    """Draw what every token of a clip (t, h, w) does as frames uint8 (frames, H, W, 3): see LEGEND; given ones turn grey."""
    # The first frame of a window has none before it here, and shows no change.
    before = np.concatenate([real[:1], real[:-1]])
    ids, made = real.numpy(), predicted.numpy()
    moves, is_right = ids != before, ids == made
    squares = np.empty((*ids.shape, 3), np.uint8)
    squares[:] = STILL
    squares[moves & is_right], squares[moves & ~is_right], squares[~moves & ~is_right] = MOVED, MISSED, INVENTED
    squares[:context] = np.where(moves[:context, ..., None], np.array(GIVEN_MOVED, np.uint8), np.array(STILL, np.uint8))
    large = repeat(squares, "t h w C -> (t s) (h y) (w x) C", s=card.stride_t, y=card.stride_s, x=card.stride_s)
    # Where a clip has fewer frames than its latent ones stand for, its first latent frame stands for fewer.
    return large[-frames:, : card.frame_height, : card.frame_width]


def legend() -> dict[str, str]:
    """Give the colours of token_frames for the page."""
    return {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in LEGEND.items()}


def _is_reconstruction(pixels: PixelReport) -> bool:
    return pixels.protocol["reference"] == RECONSTRUCTION


def _key(pixels: PixelReport, row: str, figure: str, kind: str = "mean") -> str:
    """Give the name that a figure has in a row, which says so where it is taken of several samples."""
    samples = pixels.protocol["samples_count"]
    several = f"{figure}_{kind}_of_{samples}"
    # What is of all samples together is no figure of the best one.
    is_several = row == MODEL and samples > 1 and (kind == "best" or several in pixels.summary[row])
    return several if is_several else figure


def _table(title: str, pixels: PixelReport, columns: Mapping[str, str], names: Sequence[str]) -> Table:
    """Give a row a forecaster, of several samples one for their mean and one for the best of them."""
    samples = pixels.protocol["samples_count"]
    kinds = [(name, kind) for name in names for kind in (("mean", "best") if name == MODEL and samples > 1 else ("mean",))]
    known = {_found(pixels, figure): label for figure, label in columns.items() if _found(pixels, figure)}
    rows: list[list[Cell]] = []
    for name, kind in kinds:
        if kind == "best" and not any(_key(pixels, name, figure, kind) in pixels.summary[name] for figure in known):
            continue
        label = name.replace("_", " ") + (f", {kind} of {samples}" if name == MODEL and samples > 1 else "")
        figures = pixels.summary[name]
        rows.append([label, *(_measured(figures, _key(pixels, name, figure, kind)) for figure in known)])
    return Table(title, ["", *known.values()], rows)


def _found(pixels: PixelReport, figure: str) -> str:
    """Give the whole name of a figure whose own ends in the network or the scales that were used; "" where it was not measured."""
    names = [
        name
        for name in pixels.summary[FLOOR]
        if name == figure or (figure in ("ms_ssim", "lpips") and name.startswith(f"{figure}_"))
    ]
    return next((name for name in names if not name.endswith((LOW, HIGH))), "")


def _measured(figures: Mapping[str, Any], name: str) -> Cell:
    """Show a figure with its interval."""
    value, low, high = (figures.get(name + end) for end in ("", LOW, HIGH))
    if value is None or isinstance(value, int):
        return value
    if low is None or high is None or low == high:
        return _short(value)
    return Measured(_short(value), f"{_short(low)} – {_short(high)}")


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)

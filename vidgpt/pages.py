"""What was measured, as figures, tables and one page: for an evaluation by itself and for the demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vidgpt import plots
from vidgpt.evaluation import TokenReport
from vidgpt.options import DemoOptions
from vidgpt.pixels import PixelReport
from vidgpt.report import Clip, Report, write_report
from vidtok.card import Card
from vidtok.page_parts import Cell, Figure, Table, difference_frames, make_receipt
from vidtok.video import to_frames

COLUMNS = {
    "cross_entropy_nats_per_token": "nats a token",
    "cross_entropy_bits_per_token": "bits a token",
    "cross_entropy_bits_per_frame": "bits a frame",
    "perplexity_tokens": "perplexity",
    "top1_accuracy_fraction": "top-1",
    "top5_accuracy_fraction": "top-5",
    "top1_accuracy_on_changed_tokens_fraction": "top-1, changed tokens",
}


def write_evaluation_report(
    tokens: TokenReport, folder: Path, title: str, receipt: Mapping[str, Any], left_out: str = ""
) -> Path:
    """Draw the curves of a token evaluation into folder and write report.html there; gives its path. left_out: what was not measured."""
    forced = tokens.teacher_forced["model"].summary()
    summary = (
        f"{tokens.clips} clips, teacher-forced: {forced['cross_entropy_nats_per_token']:.3f} nats a token, "
        f"top-1 accuracy {forced['top1_accuracy_fraction']:.3f}" + (f"; {left_out}." if left_out else ".")
    )
    report = Report(
        title, summary, figures=token_figures(tokens, folder), tables=token_tables(tokens), receipt=make_receipt(receipt)
    )
    return write_report(report, folder / "report.html")


def write_demo_report(
    run_dir: Path,
    options: DemoOptions,
    tokens: TokenReport,
    pixels: PixelReport,
    seconds: Mapping[str, float],
    config: Mapping[str, Any],
) -> Path:
    """Write run_dir/report.html with clips, curves and numbers of the whole job; gives its path."""
    folder = Path(options.evaluation.output)
    future = len(pixels.psnr_db["prediction"])
    gain = pixels.gain_db(min(4, future), future)
    summary = (
        f"{options.data.get('game', options.data['name'])}: {future} frames predicted from {options.context} held-out ones, greedily, "
        f"{gain:+.2f} dB PSNR over copying the last frame (mean of horizons {min(4, future)} to {future})."
    )
    figures = [
        Figure(
            plots.plot_psnr_by_horizon(pixels.psnr_db, folder / "psnr_by_horizon.png"),
            "PSNR of predicted frames, mean over clips",
        ),
        *token_figures(tokens, folder),
        *_losses(options, folder),
    ]
    tables = [_psnr_table(pixels), *token_tables(tokens), _time_table(seconds)]
    card = Card.load(options.encoding.output)
    title = "From video to tokens to predicted frames"
    report = Report(title, summary, _clips(pixels, options), figures, tables, make_receipt(config), fps=min(8.0, card.fps))
    return write_report(report, run_dir / "report.html")


def headline(tokens: TokenReport) -> list[str]:
    """Give the lines a person wants to read first, with a warning where copying does better."""
    forced = {name: meter.summary() for name, meter in tokens.teacher_forced.items()}
    changed = {name: figures["top1_accuracy_on_changed_tokens_fraction"] or 0.0 for name, figures in forced.items()}
    nats = {name: float(figures["cross_entropy_nats_per_token"] or 0.0) for name, figures in forced.items()}
    unigram = f"per-position unigram {changed['unigram_by_position']:.3f}, " if "unigram_by_position" in changed else ""
    lines = [
        f"teacher-forced: {nats['model']:.3f} nats a token (copy-last-frame {nats['copy_last_frame_smoothed']:.3f}), accuracy on changed "
        f"tokens {changed['model']:.3f} ({unigram}copy-last-frame 0)"
    ]
    if nats["model"] > min(value for name, value in nats.items() if name != "model"):
        lines.append("the model is not better than its baselines yet: train longer before you trust its pictures")
    return lines


def token_figures(tokens: TokenReport, folder: Path) -> list[Figure]:
    """Draw the curves of a token evaluation as PNG files in folder."""
    figures = []
    if tokens.free_running is not None:
        figures = [
            Figure(
                plots.plot_accuracy_by_horizon(tokens, folder / "accuracy_by_horizon.png"),
                "Free-running, from the given frames on",
            ),
            Figure(
                plots.plot_changes_by_horizon(tokens, folder / "changes_by_horizon.png"),
                "Does the prediction move as much as the world?",
            ),
        ]
    return [
        *figures,
        Figure(
            plots.plot_accuracy_by_frame(tokens, folder / "accuracy_by_frame.png"), "Every token given all true ones before it"
        ),
        Figure(
            plots.plot_accuracy_by_position(tokens, folder / "accuracy_by_position.png"),
            "Where in the frame tokens are predicted",
        ),
    ]


def token_tables(tokens: TokenReport) -> list[Table]:
    """Give the teacher-forced figures beside the baselines, and the free-running ones."""
    rows = []
    for name, meter in tokens.teacher_forced.items():
        figures = meter.summary()
        rows.append([name.replace("_", " "), *(_rounded(figures[key]) for key in COLUMNS)])
    tables = [Table("Teacher-forced, held-out clips", ["", *COLUMNS.values()], rows), *_digit_tables(tokens)]
    if tokens.free_running is not None:
        summary = tokens.free_running.summary()
        names = [[key.replace("_", " "), _rounded(value)] for key, value in summary.items()]
        tables.append(Table(f"Free-running from {tokens.context} given frames", ["", "value"], names))
    return tables


def _digit_tables(tokens: TokenReport) -> list[Table]:
    """Give the figures of each digit, where ids have several."""
    model = tokens.teacher_forced["model"]
    keys = [f"{digit}_{field}" for digit in model.digits for field in ("cross_entropy_nats_per_token", "top1_accuracy_fraction")]
    names = [f"digit {index}, {unit}" for index in range(len(model.digits)) for unit in ("nats", "top-1")]
    rows = [
        [name.replace("_", " "), *(_rounded(figures[key]) for key in keys)]
        for name, figures in ((name, meter.summary()) for name, meter in tokens.teacher_forced.items())
    ]
    return [Table("Teacher-forced, digit by digit, coarsest first", ["", *names], rows)] if keys else []


def _psnr_table(pixels: PixelReport) -> Table:
    future = len(pixels.psnr_db["prediction"])
    horizons = [horizon for horizon in (1, 2, 4, 8, 12, 16, 24, 32) if horizon <= future]
    rows: list[list[Cell]] = [
        [name.replace("_", " "), *(round(curve[h - 1], 2) for h in horizons)] for name, curve in pixels.psnr_db.items()
    ]
    return Table(
        "PSNR in dB by horizon: each frame's value, then the mean over clips", ["", *(f"frame {h}" for h in horizons)], rows
    )


def _time_table(seconds: Mapping[str, float]) -> Table:
    return Table("Time", ["stage", "minutes"], [[title, round(value / 60, 2)] for title, value in seconds.items()])


def _clips(pixels: PixelReport, options: DemoOptions) -> list[Clip]:
    chosen = np.linspace(0, len(pixels.real) - 1, min(options.shown_clips, len(pixels.real))).round().astype(int)
    clips = []
    for index in chosen:
        real, predicted, ceiling = (to_frames(video[index]) for video in (pixels.real, pixels.predicted, pixels.ceiling))
        rows = {
            "real": real,
            "predicted": predicted,
            "difference": difference_frames(predicted, real),
            "tokenizer ceiling": ceiling,
        }
        clips.append(Clip(rows, options.context, f"held-out clip {index + 1} of {len(pixels.real)}"))
    return clips


def _losses(options: DemoOptions, folder: Path) -> list[Figure]:
    runs = {
        "tokenizer": (options.tokenizer_training.run_dir, "weighted error"),
        "transformer": (options.gpt_training.run_dir, "nats per token"),
    }
    return [
        Figure(
            plots.plot_losses(Path(run) / "metrics.jsonl", folder / f"loss_{name}.png", title=f"Loss of the {name}", y_label=unit)
        )
        for name, (run, unit) in runs.items()
    ]


def _rounded(value: float | int | None) -> float | int | None:
    return round(value, 4) if isinstance(value, float) else value

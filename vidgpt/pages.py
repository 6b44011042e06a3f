"""What was measured, as figures, tables and one page: for an evaluation by itself and for the demo."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidgpt import plots
from vidgpt.metrics import CALIBRATION, HIGH, LOW, Figures
from vidgpt.options import DemoOptions
from vidgpt.pixel_pages import legend, pixel_figures, pixel_headline, pixel_tables
from vidgpt.pixel_report import PixelReport
from vidgpt.pixels import HeldOutReport
from vidgpt.report import Clip, Report, write_report
from vidgpt.token_report import TRUE_LAW, TokenReport
from vidtok.card import Card
from vidtok.page_parts import Cell, Figure, Table, difference_frames, make_receipt
from vidtok.video import to_frames

COLUMNS = {
    "cross_entropy_nats_per_token": "nats a token",
    "cross_entropy_bits_per_token": "bits a token",
    "cross_entropy_bits_per_frame": "bits a frame",
    "cross_entropy_bits_per_pixel": "bits a pixel",
    "perplexity_tokens": "perplexity",
    "top1_accuracy_fraction": "top-1",
    "top5_accuracy_fraction": "top-5",
    "top1_accuracy_on_changed_tokens_fraction": "top-1, changed tokens",
    CALIBRATION: "calibration error",
    "gap_nats_per_token": "nats above the true law",
}
FASTEST_SHOWN = 8.0  # frames a second
ROLLOUT_COLUMNS = {
    "top1_accuracy_fraction": "accuracy",
    "top1_accuracy_on_changed_tokens_fraction": "accuracy, changed tokens",
    "changed_tokens_generated_fraction": "tokens that change",
    "changed_tokens_real_fraction": "in reality",
    "frame_entropy_generated_bits": "bits, entropy of a frame's ids",
    "frame_entropy_real_bits": "in reality, bits",
}


def write_evaluation_report(
    tokens: TokenReport,
    folder: Path,
    title: str,
    receipt: Mapping[str, Any],
    left_out: str = "",
    pixels: PixelReport | None = None,
    clips: Sequence[Clip] = (),
    fps: float = 8.0,
) -> Path:
    """Draw the curves of an evaluation into folder and write report.html there; gives its path.

    receipt: what was measured on what, with the configuration under "config". left_out: what was not measured. pixels, clips: of
    pixels=true; fps: of the clips.
    """
    forced = tokens.teacher_forced["model"].summary()
    warning, note = tokens.monitor.warning() if tokens.monitor is not None else None, tokens.interval_note()
    summary = (
        f"{tokens.clips} clips of {tokens.teacher_forced['model'].sums.num_episodes} episodes, teacher-forced: "
        f"{forced['cross_entropy_nats_per_token']:.3f} nats a token, "
        f"top-1 accuracy {forced['top1_accuracy_fraction']:.3f}"
        + (f"; {left_out}." if left_out else ".")
        + (f" Warning: {warning}." if warning else "")
        + (f" {note[0].upper()}{note[1:]}." if note else "")
    )
    figures, tables = token_figures(tokens, folder), token_tables(tokens)
    if pixels is not None:
        first = pixel_headline(pixels)[0]
        summary = f"{first[0].upper()}{first[1:]}. {summary}"
        figures, tables = [*pixel_figures(pixels, folder), *figures], [*pixel_tables(pixels), *tables]
    about = {key: value for key, value in receipt.items() if key != "config"}
    made = make_receipt(receipt["config"]) | about
    report = Report(title, summary, clips, figures, tables, made, min(FASTEST_SHOWN, fps), legend() if clips else {})
    return write_report(report, folder / "report.html")


def write_demo_report(
    run_dir: Path,
    options: DemoOptions,
    tokens: TokenReport,
    pixels: HeldOutReport,
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
    report = Report(
        title, summary, _clips(pixels, options), figures, tables, make_receipt(config), fps=min(FASTEST_SHOWN, card.fps)
    )
    return write_report(report, run_dir / "report.html")


def headline(tokens: TokenReport) -> list[str]:
    """Give the lines a person wants to read first, with a warning where copying does better."""
    forced = {name: meter.summary() for name, meter in tokens.teacher_forced.items()}
    changed = {name: figures["top1_accuracy_on_changed_tokens_fraction"] or 0.0 for name, figures in forced.items()}
    nats = {name: float(figures["cross_entropy_nats_per_token"] or 0.0) for name, figures in forced.items() if name != TRUE_LAW}
    unigram = f"per-position unigram {changed['unigram_by_position']:.3f}, " if "unigram_by_position" in changed else ""
    lines = [
        f"teacher-forced: {nats['model']:.3f} nats a token (copy-last-frame {nats['copy_last_frame_smoothed']:.3f}), accuracy on changed "
        f"tokens {changed['model']:.3f} ({unigram}copy-last-frame 0)"
    ]
    if nats["model"] > min(value for name, value in nats.items() if name != "model"):
        lines.append("the model is not better than its baselines yet: train longer before you trust its pictures")
    if tokens.temporally_teacher_forced:
        own = tokens.temporally_teacher_forced["model"].summary()
        lines.append(
            f"temporally teacher-forced: {own['cross_entropy_nats_per_token']:.3f} nats a token, accuracy on changed tokens "
            f"{own['top1_accuracy_on_changed_tokens_fraction'] or 0.0:.3f}"
        )
    return [
        *lines,
        *_gap_lines(tokens),
        *([tokens.monitor.warning() or ""] if tokens.monitor and tokens.monitor.warning() else []),
        *([tokens.interval_note()] if tokens.interval_note() else []),
    ]


def _gap_lines(tokens: TokenReport) -> list[str]:
    """Say how far the model is from a perfect one, where that is known, and what is wrong where it is better than that."""
    gaps = tokens.gaps().get("model", {})
    value, low, high = (gaps.get(f"gap_nats_per_token{end}") for end in ("", LOW, HIGH))
    if value is None:
        return []
    bounds = "" if low is None else f" ({low:.4f} to {high:.4f})"
    lines = [f"gap to a perfect model: {value:.4f}{bounds} nats a token"]
    # Rounding alone may put a perfect model below the law by a few millionths.
    if high is not None and high < -1e-4:
        lines.append(
            "no model can be better than the law that made the clips: it sees what it predicts, or the clips are of another world"
        )
    return lines


def token_figures(tokens: TokenReport, folder: Path) -> list[Figure]:
    """Draw the curves of a token evaluation as PNG files in folder."""
    figures = []
    if tokens.free_running:
        figures = [
            Figure(
                plots.plot_accuracy_by_horizon(tokens, folder / "accuracy_by_horizon.png"),
                "Free-running, from the given frames on",
            ),
            Figure(
                plots.plot_changes_by_horizon(tokens, folder / "changes_by_horizon.png"),
                "Does the prediction move as much as the world?",
            ),
            Figure(
                plots.plot_changes_by_position(tokens, folder / "changes_by_position.png"),
                "Where in the frame tokens change, and where predictions are wrong",
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
    """Give the figures of each regime, the model's beside those of every baseline."""
    gaps = tokens.gaps()
    forced = {name: meter.summary() | gaps.get(name, {}) for name, meter in tokens.teacher_forced.items()}
    temporally = {name: meter.summary() for name, meter in tokens.temporally_teacher_forced.items()}
    rollouts = {name: meter.summary() for name, meter in tokens.free_running.items()}
    tables = [
        _forecaster_table("Teacher-forced: every token given all real ones before it", forced, COLUMNS),
        *_digit_tables(tokens),
    ]
    if temporally:
        title = "Temporally teacher-forced: every frame given the real ones before it, and its own tokens inside"
        tables.append(_forecaster_table(title, temporally, COLUMNS))
    if tokens.challenge is not None:
        rows: list[list[Cell]] = [[name.replace("_", " "), str(value)] for name, value in tokens.challenge.items()]
        tables.append(Table("1X world model challenge", ["", "value"], rows))
    if rollouts:
        title = f"Free-running from {tokens.context} given frames: everything behind them is the forecaster's own"
        tables.append(_forecaster_table(title, rollouts, ROLLOUT_COLUMNS))
    return tables


def _forecaster_table(title: str, figures: Mapping[str, Figures], columns: Mapping[str, str]) -> Table:
    """Give a row a forecaster and a column a figure that at least one of them has."""
    known = [key for key in columns if any(row.get(key) is not None for row in figures.values())]
    rows: list[list[Cell]] = [
        [name.replace("_", " "), *(_rounded(row.get(key)) for key in known)] for name, row in figures.items()
    ]
    return Table(title, ["", *(columns[key] for key in known)], rows)


def _digit_tables(tokens: TokenReport) -> list[Table]:
    """Give the figures of each digit, where ids have several."""
    model = tokens.teacher_forced["model"]
    keys = [f"{digit}_{field}" for digit in model.digits for field in ("cross_entropy_nats_per_token", "top1_accuracy_fraction")]
    names = [f"digit {index}, {unit}" for index in range(len(model.digits)) for unit in ("nats", "top-1")]
    forced = {name: meter.summary() for name, meter in tokens.teacher_forced.items()}
    title = "Teacher-forced, digit by digit, coarsest first"
    return [_forecaster_table(title, forced, dict(zip(keys, names, strict=True)))] if keys else []


def _psnr_table(pixels: HeldOutReport) -> Table:
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


def _clips(pixels: HeldOutReport, options: DemoOptions) -> list[Clip]:
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

"""The page of a tokenizer's health report: verdicts with their rules, the worst clips in motion, curves and every number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from torch import Tensor

from vidtok.health.measures import ClipFigures
from vidtok.health.verdicts import Verdict, overall
from vidtok.page_parts import (
    Cell,
    Figure,
    Table,
    figure_card,
    make_receipt,
    panel_width,
    panels,
    receipt_section,
    section,
    table_card,
)
from vidtok.plots import DARK, LIGHT, Curve, Theme, plot_curves

ACCENTS = {LIGHT: ("#2563eb", "#be185d", "#059669", "#d97706"), DARK: ("#7aa7ff", "#f472b6", "#34d399", "#fbbf24")}
SYMBOLS = {"good": "✓", "look at this": "!", "broken": "✗", "not measured": "–"}
MOST_POINTS = 200
PLOTS = ("psnr_by_frame", "ssim_by_frame", "psnr_by_clip", "code_usage")
PAPERS = ((LIGHT, ""), (DARK, "_dark"))  # with the end of a file's name
LEAST_SPANS = {"dB": 3.0, "SSIM": 0.1}
FACTS = {
    "bits_per_pixel_raw": "bits a pixel",
    "ids_per_second": "ids a second",
    "latent_values_per_pixel": "latent values a pixel",
    "encode_median_frames_per_second": "frames/s encoded",
    "decode_median_frames_per_second": "frames/s decoded",
    "peak_tensors_mebibytes": "MiB of tensors",
    "parameters": "parameters",
}
GROUPS = {  # the first that fits takes a figure
    "Fidelity": ("psnr", "ssim"),
    "Clips": ("clip", "frame", "split"),
    "Time": ("flicker", "static", "changed"),
    "Codes": ("codebook", "codes", "latent", "raw", "entropy"),
    "Rate": ("ids", "bits", "compression"),
    "Cuts": ("seam", "chunk", "tile"),
    "Cost": ("encode", "decode", "peak", "timed", "device", "parameters"),
    "Other": ("",),
}
WORDS = {
    "Worst tenth": "the mean over the tenth of the clips with the lowest PSNR, at least one clip.",
    "PSNR lost from early to late frames": "mean of the first half of the latent frames minus that of the second half, without the "
    "first latent frame, which some tokenizers code alone and better.",
    "Static pixel": "no colour changes by more than 2 of 255 from one source frame to the next. The others are moving pixels; their "
    "PSNR is of their pooled error, so that small things that vanish show.",
    "Flicker": "mean of |step of the reconstruction - step of the source| over static pixels and colours, in levels of 255. A "
    "reconstruction that freezes the source's own noise has that noise as its flicker, which is the source's figure.",
    "Static place": "no pixel of a token's patch changes by more than 2 of 255 over the frames of two successive latent frames.",
    "Codes that so many tokens can reach": "the mean number of different codes that so many uniform draws would hit.",
    "Entropy-coded": "each codebook's unigram entropy instead of log2 of its size; measured on these clips alone.",
    "Seam": "largest pixel difference between the reconstruction in chunks (or tiles) and whole, in [-1, 1]. A tokenizer that carries "
    "its state over decodes the same ids both ways; one that cannot is given every chunk as a clip of its own.",
    "Frames a second": "median of repeated passes over one batch, after one that warms up; peak tensors are the most that one such pass "
    "holds at a time beside weights and clips.",
}


@dataclass(frozen=True)
class Health:
    """What was measured and what follows from it."""

    title: str
    about: str  # which clips
    figures: Mapping[str, Any]  # metrics.json
    verdicts: list[Verdict]
    usage: list[Tensor]  # of every codebook: counts of its entries, most used first
    clips: list[ClipFigures]


@dataclass(frozen=True)
class ShownClip:
    """Pictures of one clip, name -> uint8 (T, H, W, 3)."""

    kind: str  # worst, typical
    caption: str
    rows: Mapping[str, np.ndarray]


def write_health_page(
    health: Health, shown: Sequence[ShownClip], fps: float, config: Mapping[str, Any], folder: str | Path
) -> Path:
    """Draw the curves into folder/figures and write folder/report.html, which stands alone; gives its path. fps: of moving pictures."""
    folder = Path(folder)
    figures = [*_draw(health, folder / "figures")]
    page = Template(files("vidtok.health").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(health.title),
        summary=escape(f"{health.about}: {overall(health.verdicts)}."),
        facts=_facts(health.figures),
        verdicts="".join(map(_verdict, health.verdicts)),
        clips="".join(_clips(kind, shown, fps) for kind in ("worst", "typical")),
        figures=section("Curves", "".join(map(figure_card, figures)), "figures"),
        tables=section("Numbers", "".join(map(table_card, _tables(health.figures))), "tables"),
        words="".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in WORDS.items()),
        receipt=receipt_section(make_receipt(config)),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _facts(figures: Mapping[str, Any]) -> str:
    """Give the few numbers that have no verdict."""
    known = [(name, figures[key]) for key, name in FACTS.items() if figures.get(key) is not None]
    return "".join(f"<div><b>{_short(value)}</b><span>{escape(name)}</span></div>" for name, value in known)


def _short(value: float) -> str:
    """Write a number in about three digits."""
    for unit, size in (("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e6 if unit == 'M' else 1e3):.3g} {unit}"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _verdict(verdict: Verdict) -> str:
    """Give one line: badge, name, value, rule, and what to do where something is to be done."""
    rule, kind = verdict.rule, verdict.status.split()[0]
    is_bad = verdict.status in ("look at this", "broken")
    advice = f'<p class="advice">{escape(verdict.advice)}</p>' if is_bad else ""
    return (
        f'<div class="verdict {kind}"><b class="name">{escape(rule.title)}</b><b class="value">{escape(rule.show(verdict.value))}</b>'
        f'<span class="badge"><i>{SYMBOLS[verdict.status]}</i>{verdict.status}</span>'
        f'<span class="rule">{escape(rule.words())}</span>{advice}</div>'
    )


def _clips(kind: str, shown: Sequence[ShownClip], fps: float) -> str:
    """Give the clips of one kind."""
    chosen = [clip for clip in shown if clip.kind == kind]
    pause = '<div class="bar"><label for="pause"></label></div>' if chosen and chosen[0] is shown[0] else ""
    return section(f"{kind.capitalize()} clips", pause + "".join(_clip(clip, fps) for clip in chosen))


def _clip(clip: ShownClip, fps: float) -> str:
    frames, _, width, _ = next(iter(clip.rows.values())).shape
    style = f"--count: {len(clip.rows)}; --width: {panel_width(width)}px; --frames: {frames}; --seconds: {frames / fps:.4f}s"
    return (
        f'<div class="card clip" style="{style}"><p class="caption">{escape(clip.caption)}</p>'
        f'<div class="panels">{panels(clip.rows)}</div></div>'
    )


def _draw(health: Health, folder: Path) -> Iterator[Figure]:
    """Draw every curve on light and on dark paper."""
    plots = {
        "psnr_by_frame": (_by_frame("psnr_db_by_frame_index", health), "PSNR by frame of the clip", "frame", "dB",
                          "Mean over clips. A line that falls says that errors add up over time."),
        "ssim_by_frame": (_by_frame("ssim_by_frame_index", health), "SSIM by frame of the clip", "frame", "SSIM",
                          "Mean over clips."),
        "psnr_by_clip": (_by_clip(health), "PSNR of every clip, worst first", "clips", "dB",
                         "A steep left end says that some content is coded much worse than the rest."),
        "code_usage": (_usage(health), "How often each code is used", "codes, most used first", "share of tokens",
                       "Both axes are logarithmic. Where the line ends left of the dashed one, the rest is dead."),
    }  # fmt: skip
    for name, (curves, title, x_label, y_label, caption) in plots.items():
        if not curves:
            continue
        paths = {}
        for theme, suffix in PAPERS:
            paths[theme] = plot_curves(
                folder / f"{name}{suffix}.png", _coloured(curves, theme), title=title, x_label=x_label, y_label=y_label,
                theme=theme, is_log=name == "code_usage", least_span=LEAST_SPANS.get(y_label, 0.0),
            )  # fmt: skip
        yield Figure(paths[LIGHT], caption, paths[DARK])


def _coloured(curves: Sequence[Curve], theme: Theme) -> list[Curve]:
    """Give every solid curve an accent of the paper."""
    accents = ACCENTS[theme]
    return [
        Curve(curve.name, curve.x, curve.y, "" if curve.is_dashed else accents[place % len(accents)], curve.is_dashed)
        for place, curve in enumerate(curves)
    ]


def _by_frame(key: str, health: Health) -> list[Curve]:
    values = health.figures.get(key)
    return [Curve("mean of clips", range(len(values)), values)] if values else []


def _by_clip(health: Health) -> list[Curve]:
    values = sorted(clip.psnr_db for clip in health.clips)
    return [Curve("clips", range(1, len(values) + 1), values)] if len(values) > 1 else []


def _usage(health: Health) -> list[Curve]:
    """Give every codebook's sorted usage beside even use of all its codes."""
    curves = []
    for place, counts in enumerate(health.usage):
        ranks = np.unique(np.geomspace(1, int((counts > 0).sum()), MOST_POINTS).round().astype(int))
        shares = counts.double() / counts.sum()
        name = "used" if len(health.usage) == 1 else f"codebook {place}"
        curves.append(Curve(name, ranks.tolist(), shares[ranks - 1].tolist()))
    size = max((len(counts) for counts in health.usage), default=1)
    return [*curves, Curve("even use", [1, size], [1 / size] * 2, is_dashed=True)] if size > 1 else []


def _tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    """Give every number of metrics.json under the words of its key; lists are curves."""
    left = {key: value for key, value in figures.items() if not isinstance(value, list)}
    for caption, prefixes in GROUPS.items():
        rows: list[Sequence[Cell]] = [(key.replace("_", " "), left.pop(key)) for key in list(left) if key.startswith(prefixes)]
        if rows:
            yield Table(caption, ("", ""), rows)

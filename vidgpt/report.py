"""One self-contained HTML page that shows what a model does, and the film strip picture.

The page needs no network, no other file and no script. A moving picture is a column of its frames in one image, moved by a CSS
animation: unlike separate animated images, all of them keep in step, with each other and with the badge "given" or "predicted".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from vidtok.page_parts import Figure, Table, figure_card, panel_width, panels, receipt_section, section, table_card

GIVEN_COLOUR, PREDICTED_COLOUR = (217, 119, 6), (37, 99, 235)
STRIP_PANEL, STRIP_FRAMES, STRIP_GAP, STRIP_HEADER = 96, 12, 12, 28  # pixels, frames a line, pixels, pixels
STRIP_INK = (51, 65, 85)


@dataclass(frozen=True)
class Clip:
    """Moving pictures side by side, in step."""

    rows: Mapping[str, np.ndarray]  # name -> uint8 (T, H, W, 3), of one T
    context: int  # how many of the T frames were given
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a page shows."""

    title: str
    summary: str  # one sentence
    clips: Sequence[Clip] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    receipt: Mapping[str, Any] = field(default_factory=dict)  # versions, seeds, config; may be nested
    fps: float = 8.0  # of the moving pictures


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page; gives its path. Raises ValueError on clips whose frames do not fit together."""
    if not report.fps > 0:
        raise ValueError(f"got {report.fps} frames a second; it must be above 0: use the rate of the clips, or a slower one")
    for clip in report.clips:
        check_rows(clip.rows, clip.context, is_one_length=True)
    page = Template(files("vidgpt").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(report.title),
        summary=escape(report.summary),
        clips=_clips(report),
        figures=section("Curves", "".join(map(figure_card, report.figures)), "figures"),
        tables=section("Numbers", "".join(map(table_card, report.tables))),
        receipt=receipt_section(report.receipt),
        keyframes=_keyframes(report.clips),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def check_rows(rows: Mapping[str, np.ndarray], context: int, is_one_length: bool = False) -> None:
    """Raise ValueError unless rows are uint8 (T, H, W, 3) of one frame size, of one T where asked, and 0 <= context <= T."""
    wrong = [f"{name} {array.dtype} {array.shape}" for name, array in rows.items()]
    shapes = {array.shape[1:] for array in rows.values()}
    lengths = {len(array) for array in rows.values()}
    are_frames = all(
        array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8 and len(array) for array in rows.values()
    )
    if not rows or not are_frames or len(shapes) > 1 or (is_one_length and len(lengths) > 1):
        raise ValueError(
            f"got pictures {', '.join(wrong) or 'none at all'}; rows of one clip are uint8 (T, H, W, 3) of one size: "
            "cut or resize them"
        )
    if not 0 <= context <= max(lengths):
        raise ValueError(f"got a context of {context} for {max(lengths)} frames; it must lie between: count the given frames")


def strip_image(rows: Mapping[str, np.ndarray], context: int) -> np.ndarray:
    """Draw a film strip: a line of frames for each row, given ones framed in amber and predicted ones in blue.

    rows: name -> uint8 (T, H, W, 3); a row may be shorter than the others. context: given frames. Gives uint8 (height, width, 3).
    More than STRIP_FRAMES frames go on below. Raises ValueError on rows that do not fit together.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_rows(rows, context)
    height, width = next(iter(rows.values())).shape[1:3]
    frames, scale, font = max(map(len, rows.values())), max(1, math.ceil(STRIP_PANEL / width)), ImageFont.load_default(size=14)
    step_x, step_y = width * scale + STRIP_GAP, height * scale + STRIP_GAP
    gutter = STRIP_GAP + math.ceil(max(font.getlength(name) for name in rows))
    columns, blocks = min(frames, STRIP_FRAMES), range(0, frames, STRIP_FRAMES)
    block_height = STRIP_HEADER + len(rows) * step_y
    canvas = Image.new("RGB", (gutter + STRIP_GAP + columns * step_x, len(blocks) * block_height + STRIP_GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for (block, start), (line, (name, pictures)) in product(enumerate(blocks), enumerate(rows.items())):
        top = block * block_height + STRIP_HEADER + line * step_y
        draw.text((STRIP_GAP, top + height * scale // 2), name, fill=STRIP_INK, font=font, anchor="lm")
        for index in range(start, min(start + STRIP_FRAMES, frames)):
            left, is_given = gutter + STRIP_GAP + (index - start) * step_x, index < context
            colour = GIVEN_COLOUR if is_given else PREDICTED_COLOUR
            if line == 0:
                starts = index in (start, context)
                text = f"{'given' if is_given else 'predicted'} {index + 1}" if starts else str(index + 1)
                draw.text((left, top - 6), text, fill=colour, font=font, anchor="ls")
            if index < len(pictures):
                draw.rectangle((left - 3, top - 3, left + width * scale + 2, top + height * scale + 2), fill=colour)
                size = (width * scale, height * scale)
                canvas.paste(Image.fromarray(pictures[index]).resize(size, Image.Resampling.NEAREST), (left, top))
    return np.asarray(canvas).copy()


def _clips(report: Report) -> str:
    """Give all clips with the key to their colours and the pause button."""
    if not report.clips:
        return ""
    bar = (
        '<div class="bar"><span class="key given">given</span><span class="key predicted">predicted</span>'
        f'<label for="pause"></label><span>{report.fps:g} frames a second</span></div>'
    )
    return section("Clips", bar + "".join(_clip(clip, report.fps) for clip in report.clips))


def _clip(clip: Clip, fps: float) -> str:
    """Give one clip: its panels, its badge and its time line."""
    frames, _, width, _ = next(iter(clip.rows.values())).shape
    share = 100 * clip.context / frames
    style = f"--count: {len(clip.rows)}; --width: {panel_width(width)}px; --frames: {frames}; --seconds: {frames / fps:.4f}s"
    track = f"background: linear-gradient(to right, var(--given) {share:.4f}%, var(--predicted) {share:.4f}%)"
    caption = f'<p class="caption">{escape(clip.caption)}</p>' if clip.caption else ""
    return (
        f'<div class="card clip turn-{clip.context}-{frames}" style="{style}"><div class="panels">{panels(clip.rows)}</div>'
        '<div class="state"><div class="badge"><span class="given">given</span><span class="predicted">predicted</span></div>'
        f'<div class="track" style="{track}"><i></i></div></div>{caption}</div>'
    )


def _keyframes(clips: Sequence[Clip]) -> str:
    """Give the rules that turn frame and badge from given to predicted, one set for each kind of clip."""
    kinds = sorted({(clip.context, len(next(iter(clip.rows.values())))) for clip in clips})
    return "\n".join(_turn(f"turn-{context}-{frames}", 100 * context / frames) for context, frames in kinds)


def _turn(name: str, share: float) -> str:
    """Give one set of rules; share: percent of the time that frames are given."""
    given, predicted = (f"outline-color: var(--{state}); border-color: var(--{state})" for state in ("given", "predicted"))
    parts = {
        "screen": (given, predicted),
        "given": ("visibility: visible", "visibility: hidden"),
        "predicted": ("visibility: hidden", "visibility: visible"),
    }
    rules = []
    for part, (before, after) in parts.items():
        start = before if share > 0 else after
        turn = f"{share:.4f}% {{ {after}; }} " if 0 < share < 100 else ""
        end = after if share < 100 else before
        rules.append(f"@keyframes {name}-{part} {{ 0% {{ {start}; }} {turn}100% {{ {end}; }} }}")
        place = f".{name} .screen, .{name} .screen::after" if part == "screen" else f".{name} .badge .{part}"
        rules.append(f"{place} {{ animation: {name}-{part} var(--seconds) step-end infinite; }}")
    return "\n".join(rules)

"""One self-contained HTML page that shows what a model does, and the film strip picture.

The page needs no network and no other file: style, script (report.css, report.js) and pictures are inside. A moving picture is a column
of its frames in one image, of which the script shows one: all of them keep in step, with each other and with the badge "given" or
"predicted". #frame=N in the address opens the page at a frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from vidtok.page_parts import Figure, Table, figure_card, panel_width, panels, receipt_section, section, table_card

GIVEN_COLOUR, PREDICTED_COLOUR = (217, 119, 6), (37, 99, 235)
STRIP_PANEL, STRIP_FRAMES, STRIP_GAP, STRIP_HEADER = 96, 12, 12, 28  # pixels, frames a line, pixels, pixels
STRIP_INK = (51, 65, 85)
PAGE_WIDTH, PANEL_GAP = 1118, 8  # CSS pixels inside a card of report.css at its widest, and between its panels


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
    legend: Mapping[str, str] = field(default_factory=dict)  # of colours in the pictures: name -> CSS colour


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page; gives its path. Raises ValueError on clips whose frames do not fit together."""
    if not report.fps > 0:
        raise ValueError(f"got {report.fps} frames a second; it must be above 0: use the rate of the clips, or a slower one")
    for clip in report.clips:
        check_rows(clip.rows, clip.context, is_one_length=True)
    page = Template(_own("report.html")).substitute(
        title=escape(report.title),
        summary=escape(report.summary),
        clips=_clips(report),
        figures=section("Curves", "".join(map(figure_card, report.figures)), "figures"),
        tables=section("Numbers", "".join(map(table_card, report.tables))),
        receipt=receipt_section(report.receipt),
        style=_own("report.css"),
        script=f"<script>\n{_own('report.js')}</script>" if report.clips else "",
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _own(name: str) -> str:
    """Read a file that lies beside this one."""
    return files("vidgpt").joinpath(name).read_text(encoding="utf-8")


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
    More than STRIP_FRAMES frames go on below, without the rows that have ended. Raises ValueError on rows that do not fit together.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_rows(rows, context)
    height, width = next(iter(rows.values())).shape[1:3]
    frames, scale, font = max(map(len, rows.values())), max(1, math.ceil(STRIP_PANEL / width)), ImageFont.load_default(size=14)
    step_x, step_y = width * scale + STRIP_GAP, height * scale + STRIP_GAP
    gutter = STRIP_GAP + math.ceil(max(font.getlength(name) for name in rows))
    firsts = range(0, frames, STRIP_FRAMES)
    blocks = [[name for name, pictures in rows.items() if first < len(pictures)] for first in firsts]
    tops = list(accumulate((STRIP_HEADER + len(names) * step_y for names in blocks), initial=0))
    canvas = Image.new("RGB", (gutter + STRIP_GAP + min(frames, STRIP_FRAMES) * step_x, tops[-1] + STRIP_GAP), "white")
    draw = ImageDraw.Draw(canvas)
    lines = [
        (first, above + STRIP_HEADER + line * step_y, line, name)
        for first, above, names in zip(firsts, tops, blocks, strict=False)
        for line, name in enumerate(names)
    ]
    for start, top, line, name in lines:
        pictures = rows[name]
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
    """Give all clips with the player that moves them and the key to their colours."""
    if not report.clips:
        return ""
    first, frames = report.clips[0], max(_frames(clip) for clip in report.clips)
    # The thumb's middle stands at frame 1 on the far left and at the last one on the far right; the turn is between two frames.
    share = 100 * max(0.0, first.context - 0.5) / max(1, frames - 1)
    player = (
        f'<div class="player" data-fps="{report.fps:g}" hidden><button type="button">Play</button>'
        f'<input type="range" min="1" max="{frames}" value="1" step="1" aria-label="Frame" style="--share: {min(100.0, share):.2f}%">'
        f"<output>frame 1 of {frames}</output></div>"
    )
    legend = "".join(
        f'<span class="key filled" style="--key: {colour}">{escape(name)}</span>' for name, colour in report.legend.items()
    )
    keys = (
        '<div class="keys"><span class="key given">given</span><span class="key predicted">predicted</span>'
        f"{legend}<span>{report.fps:g} frames a second; arrow keys step, Space plays</span></div>"
    )
    silent = (
        '<noscript><p class="summary">The clips move with JavaScript; without it you see the first frame of each.</p></noscript>'
    )
    return section("Clips", keys + player + silent + "".join(map(_clip, report.clips)))


def _clip(clip: Clip) -> str:
    """Give one clip: its badge, its caption and its panels."""
    width, count = next(iter(clip.rows.values())).shape[2], len(clip.rows)
    style = f"--count: {count}; --width: {_panel_width(width, count)}px; --frame: 0"
    caption = f'<p class="caption">{escape(clip.caption)}</p>' if clip.caption else ""
    state, name = ("", "given 1") if clip.context else (" predicted", "predicted 1")
    return (
        f'<div class="card clip{state}" data-frames="{_frames(clip)}" data-context="{clip.context}" style="{style}">'
        f'<div class="head"><span class="badge">{name}</span>{caption}</div>'
        f'<div class="panels">{panels(clip.rows)}</div></div>'
    )


def _frames(clip: Clip) -> int:
    return len(next(iter(clip.rows.values())))


def _panel_width(width: int, count: int) -> int:
    """Give the CSS pixels of a panel: fewer than usual where so many side by side would be wider than the page."""
    room = (PAGE_WIDTH - (count - 1) * PANEL_GAP) // count
    return max(width, min(panel_width(width), room // width * width))

"""Parts of a self-contained page: figures, tables, moving pictures and the receipt, as HTML without scripts or outside files."""

from __future__ import annotations

import base64
import io
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

PACKAGES = ("torch", "transformers", "accelerate", "vector-quantize-pytorch", "av", "datasets")
SMALLEST_PANEL, USUAL_PANEL = 192, 280  # CSS pixels
LARGEST_PNG = 1_000_000  # bytes; a larger moving picture is written as lossy WebP
LARGEST_WEBP_SIDE = 16_383  # pixels, a limit of the format


@dataclass(frozen=True)
class Measured:
    """A number with the interval that it lies in, shown below it; both as text."""

    value: str
    interval: str


Cell = str | float | int | Measured | None


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    path: str | Path  # a PNG
    caption: str = ""
    dark_path: str | Path | None = None  # the same for a dark page


@dataclass(frozen=True)
class Table:
    """Numbers with their names; None shows as a dash."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def section(title: str, body: str, kind: str = "") -> str:
    """Wrap a part of the page, or give nothing where it is empty."""
    return f'<section><h2>{title}</h2><div class="{kind}">{body}</div></section>' if body else ""


def panel_width(width: int) -> int:
    """Give the CSS pixels at which frames are shown: a whole multiple of their width keeps every pixel a square of one size."""
    return width * max(math.ceil(SMALLEST_PANEL / width), USUAL_PANEL // width)


def panels(rows: Mapping[str, np.ndarray]) -> str:
    """Give moving pictures side by side, name -> uint8 (T, H, W, 3): each is a column of its frames in one image, which CSS moves."""
    height, width = next(iter(rows.values())).shape[1:3]
    return "".join(
        f'<figure class="panel"><div class="screen" style="aspect-ratio: {width} / {height}">'
        f'<img alt="{escape(name)}" src="{film(pictures)}"></div><figcaption>{escape(name)}</figcaption></figure>'
        for name, pictures in rows.items()
    )


def film(pictures: np.ndarray) -> str:
    """Give frames uint8 (T, H, W, 3) as one column of pictures in a data URI."""
    column = rearrange(pictures, "T H W C -> (T H) W C")
    content = _encode(column, "PNG")
    if len(content) > LARGEST_PNG and max(column.shape) <= LARGEST_WEBP_SIDE:
        return data_uri(_encode(column, "WEBP"), "webp")
    return data_uri(content, "png")


def _encode(image: np.ndarray, kind: str) -> bytes:
    """Encode an image uint8 (H, W, 3); quality matters to WebP alone."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, kind, quality=92)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Put a file's bytes into the page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def figure_card(figure: Figure) -> str:
    """Give one picture of the curves."""
    caption = f'<p class="caption">{escape(figure.caption)}</p>' if figure.caption else ""
    source = data_uri(Path(figure.path).read_bytes(), "png")
    image = f'<img alt="{escape(figure.caption or Path(figure.path).stem)}" src="{source}">'
    if figure.dark_path is not None:
        dark = data_uri(Path(figure.dark_path).read_bytes(), "png")
        image = f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">{image}</picture>'
    return f'<div class="card">{image}{caption}</div>'


def table_card(table: Table) -> str:
    """Give one table of numbers."""
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<div class="card scroll"><table><caption><span>{escape(table.caption)}</span></caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, Measured):
        return f"{escape(cell.value)}<small>{escape(cell.interval)}</small>"
    return escape(format_cell(cell))


def format_cell(cell: Cell) -> str:
    """Show a float with about four digits, a whole number in full, and a dash for None or what is no number."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    if isinstance(cell, Measured):
        return f"{cell.value} ({cell.interval})"
    if not isinstance(cell, float):
        return str(cell)
    if 0 < abs(cell) < 0.01:
        return f"{cell:.3g}"
    return f"{cell:,.{3 if abs(cell) < 10 else 2 if abs(cell) < 100 else 1}f}"


def make_receipt(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give versions, device and configuration: what somebody needs to get the same page again."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": describe_device(),
        "config": json.loads(json.dumps(config, default=str)),
    }


def describe_device() -> str:
    """Name what computes."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def receipt_section(receipt: Mapping[str, Any]) -> str:
    """Give the receipt, folded away, one line a value."""
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in leaves(receipt))
    table = f'<table class="receipt">{rows}</table>'
    folded = f'<div class="card"><details><summary>Versions, seeds, configuration</summary>{table}</details></div>'
    return section("Receipt", folded if rows else "")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a nested mapping; keys are joined by dots."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference_frames(frames: np.ndarray, reference: np.ndarray, gain: int = 1) -> np.ndarray:
    """Show where two clips uint8 (T, H, W, 3) differ: the absolute difference of each colour times gain, black where equal."""
    difference = np.abs(frames.astype(np.int16) - reference.astype(np.int16))
    return (gain * difference).clip(0, 255).astype(np.uint8)

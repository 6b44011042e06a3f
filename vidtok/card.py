"""The card: what tokens are made of, beside every token dataset and inside every model trained on one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vidtok.run.checkpoints import write_text

CARD_FILE = "card.json"
CARD_FORMAT = 1
_MADE_BY = (
    "tokenizer_fingerprint",
    "codebook_size",
    "codebook_factors",
    "grid_height",
    "grid_width",
    "first_frames",
    "stride_t",
    "stride_s",
    "fps",
    "frame_height",
    "frame_width",
    "is_stretched",
    "num_actions",
)
_MADE_OF = ("data_name", "manifest_hash", "clip_frames", "clip_hop", "precision")
_SIZES = ("codebook_size", "grid_height", "grid_width", "first_frames", "stride_t", "stride_s", "frame_height", "frame_width")
_COUNTS = ("num_actions", "clip_frames", "clip_hop", "rows", "frames")
# What the first cards of this format did not say.
_LATER: dict[str, Any] = {
    "encoder_fingerprint": "",
    "clip_frames": 0,
    "clip_hop": 0,
    "first_frames": 1,
    "codebook_factors": [],
    "precision": "fp32",
    "is_stretched": False,
}


@dataclass(frozen=True)
class Card:
    """Say which tokenizer made the tokens, of which frames (sizes in pixels, fps in frames a second), and how many there are.

    encoder_fingerprint: of encoder and codebook alone, which a tuned decoder leaves as it is; "" in cards that did not record it yet.
    codebook_size: number of ids; codebook_factors: sizes of the codebooks whose digits make an id, [] is read as one codebook.
    first_frames: pixel frames that a row's first latent frame stands for; every later one stands for stride_t.
    frame_height, frame_width: of the frames that came; the grid covers them and may exceed them. is_stretched: videos of another shape
    were scaled to that size without keeping the aspect; false covered it and cropped the middle.
    num_actions: 0 where no actions are recorded. clip_frames, clip_hop: pixel frames of a row, and from one row's start to the next;
    0 in cards that did not record them yet. precision: fp32 or bf16, which the tokenizer computed in.
    splits: rows of each split; rows, frames (pixel frames) and splits count only once complete is true.
    """

    tokenizer_fingerprint: str
    codebook_size: int
    grid_height: int
    grid_width: int
    stride_t: int
    stride_s: int
    fps: float
    frame_height: int
    frame_width: int
    num_actions: int
    data_name: str
    manifest_hash: str
    clip_frames: int = 0
    clip_hop: int = 0
    first_frames: int = 1
    encoder_fingerprint: str = ""
    codebook_factors: list[int] = field(default_factory=list)
    precision: str = "fp32"
    is_stretched: bool = False
    complete: bool = False
    rows: int = 0
    frames: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    format_version: int = CARD_FORMAT

    def __post_init__(self) -> None:
        """Fill the factors of one codebook in. Raises ValueError for what no tokens can be made of."""
        if not self.codebook_factors:
            object.__setattr__(self, "codebook_factors", [self.codebook_size])
        wrong = self._wrong()
        if wrong:
            raise ValueError(f"{wrong}: encode the data again")

    def _wrong(self) -> str:
        """Say what cannot be, or nothing."""
        for names, least in ((_SIZES, 1), (_COUNTS, 0)):
            for name in names:
                if getattr(self, name) < least:
                    return f"{name}={getattr(self, name)} must be {least} or more"
        if min(self.codebook_factors) < 1 or math.prod(self.codebook_factors) != self.codebook_size:
            return f"codebook_factors={self.codebook_factors} do not multiply to codebook_size={self.codebook_size}"
        if not 0 < self.fps < math.inf:
            return f"fps={self.fps} is no number of frames a second above 0"
        for side in ("height", "width"):
            frame, grid = getattr(self, f"frame_{side}"), getattr(self, f"grid_{side}")
            if grid != -(-frame // self.stride_s):
                return f"grid_{side}={grid} does not cover frame_{side}={frame} in tokens of stride_s={self.stride_s} pixels"
        if self.precision not in ("fp32", "bf16"):
            return f"precision={self.precision} is none that tokens are made in, fp32 or bf16"
        if any(rows < 0 for rows in self.splits.values()):
            return f"splits={self.splits} must count 0 rows or more"
        return ""

    @property
    def value_dtype(self) -> str:
        """Name the integers of the shards: the narrowest of uint16, int32 and int64 that holds every id."""
        if self.codebook_size <= 1 << 16:
            return "uint16"
        return "int32" if self.codebook_size <= 1 << 31 else "int64"

    def frames_of(self, latent_frames: int) -> int:
        """Give the pixel frames that so many latent frames of a row stand for."""
        return self.first_frames + (latent_frames - 1) * self.stride_t

    def latent_frames_in(self, frames: int) -> int:
        """Give how many latent frames fit into so many pixel frames; 0 below first_frames."""
        return max(0, 1 + (frames - self.first_frames) // self.stride_t)

    def begun(self) -> Card:
        """Give the card of the same tokens before the first one was written."""
        return replace(self, complete=False, rows=0, frames=0, splits={})

    def save(self, folder: str | Path) -> None:
        """Write card.json into folder, whole or not at all."""
        write_text(Path(folder) / CARD_FILE, json.dumps({**asdict(self), "value_dtype": self.value_dtype}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Read folder/card.json. Raises FileNotFoundError without one, ValueError for one that this version cannot read."""
        path = Path(folder).expanduser() / CARD_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give a folder that vidtok-encode or vidgpt-train has written.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error}): the folder is damaged, copy or encode it again.") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != CARD_FORMAT:
            raise ValueError(f"{path} has format_version {version}, this version reads {CARD_FORMAT}: encode the data again.")
        dtype = values.pop("value_dtype", None)
        values = {**_LATER, **values}
        unknown = sorted(set(values) ^ {option.name for option in fields(cls)})
        if unknown:
            raise ValueError(f"{path} lacks or does not know {unknown[0]!r}: encode the data again, or update the package.")
        for option in fields(cls):
            if not _is_of_type(values[option.name], str(option.type)):
                found = f"{option.name}={values[option.name]!r}, which is not of type {option.type}"
                raise ValueError(f"{path} has {found}: the folder is damaged, copy or encode it again.")
        try:
            card = cls(**values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if dtype != card.value_dtype:
            raise ValueError(
                f"{path} says value_dtype={dtype}, but codebook_size={card.codebook_size} needs {card.value_dtype}: "
                "encode the data again."
            )
        return card


def _is_of_type(value: Any, kind: str) -> bool:
    """Compare what JSON gave with an annotation of Card, exactly: true is no number."""
    if kind == "dict[str, int]":
        return isinstance(value, dict) and all(_is_of_type(count, "int") for count in value.values())
    if kind == "list[int]":
        return isinstance(value, list) and all(_is_of_type(count, "int") for count in value)
    return type(value).__name__ in (("int", "float") if kind == "float" else (kind,))


def check_cards(card: Card, name: str, other: Card, other_name: str) -> None:
    """Raise ValueError when the two were not made by the same tokenizer from frames of one size and rate; the data may differ.

    Tokenizers that differ in their decoder alone give the same tokens.
    """
    keys = list(_MADE_BY)
    if card.encoder_fingerprint and other.encoder_fingerprint:
        keys[keys.index("tokenizer_fingerprint")] = "encoder_fingerprint"
    _refuse_difference(card, name, other, other_name, keys, "both must come from one tokenizer and one kind of frames.")


def check_same_tokens(card: Card, name: str, other: Card, other_name: str) -> None:
    """Raise ValueError when the two do not describe the very same tokens, finished or not."""
    _refuse_difference(card, name, other, other_name, (*_MADE_BY, *_MADE_OF), "give another output folder.")


def _refuse_difference(card: Card, name: str, other: Card, other_name: str, keys: Sequence[str], remedy: str) -> None:
    for key in keys:
        ours, theirs = getattr(card, key), getattr(other, key)
        if ours != theirs:
            raise ValueError(f"{name} has {key}={ours}, but {other_name} has {key}={theirs}: {remedy}")

"""Episodes: what every data source gives, and clips cut from them for training."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidtok.video import to_video

Split = Literal["train", "validation"]


class Frames(Protocol):
    """A sequence of frames that need not be in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray:
        """Give uint8 frames (T, H, W, 3)."""
        ...


@dataclass(frozen=True)
class FrameFile:
    """Frames [first, last) of a .npy file (T, H, W, 3) uint8, mapped when read.

    Opened at each read: an np.memmap kept here would be pickled with all its pixels for every loader worker.
    """

    path: str
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: slice) -> np.ndarray:
        frames = np.load(self.path, mmap_mode="r")[self.first : self.last]
        return np.array(frames[index])


@dataclass(frozen=True)
class Episode:
    """One stretch of consecutive frames.

    source: file name relative to the root, or a name such as freeway/episode-003. start: seconds into the source.
    actions: int64 (T,) or None; actions[i] is the action taken just before frame i was seen, actions[0] is 0.
    """

    source: str
    start: float
    fps: float
    frames: Frames
    actions: np.ndarray | None
    split: Split


@dataclass(frozen=True)
class Reject:
    """A source that could not be read, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class EpisodeSet:
    """All episodes of a data source, of one frame size and rate.

    num_actions: 0 when there are none. manifest_hash: 16 hex digits that change with the data or the options.
    is_stretched: frames were scaled without keeping the aspect, not cropped.
    """

    name: str
    height: int
    width: int
    fps: float
    num_actions: int
    episodes: list[Episode]
    rejects: list[Reject]
    manifest_hash: str
    is_stretched: bool = False

    def split(self, name: str) -> list[Episode]:
        """Give the episodes of split train or validation. Raises ValueError for another name."""
        if name not in ("train", "validation"):
            raise ValueError(f"The split is {name!r}: it must be train or validation.")
        return [episode for episode in self.episodes if episode.split == name]


def describe_short(episodes: Sequence[Episode], frames: int, of: str = "") -> str:
    """Say how many episodes have fewer frames than are needed, and nothing where none has. of: words that say which episodes."""
    short = sum(len(episode.frames) < frames for episode in episodes)
    has, are = ("has", "is") if short == 1 else ("have", "are")
    return f"{short} of {len(episodes)} {of}episodes {has} fewer than {frames} frames and {are} left out" if short else ""


def hash_manifest(content: Any) -> str:
    """Hash anything that JSON can hold to 16 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Write a CSV file with the header source,reason; complete or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["source", "reason"])
        table.writerows([reject.source, reject.reason] for reject in rejects)
    temporary.replace(path)


class ClipDataset(Dataset[dict[str, Tensor]]):
    """Every window of consecutive frames of every episode.

    An item is {"video": float32 (C, T, H, W) in [-1, 1], "actions": int64 (T,), zeros when there are none}.
    """

    def __init__(self, episodes: list[Episode], frames: int) -> None:
        """Index the windows of `frames` frames. Raises ValueError when no episode is that long."""
        if frames < 1:
            raise ValueError(f"A clip of {frames} frames was asked for: it must have 1 or more.")
        self.episodes = [episode for episode in episodes if len(episode.frames) >= frames]
        self.frames = frames
        self.ends = list(accumulate(len(episode.frames) - frames + 1 for episode in self.episodes))
        if not self.ends:
            longest = max((len(episode.frames) for episode in episodes), default=0)
            raise ValueError(f"A clip needs {frames} frames and the longest of {len(episodes)} episodes has {longest}: "
                             "ask for shorter clips, raise data.fps, or give longer videos.")  # fmt: skip

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[Episode, int]:
        """Give the episode of a clip, and the clip's first frame in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"Clip {index} was asked for: there are {len(self)}.")
        index %= len(self)
        which = bisect_right(self.ends, index)
        return self.episodes[which], index - (self.ends[which - 1] if which else 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        episode, first = self.locate(index)
        window = slice(first, first + self.frames)
        actions = torch.zeros(self.frames, dtype=torch.int64)
        if episode.actions is not None:
            actions = torch.from_numpy(np.array(episode.actions[window], dtype=np.int64))
        return {"video": to_video(episode.frames[window]), "actions": actions}

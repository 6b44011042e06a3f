"""The token dataset on disk: Parquet shards and a card. Written row by row, read as windows of latent frames."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from itertools import accumulate
from os import W_OK, access
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from vidtok.card import CARD_FILE, Card, check_same_tokens
from vidtok.run.checkpoints import sync
from vidtok.run.run_folder import lock_folder

_SHARDS = "shard-*.parquet"


@dataclass(frozen=True)
class TokenRow:
    """One clip: where it comes from, and its tokens.

    start: seconds into the source. frames: pixel frames. Integers: indices (t, h, w), actions (t,), None where num_actions=0.
    """

    source: str
    start: float
    split: str
    frames: int
    indices: Tensor
    actions: Tensor | None = None


class TokenWriter:
    """Write a token dataset, or go on with one: the first rows_done rows of the caller's fixed order are there already.

    A shard appears whole or not at all, so an interruption loses at most rows_per_shard rows, and the finished files are the same
    as without it. Raises ValueError when the folder holds other tokens or another process writes to it.
    """

    def __init__(self, folder: str | Path, card: Card, rows_per_shard: int = 64) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard={rows_per_shard} is not allowed: give 1 or more.")
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        try:
            self.card = self._open(card.begun(), rows_per_shard)
        except BaseException:
            self._lock.close()
            raise
        self._rows_per_shard = rows_per_shard
        self._rows: list[TokenRow] = []
        self._num_shards = len(_shards(self.folder))
        self.rows_done = sum(_counts(self.folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def add(self, row: TokenRow) -> None:
        """Take the next row; raises ValueError when it does not fit the card."""
        if self.card.complete:
            raise ValueError(f"{self.folder} is complete with {self.card.rows} rows: give another output folder to encode more.")
        _check_row(row, self.card)
        # A shard waits here whole, so as narrow as it is written.
        self._rows.append(replace(row, indices=row.indices.to(getattr(torch, self.card.value_dtype))))
        if len(self._rows) == self._rows_per_shard:
            self._write_shard()

    def finish(self) -> None:
        """Write the last shard and mark the dataset complete; does nothing when it is."""
        if self.card.complete:
            return
        if self._rows:
            self._write_shard()
        if not self.rows_done:
            raise ValueError(f"No row was added to {self.folder}: the data gave no clip that is long enough.")
        rows = _columns(self.folder, ["split", "frames"])
        splits, frames = Counter(rows["split"]), sum(rows["frames"])
        self.card = replace(self.card, complete=True, rows=len(rows["split"]), frames=frames, splits=dict(sorted(splits.items())))
        self.card.save(self.folder)

    def _open(self, card: Card, rows_per_shard: int) -> Card:
        for leftover in self.folder.glob(".tmp-*"):
            leftover.unlink()
        if not (self.folder / CARD_FILE).exists():
            if _shards(self.folder):
                raise ValueError(f"{self.folder} holds shards but no {CARD_FILE}: give another output folder.")
            card.save(self.folder)
            return card
        found = Card.load(self.folder)
        check_same_tokens(found, str(self.folder), card, "this command")
        if found.complete:
            _check_whole(self.folder, found, _columns(self.folder, ["split"])["split"])
        else:
            _drop_last_short_shard(self.folder, rows_per_shard)
        return found

    def _write_shard(self) -> None:
        name = _shard_name(self._num_shards)
        temporary = self.folder / f".tmp-{name}"
        pq.write_table(_table(self._rows, self.card), temporary, compression="zstd")
        sync(temporary)
        temporary.replace(self.folder / name)
        self._num_shards += 1
        self.rows_done += len(self._rows)
        self._rows = []


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Every window of `window` latent frames in one split: {"indices": int64 (t, h, w), "actions": int64 (t,)}.

    Actions are zeros where none are recorded. Opened through Hugging Face datasets: an Arrow cache, mapped into memory and read
    by slices. Raises ValueError for a dataset that is not complete, a shard that is damaged or gone, a split without rows, a window
    longer than every row and, when read, ids outside the codebook.
    """

    def __init__(self, folder: str | Path, split: str, window: int) -> None:
        self.folder = Path(folder).expanduser()
        self.card = Card.load(self.folder)
        self.window = window
        longest = longest_row(self.folder, split)
        self._data = _open_shards(self.folder)
        self._chunk_starts = [0, *accumulate(len(chunk) for chunk in self._data.data.column("tokens").chunks)]
        self._rows = [row for row, name in enumerate(self._column("split")) if name == split]
        self._sources, self._lengths = self._column("source"), self._column("t")
        self._check_grid()
        if not 1 <= window <= longest:
            raise ValueError(
                f"A window of {window} latent frames does not fit {self.folder}, where the longest row of split {split!r} "
                f"has {longest}: use a window of 1 to {longest}, or encode longer clips."
            )
        self.lengths = [self._lengths[row] for row in self._rows]  # of the split's rows, in latent frames
        # From the middle too, where a first latent frame has a past: one that was encoded afresh looks as if its past had stood still.
        self._ends = list(accumulate(max(0, length - window + 1) for length in self.lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, start = self.place(index)
        end = start + self.window
        return {"indices": self._indices(row, start, end), "actions": self._actions(row, start, end)}

    def place(self, index: int) -> tuple[int, int]:
        """Give where a window lies: its row, counted over all splits, and its first latent frame."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        row = bisect_right(self._ends, index)
        return self._rows[row], index - (self._ends[row - 1] if row else 0)

    def past(self, index: int, count: int) -> Tensor:
        """Give the last `count` latent frames before a window, int64 (n, h, w); fewer where its row begins."""
        row, start = self.place(index)
        return self._indices(row, max(0, start - count), start)

    def source(self, row: int) -> tuple[str, float]:
        """Name what a row was made of, and the seconds into it at which the row begins."""
        return self._sources[row], float(self._data.data.column("start")[row].as_py())

    def rows(self) -> Iterator[Tensor]:
        """Give the indices of every whole row, int64 (1, t, h, w), one at a time, for counting."""
        for row in self._rows:
            yield self._indices(row, 0, self._lengths[row])[None]

    def _indices(self, row: int, first: int, last: int) -> Tensor:
        height, width = self.card.grid_height, self.card.grid_width
        ids = self._values("tokens", row, self._lengths[row], height * width)[first * height * width : last * height * width]
        return rearrange(self._checked(ids, self.card.codebook_size, "token id", row), "(t h w) -> t h w", h=height, w=width)

    def _actions(self, row: int, first: int, last: int) -> Tensor:
        if not self.card.num_actions:
            return torch.zeros(last - first, dtype=torch.int64)
        actions = self._values("actions", row, self._lengths[row], 1)[first:last]
        return self._checked(actions, self.card.num_actions, "action", row)

    def _values(self, column: str, row: int, num_frames: int, per_frame: int) -> Any:
        """Give a row's list as an Arrow array that still lies in the mapped file."""
        number = bisect_right(self._chunk_starts, row) - 1
        chunk, place = self._data.data.column(column).chunk(number), row - self._chunk_starts[number]
        begin, end = chunk.offsets[place].as_py(), chunk.offsets[place + 1].as_py()
        if end - begin != num_frames * per_frame:
            raise ValueError(
                f"{self.folder}: the row of {self._sources[row]!r} has {end - begin} {column}, "
                f"its {num_frames} latent frames need {num_frames * per_frame}: encode the data again."
            )
        return chunk.values.slice(begin, end - begin)

    def _checked(self, values: Any, limit: int, kind: str, row: int) -> Tensor:
        """Refuse a value outside [0, limit) here, where it has a name; on a GPU it would end the process without one."""
        array = values.to_numpy(zero_copy_only=False).astype(np.int64)
        wrong = array[(array < 0) | (array >= limit)]
        if len(wrong):
            size = f"codebook_size={limit}" if kind == "token id" else f"num_actions={limit}"
            raise ValueError(
                f"{self.folder}: {kind} {wrong[0]} in the row of {self._sources[row]!r} does not fit {size} (0 to {limit - 1}): "
                "encode the data again."
            )
        return torch.from_numpy(array)

    def _check_grid(self) -> None:
        expected = (self.card.grid_height, self.card.grid_width)
        for source, *grid in zip(self._sources, self._column("h"), self._column("w"), strict=True):
            if tuple(grid) != expected:
                raise ValueError(f"{self.folder}: the row of {source!r} has grid {grid}, the card {expected}: encode it again.")

    def _column(self, name: str) -> list[Any]:
        return list(self._data.data.column(name).to_pylist())


def longest_row(folder: str | Path, split: str, is_optional: bool = False) -> int:
    """Give the latent frames of the longest row of a split; 0 for a split without rows where is_optional allows that.

    Raises ValueError for another split without rows, for a dataset that is not complete, and for a shard that is damaged or gone.
    """
    folder = Path(folder).expanduser()
    card = Card.load(folder)
    if not card.complete:
        raise ValueError(f"{folder} is not complete: run its vidtok-encode command again, it goes on where it stopped.")
    rows = _columns(folder, ["split", "t"])
    _check_whole(folder, card, rows["split"])
    lengths = [length for name, length in zip(rows["split"], rows["t"], strict=True) if name == split]
    if not lengths and not is_optional:
        raise ValueError(f"{folder} has no row of split {split!r}: it has {card.splits}.")
    return max(lengths, default=0)


def _open_shards(folder: Path) -> Any:
    """Open the shards as a datasets.Dataset, without a line of output; the Arrow cache lies in the folder if that is writable."""
    import datasets

    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # The paths are read as glob patterns, and a folder may well be called runs/size=[64,64].
        paths = [escape(str(path.resolve())) for path in _shards(folder)]
        return datasets.Dataset.from_parquet(paths, cache_dir=str(folder / ".cache") if access(folder, W_OK) else None)
    except datasets.exceptions.DatasetGenerationError:
        _columns(folder, None)  # names the damaged shard, which datasets does not
        raise
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()


def _shards(folder: Path) -> list[Path]:
    """Give the shards in order. Raises ValueError where one between the first and the last is gone."""
    paths = sorted(folder.glob(_SHARDS))
    for number, path in enumerate(paths):
        if path.name != _shard_name(number):
            raise ValueError(f"{folder / _shard_name(number)} is gone: copy the folder again, or encode into a new one.")
    return paths


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def _counts(folder: Path) -> list[int]:
    """Give the number of rows of every shard."""
    counts = []
    for path in _shards(folder):
        with _naming_damage(path):
            counts.append(pq.read_metadata(path).num_rows)
    return counts


def _columns(folder: Path, names: list[str] | None) -> dict[str, list[Any]]:
    """Read columns (None for all) of every row of every shard."""
    columns: dict[str, list[Any]] = {name: [] for name in names or ()}
    for path in _shards(folder):
        with _naming_damage(path):
            table = pq.read_table(path, columns=names)
            for name, values in columns.items():
                values += table[name].to_pylist()
    return columns


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged: copy the folder again, or encode into a new one.") from error


def _check_whole(folder: Path, card: Card, splits: Sequence[str]) -> None:
    """Compare the rows there are with those that the card of a complete dataset counts."""
    found = dict(sorted(Counter(splits).items()))
    if len(splits) != card.rows or found != card.splits:
        raise ValueError(
            f"{folder} has {len(splits)} rows {found}, but its {CARD_FILE} counts {card.rows} {card.splits}: "
            "a shard is gone or replaced, copy the folder again, or encode into a new one."
        )


def _drop_last_short_shard(folder: Path, rows_per_shard: int) -> None:
    """Remove the remainder that `finish` wrote before it was cut off, so that the next shard begins where it would have."""
    counts = _counts(folder)
    if counts and counts[-1] < rows_per_shard:
        _shards(folder)[-1].unlink()
        counts.pop()
    if any(count != rows_per_shard for count in counts):
        raise ValueError(f"{folder} was begun with rows_per_shard={counts[0]}, now it is {rows_per_shard}: use the old value.")


def _check_row(row: TokenRow, card: Card) -> None:
    time, *grid = row.indices.shape
    if row.indices.ndim != 3 or grid != [card.grid_height, card.grid_width] or row.frames != card.frames_of(time):
        raise ValueError(
            f"Row {row.source!r}: indices {tuple(row.indices.shape)} for {row.frames} frames do not fit a grid of "
            f"{card.grid_height}x{card.grid_width} with first_frames={card.first_frames} and stride_t={card.stride_t}."
        )
    _check_values(row.source, "token ids", row.indices, card.codebook_size)
    if (row.actions is None) != (card.num_actions == 0):
        found = "missing" if row.actions is None else "given"
        raise ValueError(f"Row {row.source!r}: actions are {found}, but the card says num_actions={card.num_actions}.")
    if row.actions is not None:
        if row.actions.shape != (time,):
            shape = tuple(row.actions.shape)
            raise ValueError(f"Row {row.source!r}: actions of shape {shape}, expected ({time},), one a latent frame.")
        _check_values(row.source, "actions", row.actions, card.num_actions)


def _check_values(source: str, kind: str, values: Tensor, limit: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise ValueError(f"Row {source!r}: {kind} go from {low} to {high}, allowed are 0 to {limit - 1}.")


def _table(rows: Sequence[TokenRow], card: Card) -> pa.Table:
    shapes = [tuple(row.indices.shape) for row in rows]
    tokens = [row.indices.reshape(-1).numpy() for row in rows]
    actions = [None if row.actions is None else row.actions.numpy().astype(np.int32) for row in rows]
    return pa.table(
        {
            "source": pa.array([row.source for row in rows], pa.string()),
            "start": pa.array([row.start for row in rows], pa.float64()),
            "split": pa.array([row.split for row in rows], pa.string()),
            "frames": pa.array([row.frames for row in rows], pa.int32()),
            **{name: pa.array([shape[axis] for shape in shapes], pa.int32()) for axis, name in enumerate("thw")},
            "tokens": pa.array(tokens, pa.list_(pa.from_numpy_dtype(card.value_dtype))),
            "actions": pa.array(actions, pa.list_(pa.int32())),
        }
    )

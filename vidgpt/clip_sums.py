"""Sums of each clip, and what they could have been with other episodes: bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Self

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from vidtok.tokens import TokenDataset

Sums = dict[str, Tensor]
LEVEL = 0.95
# With fewer, intervals cover too little. Measured, in 4,000 trials of 1,000 resamples, on means of normal (of exponential) episodes:
# 4 episodes 88 % (82), 5 92 % (87), 6 93 % (88), 8 94 % (90), 12 95 % (91), 40 95 % (93); not expanded, 6 would be 85 % and 12 92 %.
FEW_EPISODES = 6


@dataclass(frozen=True)
class ClipPlace:
    """Where a clip was cut from: its row of the token dataset, its first latent frame there, and the episode that the row is of."""

    row: int
    first: int
    episode: str

    @classmethod
    def of(cls, clips: TokenDataset, index: int) -> Self:
        """Give where a window lies."""
        row, first = clips.place(index)
        return cls(row, first, clips.source(row)[0])

    def columns(self) -> dict[str, int | str]:
        """Give what stands before the figures of a clip in a table."""
        return {"data_row": self.row, "first_latent_frame": self.first, "episode": self.episode}


def number_episodes(places: Sequence[ClipPlace]) -> list[int]:
    """Give the number of the episode of each clip, 0 the first that comes."""
    return number_values([place.episode for place in places])


def number_values(values: Sequence[Hashable]) -> list[int]:
    """Give equal values one number: 0, 1, ... in the order they come."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [numbers[value] for value in values]


@dataclass(frozen=True)
class Bootstrap:
    """Expanded percentile intervals of LEVEL from episodes drawn anew with replacement, each with all its clips.

    The episode is the unit, because windows of one video depend on each other like the tokens of one clip (Field and Welsh, Bootstrapping
    clustered data, 2007; of a clip an episode this is Efron, 1979). Of one episode there is no interval. Percentiles over few episodes lie
    too near each other, so those further out are taken, see `lower_tail`. Meters of the same clips see the same draws, so that
    differences are paired.
    """

    resamples: int = 1000
    seed: int = 0

    def interval(
        self, episodes: Sequence[int], figure: Callable[[Tensor], Tensor], known: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Give the bounds (...) of a figure, NaN where fewer than two episodes know it; None where all clips are of one episode.

        episodes: that of each clip. figure turns weights (R, clips) into its values (R, ...), NaN where it has none. known: whether
        each clip alone has a value, bool (clips, ...).
        """
        if len(set(episodes)) < 2:
            return None
        number, drawn = number_values(episodes), figure(_draws(tuple(episodes), self.resamples, self.seed))
        counts = known.new_zeros((max(number) + 1, *known.shape[1:]), dtype=torch.long)
        counts = counts.index_add(0, torch.tensor(number), known.long()).sign().sum(0)
        low, high = (torch.full(counts.shape, math.nan, dtype=torch.float64) for _ in range(2))
        for count in counts[counts > 1].unique().tolist():
            here, tail = counts == count, lower_tail(count)
            ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
            low[here], high[here] = drawn[:, here].nanquantile(ends, dim=0)
        return low, high

    def describe(self) -> dict[str, str | int | float]:
        """Give what a reader of the intervals must know, for metrics.json."""
        return {
            "method": "expanded percentile",
            "unit": "episodes",
            "level_fraction": LEVEL,
            "resamples_count": self.resamples,
            "seed": self.seed,
        }


@lru_cache(maxsize=8)
def _draws(episodes: tuple[int, ...], resamples: int, seed: int) -> Tensor:
    """Give how often each clip stands in each resample: (R, clips), as often as its episode was drawn."""
    number = number_values(episodes)
    count = max(number) + 1
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return times[:, number]


def lower_tail(episodes: int) -> float:
    """Give the share of resamples below an interval of LEVEL over so many episodes, 2 or more; above it lie as many.

    A normal quantile is replaced by Student's, and a bootstrap variance, which divides by n, by the unbiased one. Source: the expanded
    percentile interval of Hesterberg, arXiv:1411.5279; Student's quantile from Abramowitz and Stegun, 26.7.5.
    """
    normal, degrees = NormalDist(), episodes - 1
    z = normal.inv_cdf((1 + LEVEL) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    student = z + sum(term / degrees**power for power, term in enumerate(terms, 1))
    return normal.cdf(-student * math.sqrt(episodes / degrees))


def describe_episodes(episodes: int, clips: int) -> str:
    """Warn, in one line, of intervals over few episodes, and of clips of one episode, which have none; nothing of others."""
    if episodes >= FEW_EPISODES or clips < 2:
        return ""
    if episodes == 1:
        return f"no intervals: the {clips} clips are of one episode, and depend on each other"
    return f"intervals over {episodes} episodes: of fewer than {FEW_EPISODES} they are too narrow"


class ClipSums:
    """Named float64 sums of each clip by frame and by place, over clips of any length; the field "tokens" tells what was counted.

    Memory: 8 bytes a field, clip and (frame or place).
    """

    def __init__(self, fields: Sequence[str], grid: tuple[int, int]) -> None:
        self.fields, self.grid = tuple(fields), grid
        self.episodes: list[int] = []  # of each clip
        self._frames: list[Tensor] = []  # (B, fields, t), frame 0 first
        self._places: list[Tensor] = []  # (B, fields, h * w)

    def add(self, first_frame: int, values: Mapping[str, Tensor], episodes: Tensor | None = None) -> None:
        """Add values (B, t, h, w), one tensor a field, for frames first_frame .. first_frame + t - 1 of B clips.

        episodes: of each clip the number, 0 or more, of the one it was cut from, (B,); None takes every clip for an episode of its own.
        """
        stacked = torch.stack([values[name].cpu().double() for name in self.fields], dim=1)
        done = len(self.episodes)
        self.episodes += [-1 - done - clip for clip in range(len(stacked))] if episodes is None else episodes.tolist()
        self._frames.append(F.pad(reduce(stacked, "B field t h w -> B field t", "sum"), (first_frame, 0)))
        self._places.append(reduce(stacked, "B field t h w -> B field (h w)", "sum"))

    @property
    def clips(self) -> int:
        """Clips added."""
        return len(self.episodes)

    @property
    def num_episodes(self) -> int:
        """Episodes that these are of."""
        return len(set(self.episodes))

    def total(self) -> Sums:
        """Give the sums of each clip: (clips,)."""
        return {name: values.sum(1) for name, values in self.by_frame().items()}

    def by_frame(self) -> Sums:
        """Give the sums of each clip by frame index: (clips, t)."""
        longest = max((part.shape[2] for part in self._frames), default=0)
        padded = [F.pad(part, (0, longest - part.shape[2])) for part in self._frames]
        return self._named(torch.cat(padded) if padded else torch.zeros(0, len(self.fields), 0, dtype=torch.float64))

    def by_place(self) -> Sums:
        """Give the sums of each clip by place of the grid, in raster order: (clips, h * w)."""
        cells = self.grid[0] * self.grid[1]
        return self._named(
            torch.cat(self._places) if self._places else torch.zeros(0, len(self.fields), cells, dtype=torch.float64)
        )

    def _named(self, sums: Tensor) -> Sums:
        return dict(zip(self.fields, rearrange(sums, "clip field x -> field clip x"), strict=True))


def weighted(sums: Sums, weights: Tensor | None = None) -> Sums:
    """Add clips up: (clips, ...) to (...), or, with weights (R, clips), to (R, ...)."""
    if weights is None:
        return {name: values.sum(0) for name, values in sums.items()}
    return {name: torch.tensordot(weights, values, dims=1) for name, values in sums.items()}

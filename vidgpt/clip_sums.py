"""Sums of each clip, and what they could have been with other clips: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

Sums = dict[str, Tensor]
LEVEL = 0.95


@dataclass(frozen=True)
class Bootstrap:
    """Percentile intervals of LEVEL from clips drawn anew with replacement (Efron, 1979).

    The clip is the unit, because tokens of one clip depend on each other. Windows of one video do too, so of few videos the intervals
    are too narrow. Every meter of the same number of clips sees the same draws, so that differences are paired.
    """

    resamples: int = 1000
    seed: int = 0

    def interval(self, clips: int, figure: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Give the bounds (...) of a figure; figure turns weights (R, clips) into its values (R, ...), NaN where it has none."""
        ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
        low, high = figure(_draws(clips, self.resamples, self.seed)).nanquantile(ends, dim=0)
        return low, high

    def describe(self) -> dict[str, str | int | float]:
        """Give what a reader of the intervals must know, for metrics.json."""
        return {
            "method": "percentile",
            "unit": "clips",
            "level_fraction": LEVEL,
            "resamples_count": self.resamples,
            "seed": self.seed,
        }


@lru_cache(maxsize=8)
def _draws(clips: int, resamples: int, seed: int) -> Tensor:
    """Give how often each clip stands in each resample: (R, clips)."""
    drawn = torch.randint(clips, (resamples, clips), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(resamples, clips, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))


class ClipSums:
    """Named float64 sums of each clip by frame and by place, over clips of any length; the field "tokens" tells what was counted.

    Memory: 8 bytes a field, clip and (frame or place).
    """

    def __init__(self, fields: Sequence[str], grid: tuple[int, int]) -> None:
        self.fields, self.grid = tuple(fields), grid
        self._frames: list[Tensor] = []  # (B, fields, t), frame 0 first
        self._places: list[Tensor] = []  # (B, fields, h * w)

    def add(self, first_frame: int, values: Mapping[str, Tensor]) -> None:
        """Add values (B, t, h, w), one tensor a field, for frames first_frame .. first_frame + t - 1 of B clips."""
        stacked = torch.stack([values[name].cpu().double() for name in self.fields], dim=1)
        self._frames.append(F.pad(reduce(stacked, "B field t h w -> B field t", "sum"), (first_frame, 0)))
        self._places.append(reduce(stacked, "B field t h w -> B field (h w)", "sum"))

    @property
    def clips(self) -> int:
        """Clips added."""
        return sum(map(len, self._frames))

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

"""How often each id stood at each place in training clips: what the baselines of vidgpt.metrics are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from vidtok.digits import split_digits

TABLE_ENTRIES = 1 << 26  # largest table of counts, 256 MB
PENDING_IDS = 1 << 22  # ids that are gathered before they are sorted into those counted


class PlaceCounts(Protocol):
    """Counts of ids at every place of a grid (h, w)."""

    def add(self, indices: Tensor) -> None:
        """Add ids (B, t, h, w), int64."""

    def ids(self) -> Tensor:
        """Give the ids (S,) that are told apart, ascending: all ids, or those seen."""

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Give where each of indices (...) stands in ids(), and whether it does: int64 and bool (...)."""

    def overall(self) -> Tensor:
        """Give how often each of ids() stood anywhere: int64 (S,)."""

    def at(self, indices: Tensor) -> Tensor:
        """Give how often each of indices (B, t, h, w) stood at its own place: float64."""

    def totals(self) -> tuple[Tensor, Tensor]:
        """Give how many ids, and how many different ones, stood at each place: two float64 (h, w)."""

    def likeliest(self, prior: Tensor, weights: Tensor, count: int) -> Tensor:
        """Give the `count` of ids() with the largest count + weight * prior, best first: (h, w, count); prior (S,), weights (h, w)."""


class Table:
    """Place counts of all ids as one table, where it fits into memory."""

    def __init__(self, size: int, grid: tuple[int, int]) -> None:
        self.size, self.table = size, torch.zeros(*grid, size, dtype=torch.int32)

    def add(self, indices: Tensor) -> None:
        """See PlaceCounts."""
        keys = (_places(indices) * self.size + indices).flatten()
        self.table.view(-1).scatter_add_(0, keys, torch.ones(len(keys), dtype=torch.int32))

    def ids(self) -> Tensor:
        """See PlaceCounts."""
        return torch.arange(self.size)

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See PlaceCounts."""
        return indices, torch.ones_like(indices, dtype=torch.bool)

    def overall(self) -> Tensor:
        """See PlaceCounts."""
        return self.table.sum((0, 1))

    def at(self, indices: Tensor) -> Tensor:
        """See PlaceCounts."""
        return self.table.view(-1)[_places(indices) * self.size + indices].double()

    def totals(self) -> tuple[Tensor, Tensor]:
        """See PlaceCounts."""
        return self.table.sum(-1).double(), (self.table > 0).sum(-1).double()

    def likeliest(self, prior: Tensor, weights: Tensor, count: int) -> Tensor:
        """See PlaceCounts; row by row, because a table of probabilities takes twice the memory of the counts."""
        rows = zip(self.table, rearrange(weights, "h w -> h w 1"), strict=True)
        return torch.stack([(row.double() + weight * prior).topk(count).indices for row, weight in rows])


class SeenIds:
    """Place counts of the ids really seen, sorted: memory grows with the data and not with the codebook."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        # Id 0 is told apart from the start, so that there is always one.
        self._ids, self._overall = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self._keys = self._counts = torch.zeros(0, dtype=torch.int64)  # place * S + index in _ids, ascending; how often
        self._pending: list[Tensor] = []
        self._num_pending = 0

    def add(self, indices: Tensor) -> None:
        """See PlaceCounts."""
        self._pending.append(torch.stack([_places(indices).flatten(), indices.flatten()]))
        self._num_pending += indices.numel()
        if self._num_pending >= max(PENDING_IDS, len(self._keys)):
            self._sort()

    def ids(self) -> Tensor:
        """See PlaceCounts."""
        self._sort()
        return self._ids

    def find(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See PlaceCounts."""
        return _find(self.ids(), indices)

    def overall(self) -> Tensor:
        """See PlaceCounts."""
        self._sort()
        return self._overall

    def at(self, indices: Tensor) -> Tensor:
        """See PlaceCounts."""
        index, is_known = self.find(indices)
        if not len(self._keys):
            return torch.zeros(indices.shape, dtype=torch.float64)
        key, is_there = _find(self._keys, _places(indices) * len(self._ids) + index)
        return torch.where(is_known & is_there, self._counts[key], 0).double()

    def totals(self) -> tuple[Tensor, Tensor]:
        """See PlaceCounts."""
        self._sort()
        places, cells = self._keys // len(self._ids), math.prod(self.grid)
        seen, distinct = torch.bincount(places, self._counts.double(), minlength=cells), torch.bincount(places, minlength=cells)
        return seen.double().view(self.grid), distinct.double().view(self.grid)

    def likeliest(self, prior: Tensor, weights: Tensor, count: int) -> Tensor:
        """See PlaceCounts; an id not seen at a place is among its best only if it is among the best of the prior."""
        size, best, places = len(self.ids()), prior.topk(count).indices, []
        bounds = torch.searchsorted(self._keys, torch.arange(weights.numel() + 1) * size).tolist()
        for weight, (start, end) in zip(weights.flatten(), pairwise(bounds), strict=True):
            here = self._keys[start:end] % size
            candidates = torch.cat([here, best[~torch.isin(best, here)]])
            scores = weight * prior[candidates]
            scores[: end - start] += self._counts[start:end]
            places.append(self._ids[candidates[scores.topk(count).indices]])
        return torch.stack(places).view(*self.grid, count)

    def _sort(self) -> None:
        """Sort pending ids in, which renumbers those seen before."""
        if not self._pending:
            return
        places, indices = torch.cat(self._pending, dim=1)
        old, self._ids = self._ids, torch.cat([self._ids, indices]).unique()
        size, renumbered = len(self._ids), torch.searchsorted(self._ids, old)
        former = self._keys // len(old) * size + renumbered[self._keys % len(old)]
        keys = torch.cat([former, places * size + torch.searchsorted(self._ids, indices)])
        counts = torch.cat([self._counts, torch.ones_like(indices)])
        self._keys, position = keys.unique(return_inverse=True)
        self._counts = torch.zeros_like(self._keys).scatter_add_(0, position, counts)
        self._overall = torch.zeros_like(self._ids).scatter_add_(0, self._keys % size, self._counts)
        self._pending, self._num_pending = [], 0


def _find(ascending: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Give where values (...) stand in a sorted vector, and whether they do."""
    index = torch.searchsorted(ascending, values.contiguous()).clamp(max=len(ascending) - 1)
    return index, ascending[index] == values


def _places(indices: Tensor) -> Tensor:
    """Number the places of indices (B, t, h, w) in raster order."""
    batch, frames, height, width = indices.shape
    return repeat(torch.arange(height * width), "(h w) -> B t h w", B=batch, t=frames, h=height)


class TokenCounts:
    """Count tokens of training clips: by place, and how often a token stays the same from one frame to the next."""

    def __init__(self, codebook_size: int, grid: tuple[int, int], factors: Sequence[int] = ()) -> None:
        """Take the ids of a frame (h, w), and the factors of an id's digits where it has several."""
        if codebook_size < 2:
            raise ValueError(f"got codebook_size {codebook_size}; baselines need at least 2: pass the tokenizer's codebook size")
        self.codebook_size, self.grid, self.factors = codebook_size, grid, tuple(factors) or (codebook_size,)
        assert math.prod(self.factors) == codebook_size
        is_small = math.prod(grid) * codebook_size <= TABLE_ENTRIES
        self.by_position: PlaceCounts = Table(codebook_size, grid) if is_small else SeenIds(grid)
        self.digits = [torch.zeros(factor, dtype=torch.int64) for factor in self.factors] if len(self.factors) > 1 else []
        self.pairs = 0
        self.same = 0

    def update(self, indices: Tensor) -> None:
        """Add clips (B, t, h, w) of ids in [0, codebook_size); raises ValueError on another grid or an id outside."""
        height, width = self.grid
        indices = indices.detach().cpu().long()
        if indices.ndim != 4 or indices.shape[2:] != (height, width):
            raise ValueError(
                f"got indices of shape {tuple(indices.shape)}; the counts are over (B, t, {height}, {width}): "
                "count tokens of one tokenizer and frame size"
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise ValueError(
                f"got ids from {int(indices.min())} to {int(indices.max())}; the codebook has 0 to {self.codebook_size - 1}: "
                "use the tokens and the card of one tokenizer"
            )
        self.by_position.add(indices)
        if self.digits:
            for counts, values in zip(self.digits, split_digits(indices, self.factors).unbind(-1), strict=True):
                counts += torch.bincount(values.flatten(), minlength=len(counts))
        stayed = indices[:, 1:] == indices[:, :-1]
        self.pairs += stayed.numel()
        self.same += int(stayed.sum())

    def unigram(self) -> Tensor:
        """Give p(id) of by_position.ids(): float64 (S,).

        Of one digit, counts are add-one smoothed. Of several, most ids were never seen and are not equally unlikely: they get the
        product of their digits' frequencies, with the weight of as many tokens as different ids were seen (Witten and Bell).
        """
        counts = self.by_position.overall().double()
        prior, weight = self._prior(self.by_position.ids(), counts)
        return (counts + prior) / (counts.sum() + weight)

    def unseen(self, indices: Tensor) -> Tensor:
        """Give p(id) of indices (...) that are not among by_position.ids(): float64."""
        counts = self.by_position.overall().double()
        prior, weight = self._prior(indices, counts)
        return prior / (counts.sum() + weight)

    def digit_unigrams(self) -> list[Tensor]:
        """Give p(value), add-one smoothed, of each of several digits: float64 (factor,)."""
        return [(counts.double() + 1) / (counts.sum() + len(counts)) for counts in self.digits]

    def same_probability(self) -> float:
        """Give p(a token equals the one before it at the same place), add-one smoothed."""
        return (self.same + 1) / (self.pairs + 2)

    def _prior(self, indices: Tensor, counts: Tensor) -> tuple[Tensor, int]:
        """Give the tokens that smoothing adds to each of indices (...), and to all ids together; counts: of every id."""
        if not self.digits:
            return torch.ones(indices.shape, dtype=torch.float64), self.codebook_size
        weight = max(1, int((counts > 0).sum()))
        values = split_digits(indices, self.factors).unbind(-1)
        shares = [unigram[value] for unigram, value in zip(self.digit_unigrams(), values, strict=True)]
        return weight * torch.stack(shares).prod(0), weight

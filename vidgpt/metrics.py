"""Token metrics and the baselines that give them meaning; nothing here knows of pixels.

Every figure is a sum over tokens, kept in float64 by (frame, row, column) and divided once at the end, so clips and
batches weigh by their token count. Separators and actions never enter: only picture tokens are scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

Figures = dict[str, float | int | None]
TOP = 5


@dataclass(frozen=True)
class TokenScores:
    """How well each true token was foretold; three float64 tensors of one shape (B, t, h, w)."""

    nats: Tensor  # -log p(true token)
    top1: Tensor  # 1 where the likeliest token is the true one
    top5: Tensor  # 1 where the true one is among the five likeliest


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score logits (B, t, h, w, V) against targets (B, t, h, w) in [0, V).

    The softmax runs over the V given entries in fp32: cut away ids that are illegal at these slots first. Of equal
    logits the lower id ranks first, as argmax has it.
    """
    chosen = rearrange(targets, "... -> ... 1")
    nats = -logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1)
    target_logits = logits.gather(-1, chosen)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    ahead = (logits > target_logits) | ((logits == target_logits) & (ids < chosen))
    rank = ahead.sum(-1)
    return TokenScores(*(x.cpu().double() for x in (nats, rank < 1, rank < TOP)))


def changed_tokens(indices: Tensor) -> Tensor:
    """Mark tokens that differ from the frame before, at the same place: (B, t, h, w) to bool (B, t - 1, h, w)."""
    return indices[:, 1:] != indices[:, :-1]


class GridSums:
    """Named float64 sums by (frame, row, column) over clips of any length; the field "tokens" tells what was counted."""

    def __init__(self, fields: Sequence[str], grid: tuple[int, int]) -> None:
        self.fields = tuple(fields)
        self.sums = torch.zeros(len(self.fields), 0, *grid, dtype=torch.float64)

    def add(self, first_frame: int, **values: Tensor) -> None:
        """Add values (B, t, h, w), one tensor a field, for frames first_frame .. first_frame + t - 1 of B clips."""
        stacked = torch.stack([reduce(values[name].cpu().double(), "B t h w -> t h w", "sum") for name in self.fields])
        end = first_frame + stacked.shape[1]
        missing = max(0, end - self.sums.shape[1])
        self.sums = torch.cat([self.sums, self.sums.new_zeros(len(self.fields), missing, *self.sums.shape[2:])], dim=1)
        self.sums[:, first_frame:end] += stacked

    def total(self) -> dict[str, float]:
        """Give the sum of each field over everything."""
        return dict(zip(self.fields, self.sums.sum((1, 2, 3)).tolist(), strict=True))

    def by_frame(self) -> dict[int, dict[str, float]]:
        """Give the sums of every frame index that was seen."""
        rows = rearrange(reduce(self.sums, "field t h w -> field t", "sum"), "field t -> t field").tolist()
        named = {frame: dict(zip(self.fields, row, strict=True)) for frame, row in enumerate(rows)}
        return {frame: row for frame, row in named.items() if row["tokens"]}

    def by_position(self) -> dict[tuple[int, int], dict[str, float]]:
        """Give the sums of every place (row, column) of the grid."""
        width = self.sums.shape[-1]
        cells = rearrange(reduce(self.sums, "field t h w -> field h w", "sum"), "field h w -> (h w) field").tolist()
        return {divmod(place, width): dict(zip(self.fields, cell, strict=True)) for place, cell in enumerate(cells)}


def ratio(part: float, whole: float) -> float | None:
    """Divide, or give None (null in JSON) where nothing was counted."""
    return part / whole if whole else None


class TokenMeter:
    """Accumulate teacher-forced scores over clips."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.tokens_per_frame = math.prod(grid)
        self.grid_sums = GridSums(("tokens", "nats", "top1", "top5", "changed", "changed_top1"), grid)

    def update(self, scores: TokenScores, changed: Tensor, first_frame: int = 1) -> None:
        """Add scores of B clips; changed: bool (B, t, h, w), see changed_tokens; first_frame: the clip's frame they begin at."""
        moved = changed.cpu().double()
        self.grid_sums.add(
            first_frame,
            tokens=torch.ones_like(scores.nats),
            nats=scores.nats,
            top1=scores.top1,
            top5=scores.top5,
            changed=moved,
            changed_top1=moved * scores.top1,
        )

    def summary(self) -> Figures:
        """Give every figure under a key that names its unit; None where nothing was counted."""
        figures = self._figures(self.grid_sums.total())
        bits = figures["cross_entropy_bits_per_token"]
        return figures | {"cross_entropy_bits_per_frame": None if bits is None else bits * self.tokens_per_frame}

    def by_frame(self) -> list[Figures]:
        """Give one row a frame index."""
        return [{"frame_index": frame} | self._figures(sums) for frame, sums in self.grid_sums.by_frame().items()]

    def by_position(self) -> list[Figures]:
        """Give one row a place of the grid."""
        return [{"row": y, "column": x} | self._figures(sums) for (y, x), sums in self.grid_sums.by_position().items()]

    @staticmethod
    def _figures(sums: dict[str, float]) -> Figures:
        nats = ratio(sums["nats"], sums["tokens"])
        return {
            "tokens_count": int(sums["tokens"]),
            "cross_entropy_nats_per_token": nats,
            "cross_entropy_bits_per_token": None if nats is None else nats / math.log(2),
            # Beyond 700 nats exp overflows; no codebook has e^700 entries, the cap only keeps the JSON finite.
            "perplexity_tokens": None if nats is None else math.exp(min(nats, 700.0)),
            "top1_accuracy_fraction": ratio(sums["top1"], sums["tokens"]),
            "top5_accuracy_fraction": ratio(sums["top5"], sums["tokens"]),
            "top1_accuracy_on_changed_tokens_fraction": ratio(sums["changed_top1"], sums["changed"]),
            "changed_tokens_fraction": ratio(sums["changed"], sums["tokens"]),
        }


class RolloutMeter:
    """Compare free-running futures with the real ones, by horizon; a frame's horizon is 1 for the first predicted frame."""

    def __init__(self, grid: tuple[int, int]) -> None:
        fields = ("tokens", "hits", "copy_hits", "changed", "changed_hits", "changed_generated")
        self.grid_sums = GridSums(fields, grid)

    def update(self, generated: Tensor, real: Tensor, last: Tensor) -> None:
        """Add generated and real frames (B, t, h, w) that follow the last given frame (B, h, w)."""
        first = rearrange(last, "B h w -> B 1 h w")
        changed = changed_tokens(torch.cat([first, real], dim=1))
        hits = generated == real
        self.grid_sums.add(
            0,
            tokens=torch.ones_like(real),
            hits=hits,
            copy_hits=real == first,
            changed=changed,
            changed_hits=hits & changed,
            changed_generated=changed_tokens(torch.cat([first, generated], dim=1)),
        )

    def summary(self) -> Figures:
        """Give every figure under a key that names its unit; None where nothing was counted."""
        return self._figures(self.grid_sums.total())

    def by_frame(self) -> list[Figures]:
        """Give one row a horizon."""
        return [{"horizon_frames": k + 1} | self._figures(sums) for k, sums in self.grid_sums.by_frame().items()]

    def by_position(self) -> list[Figures]:
        """Give one row a place of the grid."""
        return [{"row": y, "column": x} | self._figures(sums) for (y, x), sums in self.grid_sums.by_position().items()]

    @staticmethod
    def _figures(sums: dict[str, float]) -> Figures:
        return {
            "tokens_count": int(sums["tokens"]),
            "top1_accuracy_fraction": ratio(sums["hits"], sums["tokens"]),
            "top1_accuracy_on_changed_tokens_fraction": ratio(sums["changed_hits"], sums["changed"]),
            "copy_last_given_frame_accuracy_fraction": ratio(sums["copy_hits"], sums["tokens"]),
            "changed_tokens_real_fraction": ratio(sums["changed"], sums["tokens"]),
            "changed_tokens_generated_fraction": ratio(sums["changed_generated"], sums["tokens"]),
        }


class TokenCounts:
    """Count tokens of training clips: by place, and how often a token stays the same from one frame to the next."""

    def __init__(self, codebook_size: int, grid: tuple[int, int]) -> None:
        if codebook_size < 2:
            raise ValueError(f"got codebook_size {codebook_size}; baselines need at least 2: pass the tokenizer's codebook size")
        self.by_position = torch.zeros(*grid, codebook_size, dtype=torch.int32)
        self.pairs = 0
        self.same = 0

    def update(self, indices: Tensor) -> None:
        """Add clips (B, t, h, w) of ids in [0, codebook_size); raises ValueError on another grid or an id outside."""
        height, width, codebook_size = self.by_position.shape
        indices = indices.detach().cpu().long()
        if indices.ndim != 4 or indices.shape[2:] != (height, width):
            raise ValueError(
                f"got indices of shape {tuple(indices.shape)}; the counts are over (B, t, {height}, {width}): "
                "count tokens of one tokenizer and frame size"
            )
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < codebook_size:
            raise ValueError(
                f"got ids from {int(indices.min())} to {int(indices.max())}; the codebook has 0 to {codebook_size - 1}: "
                "use the tokens and the card of one tokenizer"
            )
        places = repeat(torch.arange(height * width), "(h w) -> B t h w", B=len(indices), t=indices.shape[1], h=height)
        flat = (places * codebook_size + indices).reshape(-1)
        self.by_position.view(-1).scatter_add_(0, flat, torch.ones(len(flat), dtype=torch.int32))
        stayed = ~changed_tokens(indices)
        self.pairs += stayed.numel()
        self.same += int(stayed.sum())

    def unigram(self) -> Tensor:
        """Give p(id), add-one smoothed: float64 (V,)."""
        counts = self.by_position.sum((0, 1)).double() + 1
        return counts / counts.sum()

    def same_probability(self) -> float:
        """Give p(a token equals the one before it at the same place), add-one smoothed."""
        return (self.same + 1) / (self.pairs + 2)


class Baselines:
    """Four forecasts without a network, made from training counts."""

    names = ("uniform", "unigram", "unigram_by_position", "copy_last_frame_smoothed")

    def __init__(self, counts: TokenCounts) -> None:
        self.counts = counts.by_position
        self.same_probability = counts.same_probability()
        self.unigram = counts.unigram()
        self.rank = torch.argsort(torch.argsort(self.unigram, descending=True, stable=True))
        self.seen = self.counts.sum(-1).double()
        # Witten-Bell back-off: a place that showed many different ids leaves more room for the overall frequencies.
        self.back_off = (self.counts > 0).sum(-1).clamp(min=1).double()
        self.top_by_position = torch.stack(
            [self._position_row(y).topk(min(TOP, len(self.unigram))).indices for y in range(self.counts.shape[0])]
        )

    def scores(self, indices: Tensor) -> dict[str, TokenScores]:
        """Score frames 1 .. t - 1 of clips (B, t, h, w) under every baseline."""
        indices = indices.detach().cpu().long()
        past, targets = indices[:, :-1], indices[:, 1:]
        return {
            "uniform": self._uniform(targets),
            "unigram": self._unigram(targets),
            "unigram_by_position": self._unigram_by_position(targets),
            "copy_last_frame_smoothed": self._copy_last_frame(past, targets),
        }

    def _position_row(self, y: int) -> Tensor:
        """Give p(id | row y, column): float64 (w, V)."""
        smoothed = self.counts[y].double() + rearrange(self.back_off[y], "w -> w 1") * self.unigram
        return smoothed / rearrange(self.seen[y] + self.back_off[y], "w -> w 1")

    def _uniform(self, targets: Tensor) -> TokenScores:
        """Score equal probabilities; a blind guess hits in one of V, which is entered as an exact expectation."""
        size = len(self.unigram)
        values = (math.log(size), 1 / size, min(TOP / size, 1.0))
        return TokenScores(*(torch.full(targets.shape, value, dtype=torch.float64) for value in values))

    def _unigram(self, targets: Tensor) -> TokenScores:
        """Score the overall frequency of ids."""
        rank = self.rank[targets]
        return TokenScores(-self.unigram[targets].log(), (rank < 1).double(), (rank < TOP).double())

    def _unigram_by_position(self, targets: Tensor) -> TokenScores:
        """Score the frequency of ids at this place, backed off to the overall frequency."""
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in targets.shape[2:]), indexing="ij")
        counted = self.counts[rows, columns, targets].double()
        probability = (counted + self.back_off * self.unigram[targets]) / (self.seen + self.back_off)
        hits = self.top_by_position == rearrange(targets, "... -> ... 1")
        return TokenScores(-probability.log(), hits[..., 0].double(), hits.any(-1).double())

    def _copy_last_frame(self, past: Tensor, targets: Tensor) -> TokenScores:
        """Score the id of the frame before; accuracy is that of copying, whatever the probabilities.

        Cross-entropy needs a distribution: the training share of unchanged tokens goes to the id before, the rest to the
        other ids by their overall frequency.
        """
        stays = past == targets
        moves = (1 - self.same_probability) * self.unigram[targets] / (1 - self.unigram[past])
        probability = torch.where(stays, torch.tensor(self.same_probability, dtype=torch.float64), moves)
        rank_among_others = self.rank[targets] - (self.rank[past] < self.rank[targets]).long()
        return TokenScores(-probability.log(), stays.double(), (stays | (rank_among_others < TOP - 1)).double())

"""Token metrics and the baselines that give them meaning; nothing here knows of pixels.

Every figure is a sum over tokens, kept in float64 by (frame, row, column) and divided once at the end, so clips and
batches weigh by their token count. Separators and actions never enter: only picture tokens are scored. A token is one id of a
place, also where a model predicts it in several digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, reduce
from torch import Tensor

from vidgpt.counts import TokenCounts
from vidtok.digits import split_digits

Figures = dict[str, float | int | None]
TOP = 5


@dataclass(frozen=True)
class TokenScores:
    """How well each true token was predicted; three float64 tensors of one shape (B, t, h, w)."""

    nats: Tensor  # -log p(true token)
    top1: Tensor  # 1 where the likeliest token is the true one
    top5: Tensor  # 1 where the true one is among the five likeliest; NaN where scores of digits do not tell it
    digits: tuple[TokenScores, ...] = ()  # of each digit, where a token has several and the forecaster tells them


def join_scores(digits: Sequence[TokenScores]) -> TokenScores:
    """Score tokens by their digits, each predicted given the true ones before it or independent of them.

    By the chain rule nats add up; a token is right where all its digits are, since greedy decoding finds it just then.
    """
    if len(digits) == 1:
        return digits[0]
    nats = torch.stack([digit.nats for digit in digits]).sum(0)
    top1 = torch.stack([digit.top1 for digit in digits]).prod(0)
    return TokenScores(nats, top1, torch.full_like(nats, math.nan), tuple(digits))


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score logits (..., V) against targets (...) in [0, V).

    The softmax runs over the V given entries in fp32: cut away ids that are illegal at these slots first. Of equal
    logits the lower id ranks first, as argmax has it.
    """
    chosen = rearrange(targets, "... -> ... 1")
    nats = -logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1)
    target_logits = logits.gather(-1, chosen)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    ahead = (logits > target_logits) | ((logits == target_logits) & (ids < chosen))
    rank = ahead.sum(-1)
    return TokenScores(nats.cpu().double(), (rank < 1).cpu().double(), (rank < TOP).cpu().double())


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


def known_ratio(part: float, whole: float) -> float | None:
    """Divide, or give None where nothing was counted or a part of it is not known (NaN)."""
    return None if math.isnan(part) else ratio(part, whole)


class TokenMeter:
    """Accumulate teacher-forced scores over clips."""

    def __init__(self, grid: tuple[int, int], num_digits: int = 1) -> None:
        self.tokens_per_frame = math.prod(grid)
        self.digits = [f"digit_{digit}" for digit in range(num_digits)] if num_digits > 1 else []
        fields = [f"{digit}_{field}" for digit in self.digits for field in ("nats", "top1")]
        self.grid_sums = GridSums(("tokens", "nats", "top1", "top5", "changed", "changed_top1", *fields), grid)

    def update(self, scores: TokenScores, changed: Tensor, first_frame: int = 1) -> None:
        """Add scores of B clips; changed: bool (B, t, h, w), see changed_tokens; first_frame: the clip's frame they begin at."""
        moved, unknown = changed.cpu().double(), torch.full_like(scores.nats, math.nan)
        digits = scores.digits or (TokenScores(unknown, unknown, unknown),) * len(self.digits)
        named = list(zip(self.digits, digits, strict=True))
        self.grid_sums.add(
            first_frame,
            tokens=torch.ones_like(scores.nats),
            nats=scores.nats,
            top1=scores.top1,
            top5=scores.top5,
            changed=moved,
            changed_top1=moved * scores.top1,
            **{f"{name}_nats": digit.nats for name, digit in named},
            **{f"{name}_top1": digit.top1 for name, digit in named},
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

    def _figures(self, sums: dict[str, float]) -> Figures:
        nats = ratio(sums["nats"], sums["tokens"])
        return {
            "tokens_count": int(sums["tokens"]),
            "cross_entropy_nats_per_token": nats,
            "cross_entropy_bits_per_token": None if nats is None else nats / math.log(2),
            # Beyond 700 nats exp overflows; no codebook has e^700 entries, the cap only keeps the JSON finite.
            "perplexity_tokens": None if nats is None else math.exp(min(nats, 700.0)),
            "top1_accuracy_fraction": ratio(sums["top1"], sums["tokens"]),
            "top5_accuracy_fraction": known_ratio(sums["top5"], sums["tokens"]),
            "top1_accuracy_on_changed_tokens_fraction": ratio(sums["changed_top1"], sums["changed"]),
            "changed_tokens_fraction": ratio(sums["changed"], sums["tokens"]),
            **{f"{name}_cross_entropy_nats_per_token": known_ratio(sums[f"{name}_nats"], sums["tokens"]) for name in self.digits},
            **{f"{name}_top1_accuracy_fraction": known_ratio(sums[f"{name}_top1"], sums["tokens"]) for name in self.digits},
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


class Baselines:
    """Four forecasts without a network, made from training counts; none depends on a model.

    Of ids with several digits, uniform and unigram also tell the same of each digit. These do not add up to the unigram of ids:
    an id's digits depend on each other.
    """

    names = ("uniform", "unigram", "unigram_by_position", "copy_last_frame_smoothed")

    def __init__(self, counts: TokenCounts) -> None:
        self.counts, self.places = counts, counts.by_position
        self.same_probability = counts.same_probability()
        self.unigram = counts.unigram()
        self.rank = _ranks(self.unigram)
        self.digits = [(unigram, _ranks(unigram)) for unigram in counts.digit_unigrams()]
        self.seen, distinct = self.places.totals()
        # Witten-Bell back-off: a place that showed many different ids leaves more room for the overall frequencies.
        self.back_off = distinct.clamp(min=1)
        self.top_by_position = self.places.likeliest(self.unigram, self.back_off, min(TOP, len(self.unigram)))

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

    def _look_up(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Give p(id) of indices (...) by overall frequency, and their rank: an id that was not seen ranks behind all others."""
        index, is_known = self.places.find(indices)
        probability, rank = self.unigram[index], self.rank[index]
        if is_known.all():
            return probability, rank
        probability = torch.where(is_known, probability, self.counts.unseen(indices))
        # Behind the first five too, of which fewer ids than that were seen.
        return probability, rank.masked_fill(~is_known, max(len(self.unigram), TOP))

    def _uniform(self, targets: Tensor) -> TokenScores:
        """Score equal probabilities; a blind guess hits in one of V, which is entered as an exact expectation."""
        digits = [_equal(len(unigram), targets.shape) for unigram, _ in self.digits]
        return replace(_equal(self.counts.codebook_size, targets.shape), digits=tuple(digits))

    def _unigram(self, targets: Tensor) -> TokenScores:
        """Score the overall frequency of ids, and that of the values of each digit."""
        values = split_digits(targets, self.counts.factors).unbind(-1) if self.digits else ()
        digits = [_frequent(unigram[value], rank[value]) for (unigram, rank), value in zip(self.digits, values, strict=True)]
        return replace(_frequent(*self._look_up(targets)), digits=tuple(digits))

    def _unigram_by_position(self, targets: Tensor) -> TokenScores:
        """Score the frequency of ids at this place, backed off to the overall frequency."""
        unigram, _ = self._look_up(targets)
        probability = (self.places.at(targets) + self.back_off * unigram) / (self.seen + self.back_off)
        hits = self.top_by_position == rearrange(targets, "... -> ... 1")
        return TokenScores(-probability.log(), hits[..., 0].double(), hits.any(-1).double())

    def _copy_last_frame(self, past: Tensor, targets: Tensor) -> TokenScores:
        """Score the id of the frame before; accuracy is that of copying, whatever the probabilities.

        Cross-entropy needs a distribution: the training share of unchanged tokens goes to the id before, the rest to the
        other ids by their overall frequency.
        """
        stays = past == targets
        (unigram, rank), (past_unigram, past_rank) = self._look_up(targets), self._look_up(past)
        moves = (1 - self.same_probability) * unigram / (1 - past_unigram)
        probability = torch.where(stays, torch.tensor(self.same_probability, dtype=torch.float64), moves)
        rank_among_others = rank - (past_rank < rank).long()
        return TokenScores(-probability.log(), stays.double(), (stays | (rank_among_others < TOP - 1)).double())


def _equal(size: int, shape: torch.Size) -> TokenScores:
    values = (math.log(size), 1 / size, min(TOP / size, 1.0))
    nats, top1, top5 = (torch.full(shape, value, dtype=torch.float64) for value in values)
    return TokenScores(nats, top1, top5)


def _ranks(unigram: Tensor) -> Tensor:
    """Give the rank of each id by its frequency (V,), 0 the most frequent; of equal ones the lower id ranks first."""
    return torch.argsort(torch.argsort(unigram, descending=True, stable=True))


def _frequent(probability: Tensor, rank: Tensor) -> TokenScores:
    return TokenScores(-probability.log(), (rank < 1).double(), (rank < TOP).double())

"""Forecasts without a network, which give a model's figures their meaning."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor

from vidgpt.counts import TokenCounts
from vidgpt.scores import TOP, TokenScores
from vidtok.digits import split_digits


class Baselines:
    """Four forecasts without a network, made from training counts; none depends on a model.

    None looks inside the frame that it predicts, so teacher-forced and temporally teacher-forced figures are the same.
    Of ids with several digits, uniform and unigram also tell the same of each digit. These do not add up to the unigram of ids:
    an id's digits depend on each other.
    """

    names = ("uniform", "unigram", "unigram_by_position", "copy_last_frame_smoothed")
    rollout_names = ("uniform", "unigram", "unigram_by_position", "copy_last_frame")

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

    def rollouts(self, last: Tensor, future: int) -> dict[str, Tensor]:
        """Give the likeliest frames (B, future, h, w) after the last given ones (B, h, w); uniform has none."""
        likeliest = self.places.ids()[self.unigram.argmax()]
        return {
            "unigram": likeliest.expand(len(last), future, *last.shape[1:]),
            "unigram_by_position": repeat(self.top_by_position[..., 0], "h w -> B t h w", B=len(last), t=future),
            "copy_last_frame": repeat(last, "B h w -> B t h w", t=future),
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
        digits = [
            _frequent(unigram[value], rank[value], float(unigram.max()))
            for (unigram, rank), value in zip(self.digits, values, strict=True)
        ]
        return replace(_frequent(*self._look_up(targets), float(self.unigram.max())), digits=tuple(digits))

    def _unigram_by_position(self, targets: Tensor) -> TokenScores:
        """Score the frequency of ids at this place, backed off to the overall frequency."""
        hits = self.top_by_position == rearrange(targets, "... -> ... 1")
        confidence = self._at_places(self.top_by_position[None, None, ..., 0]).expand(targets.shape)
        nats = -self._at_places(targets).log()
        return TokenScores(nats, hits[..., 0].double(), hits.any(-1).double(), confidence=confidence)

    def _at_places(self, indices: Tensor) -> Tensor:
        """Give p(id) of indices (B, t, h, w), each at its own place."""
        unigram, _ = self._look_up(indices)
        return (self.places.at(indices) + self.back_off * unigram) / (self.seen + self.back_off)

    def _copy_last_frame(self, past: Tensor, targets: Tensor) -> TokenScores:
        """Score the id of the frame before; accuracy is that of copying, whatever the probabilities.

        Cross-entropy needs a distribution: the training share of unchanged tokens goes to the id before, the rest to the
        other ids by their overall frequency. Its confidence is that share.
        """
        stays = past == targets
        (unigram, rank), (past_unigram, past_rank) = self._look_up(targets), self._look_up(past)
        moves = (1 - self.same_probability) * unigram / (1 - past_unigram)
        copied = torch.full(stays.shape, self.same_probability, dtype=torch.float64)
        rank_among_others = rank - (past_rank < rank).long()
        top5 = (stays | (rank_among_others < TOP - 1)).double()
        return TokenScores(-torch.where(stays, copied, moves).log(), stays.double(), top5, confidence=copied)


def _equal(size: int, shape: torch.Size) -> TokenScores:
    values = (math.log(size), 1 / size, min(TOP / size, 1.0), 1 / size)
    nats, top1, top5, confidence = (torch.full(shape, value, dtype=torch.float64) for value in values)
    return TokenScores(nats, top1, top5, confidence=confidence)


def _ranks(unigram: Tensor) -> Tensor:
    """Give the rank of each id by its frequency (V,), 0 the most frequent; of equal ones the lower id ranks first."""
    return torch.argsort(torch.argsort(unigram, descending=True, stable=True))


def _frequent(probability: Tensor, rank: Tensor, confidence: float) -> TokenScores:
    certain = torch.full(probability.shape, confidence, dtype=torch.float64)
    return TokenScores(-probability.log(), (rank < 1).double(), (rank < TOP).double(), confidence=certain)

"""How well one forecast told one true token; nothing here is averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

TOP = 5


@dataclass(frozen=True)
class TokenScores:
    """How well each true token was predicted; float64 tensors of one shape (B, t, h, w)."""

    nats: Tensor  # -log p(true token)
    top1: Tensor  # 1 where the likeliest token is the true one
    top5: Tensor  # 1 where the true one is among the five likeliest; NaN where scores of digits do not tell it
    digits: tuple[TokenScores, ...] = ()  # of each digit, where a token has several and the forecaster tells them
    confidence: Tensor = field(kw_only=True)  # p(likeliest token); NaN where scores of digits do not tell it


def join_scores(digits: Sequence[TokenScores], are_independent: bool = False) -> TokenScores:
    """Score tokens by their digits, each predicted given the true ones before it or independent of them.

    By the chain rule nats add up; a token is right where all its digits are, since greedy decoding finds it just then. The confidence
    in it is known of independent digits alone: others would have to be predicted given the likeliest ones before them.
    """
    if len(digits) == 1:
        return digits[0]
    nats = torch.stack([digit.nats for digit in digits]).sum(0)
    top1 = torch.stack([digit.top1 for digit in digits]).prod(0)
    unknown = torch.full_like(nats, math.nan)
    confidence = torch.stack([digit.confidence for digit in digits]).prod(0) if are_independent else unknown
    return TokenScores(nats, top1, unknown, tuple(digits), confidence=confidence)


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score logits (..., V) against targets (...) in [0, V).

    The softmax runs over the V given entries in fp32: cut away ids that are illegal at these slots first. Of equal
    logits the lower id ranks first, as argmax has it.
    """
    chosen = rearrange(targets, "... -> ... 1")
    log_probability = logits.float().log_softmax(-1)
    nats, confidence = -log_probability.gather(-1, chosen).squeeze(-1), log_probability.amax(-1).exp()
    target_logits = logits.gather(-1, chosen)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    ahead = (logits > target_logits) | ((logits == target_logits) & (ids < chosen))
    rank = ahead.sum(-1)
    nats, top1, top5, confidence = (part.cpu().double() for part in (nats, rank < 1, rank < TOP, confidence))
    return TokenScores(nats, top1, top5, confidence=confidence)


def map_scores(scores: Sequence[TokenScores], change: Callable[[Sequence[Tensor]], Tensor]) -> TokenScores:
    """Make one of several scores of one digit, tensor by tensor."""
    nats, top1, top5, confidence = (
        change([getattr(part, name) for part in scores]) for name in ("nats", "top1", "top5", "confidence")
    )
    return TokenScores(nats, top1, top5, confidence=confidence)


def changed_tokens(indices: Tensor) -> Tensor:
    """Mark tokens that differ from the frame before, at the same place: (B, t, h, w) to bool (B, t - 1, h, w)."""
    return indices[:, 1:] != indices[:, :-1]

"""From logits to ids: pure functions in fp32 that leave their inputs unchanged.

Order: legal ids -> temperature -> top-k -> top-p -> min-p -> draw. Every step turns a logit into -inf or leaves it.
Where an id has several digits, each is a draw of its own with the same options.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import LogitsProcessor

from vidgpt.layout import TokenLayout

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw from a distribution; the defaults draw from the model's own."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest id
    top_k: int = 0  # keep the k likeliest ids; 0 is off
    top_p: float = 1.0  # keep the fewest ids that together reach this probability; 1 is off
    min_p: float = 0.0  # keep ids at least this likely relative to the likeliest; 0 is off

    def __post_init__(self) -> None:
        """Raise ValueError on a value outside its range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"got temperature {self.temperature}; it must be 0 or more: use 0 for argmax, 1 for no change")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"got top_k {self.top_k}; it must be a whole number of 0 or more: use 0 to keep every id")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"got top_p {self.top_p}; it must be above 0 and at most 1: use 1 to keep every id")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"got min_p {self.min_p}; it must be from 0 to 1: use 0 to keep every id")

    @property
    def is_greedy(self) -> bool:
        """Tell whether the likeliest id is taken, without any randomness."""
        return self.temperature == 0


def generators(seed: int, count: int, device: torch.device | str = "cpu", first: int = 0) -> list[torch.Generator]:
    """Make the generators of sequences first .. first + count - 1.

    The state of each is a pure function of (seed, sequence number), so how sequences are batched changes no sample.
    """
    made = []
    for number in range(first, first + count):
        generator = torch.Generator(device=device)
        # Hashed, because CPU generators use 32 bits and sums such as seed + number would collide between runs.
        digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        made.append(generator)
    return made


def filter_logits(logits: Tensor, options: SamplingOptions, legal: Tensor | None = None) -> Tensor:
    """Give fp32 logits whose softmax is the distribution to draw from; excluded ids are -inf.

    logits: (..., V); legal: bool, broadcastable to it, True where an id may stand at this slot, at least one a row.
    """
    logits = logits.float()
    if legal is not None:
        logits = logits.masked_fill(~legal, MINUS_INFINITY)
    if options.is_greedy:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(ids != logits.argmax(-1, keepdim=True), MINUS_INFINITY)
    logits = logits / options.temperature
    if 0 < options.top_k < logits.shape[-1]:
        logits = _keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = _keep_top_p(logits, options.top_p)
    if options.min_p > 0:
        likeliest = logits.max(-1, keepdim=True).values
        logits = logits.masked_fill(logits < likeliest + math.log(options.min_p), MINUS_INFINITY)
    return logits


def _keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the k likeliest ids, and those equal to the k-th: which of equals survives would depend on the device."""
    threshold = logits.topk(top_k).values[..., -1:]
    return logits.masked_fill(logits < threshold, MINUS_INFINITY)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest ids up to and including the one that crosses top_p (Holtzman et al., arXiv:1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(excluded, MINUS_INFINITY)


def sample(logits: Tensor, options: SamplingOptions, generators: list[torch.Generator], legal: Tensor | None = None) -> Tensor:
    """Draw one id for every row of logits (B, V) or (B, ..., V); gives int64 (B,) or (B, ...).

    generators: one a sequence, so row i equals row i drawn alone in any batch; unused at temperature 0. Raises ValueError when
    their number is not B. An exponential race picks the id: the argmax of p / e with e ~ Exp(1) has probability p, an id of
    probability 0 never wins, and logits that differ by rounding give the same id but for near ties.
    """
    if options.is_greedy:
        return filter_logits(logits, options, legal).argmax(-1)
    if len(generators) != len(logits):
        raise ValueError(
            f"got {len(generators)} generators for {len(logits)} sequences; each needs its own: make them with generators()"
        )
    log_probabilities = filter_logits(logits, options, legal)
    noise = torch.stack(
        [
            torch.empty(row.shape, device=generator.device).exponential_(generator=generator)
            for row, generator in zip(log_probabilities, generators, strict=True)
        ]
    )
    # A draw of exactly 0 would turn an excluded id's -inf into NaN, which argmax prefers.
    noise = noise.to(logits.device).clamp(min=torch.finfo(noise.dtype).tiny)
    return (log_probabilities - noise.log()).argmax(-1)


class LayoutLogitsProcessor(LogitsProcessor):
    """Let transformers' generate write only legal sequences: values of the digit due in frames, the one given id in a lead slot.

    Prompts start at position 0 of the layout and hold no padding. With num_return_sequences or beams, rows of one prompt follow
    each other, as generate has them.
    """

    def __init__(self, layout: TokenLayout, actions: Tensor | None = None) -> None:
        """Take actions (B, t) up to the last frame to write, or None where leads are separators."""
        self.layout = layout
        self.actions = actions

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask scores (B, V) of the slot after input_ids (B, L); a forced lead scores 0. Raises ValueError past the actions."""
        slot = torch.tensor(input_ids.shape[1])
        ids = repeat(torch.arange(scores.shape[-1], device=scores.device), "V -> B V", B=len(scores))
        if not self.layout.is_lead(slot):
            digit = self.layout.due_digits(int(slot) % self.layout.tokens_per_frame - 1)[0]
            start, end = self.layout.spans[digit]
            return scores.masked_fill((ids < start) | (ids >= end), MINUS_INFINITY)
        lead = self._lead_ids(int(self.layout.coordinates(slot)[0]), len(scores)).to(scores.device)
        is_lead = ids == rearrange(lead, "B -> B 1")
        # A constant, not the model's score: a lead is never predicted, and its score may be anything, NaN and -inf included.
        return torch.zeros_like(scores).masked_fill(~is_lead, MINUS_INFINITY)

    def _lead_ids(self, frame: int, rows: int) -> Tensor:
        """Give the lead (rows,) of one frame."""
        actions = self.actions
        if actions is not None and self.layout.num_actions:
            if frame >= actions.shape[1] or rows % len(actions):
                raise ValueError(
                    f"got actions of shape {tuple(actions.shape)} for frame {frame} of {rows} sequences; "
                    "every frame of every sequence needs one: pass (B, t) up to the last frame"
                )
            actions = repeat(actions[:, : frame + 1], "B t -> (B copies) t", copies=rows // len(actions))
        return self.layout.leads(frame + 1, rows, actions)[:, frame]

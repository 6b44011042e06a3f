"""From logits to ids: pure functions in fp32 that leave their inputs unchanged.

Order: legal ids -> temperature -> top-k -> top-p -> min-p -> draw. Every step turns a logit into -inf or leaves it.
Where an id has several digits, each is a draw of its own with the same options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidgpt.generation import MINUS_INFINITY, LayoutLogitsProcessor
from vidgpt.layout import TokenLayout
from vidgpt.noise import exponential_noise, race

__all__ = ["LayoutLogitsProcessor", "Sampler", "SamplingOptions", "accept_or_resample", "filter_logits", "sample"]


LARGE = 1 << 16  # ids from which on the noise of all costs more than seeing which of them can win


@dataclass(frozen=True)
class SamplingOptions:
    """How to draw from a distribution; the defaults draw from the model's own."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest id
    top_k: int = 0  # keep the k likeliest ids; 0 is off
    top_p: float = 1.0  # keep the fewest ids that together reach this probability; 1 is off
    min_p: float = 0.0  # keep ids at least this likely relative to the likeliest; 0 is off
    frame_factor: float = 1.0  # multiplies the temperature with every frame drawn: below 1 a long rollout grows calmer

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
        if not 0 < self.frame_factor <= 2:
            raise ValueError(f"got frame_factor {self.frame_factor}; it must be above 0 and at most 2: use 1 for one temperature")

    @property
    def is_greedy(self) -> bool:
        """Tell whether the likeliest id is taken, without any randomness."""
        return self.temperature == 0


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


def sample(logits: Tensor, options: SamplingOptions, noise: Tensor | None = None, legal: Tensor | None = None) -> Tensor:
    """Draw one id for every row of logits (..., V); gives int64 (...).

    noise: Exp(1), of the shape of logits (vidgpt.noise), unused at temperature 0. Raises ValueError where it is missing otherwise.
    An exponential race picks the id: the argmax of p / e with e ~ Exp(1) has probability p, an id of probability 0 never wins, and
    logits that differ by rounding give the same id but for near ties.
    """
    if options.is_greedy:
        return (logits if legal is None else logits.masked_fill(~legal, MINUS_INFINITY)).argmax(-1)
    if noise is None or noise.shape != logits.shape:
        came = "none" if noise is None else f"noise of shape {tuple(noise.shape)}"
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need a number for every id, and {came} came: use exponential_noise()"
        )
    return (filter_logits(logits, options, legal) - noise.log()).argmax(-1)


def accept_or_resample(
    drafts: Tensor, wanted: Tensor, drawn_from: Tensor, uniform: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn ids drawn from one distribution into ids of another; gives ids (...) and which drafts were kept (...).

    drafts: (...), of the distributions drawn_from (..., V). wanted: (..., V), probabilities too, after all filters. uniform: (...) in
    (0, 1), and noise: Exp(1) (..., V), independent of each other and of the drafts. A draft is kept with probability
    min(1, wanted / drawn_from); in its place comes a draw from what of `wanted` lies above `drawn_from`. Source: arXiv:2211.17192.

    This is the textbook rule, for drafts of a true distribution. Decoding does not use it: its guesses are certain, and it keeps one
    exactly where `sample` draws the same id, which is as probable as here (`wanted` at the guess) and gives plain decoding's very ids.
    """
    ours, theirs = (odds.gather(-1, drafts[..., None])[..., 0] for odds in (wanted, drawn_from))
    is_kept = uniform * theirs < ours
    above = (wanted - drawn_from).clamp(min=0)
    # Equal but for rounding: nothing lies above, and a draft that is refused by a hair is drawn again.
    above = torch.where(above.sum(-1, keepdim=True) > 0, above, wanted)
    return torch.where(is_kept, drafts, (above / noise).argmax(-1)), is_kept


@dataclass(frozen=True)
class Sampler:
    """Draws input ids for places of a layout; a draw depends on its logits, sequence and position alone.

    keys: (B,) of vidgpt.noise.sequence_keys. first_frames: (B, 1), the frame of each sequence that is drawn first, for frame_factor.
    """

    layout: TokenLayout
    options: SamplingOptions
    keys: Tensor
    first_frames: Tensor | int = field(default=0, kw_only=True)

    def draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Give input ids (B, n) for picture slots at positions (B, n), from the logits (B, n, num_logits) that predict them."""
        return self.guess(logits, positions)

    def guess(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Give what `draw` would, of logits that are guesses themselves: with the same noise, so that good guesses are drawn alike."""
        layout, factor = self.layout, self.options.frame_factor
        if factor != 1:
            drawn = positions // layout.tokens_per_frame - self.first_frames
            # Bounded, because a rollout without end would reach 0 or infinity.
            logits = logits / (factor ** drawn.double()).clamp(1e-2, 1e2).to(logits.dtype)[..., None]
        if layout.slots_per_place > 1:
            return self._draw(logits, positions, 0, layout.legal_ids(positions))
        # Cut off before any filter sees them: leads are never drawn.
        parts = [self._draw(logits[..., start:end], positions, digit) for digit, (start, end) in enumerate(layout.spans)]
        return layout.token(parts, 0)

    def _draw(self, logits: Tensor, positions: Tensor, digit: int, legal: Tensor | None = None) -> Tensor:
        size = logits.shape[-1]
        # On a GPU the arithmetic costs less than asking how many ids can win.
        if self.options.is_greedy or size < LARGE or logits.device.type != "cpu":
            return sample(logits, self.options, self._noise(positions, size, digit), legal)
        return race(filter_logits(logits, self.options, legal), self.keys, positions, digit)

    def _noise(self, positions: Tensor, size: int, digit: int) -> Tensor | None:
        return None if self.options.is_greedy else exponential_noise(self.keys, positions, size, digit)

"""What a model may look at when it predicts a token. Three regimes that never share a figure:

- teacher-forced: all real tokens before it, those of its own frame too.
- temporally teacher-forced: all real frames before its own, but inside its frame only what the model itself has drawn.
- free-running: the given frames, and behind them only what the model itself has drawn (vidgpt.decoding.stream).

The names are those of the 1X world model challenge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.masks import causal, rule_of
from vidgpt.model import VidGPTForCausalLM
from vidgpt.noise import sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions
from vidgpt.scores import TokenScores, join_scores, map_scores, score_logits

HELD_LOGITS = 1 << 25  # at once: 128 MB in fp32
HELD_CACHE = 1 << 30  # bytes of keys and values at once


@torch.no_grad()
def teacher_forced_scores(model: nn.Module, layout: TokenLayout, indices: Tensor, actions: Tensor | None) -> TokenScores:
    """Score every token after the first frame, given all true tokens before it; leads are neither scored nor candidates.

    indices: (B, t, h, w), where the model's weights are; actions: (B, t) or None. Gives scores of shape (B, t - 1, h, w).
    """
    frames, height = indices.shape[1:3]
    targets = rearrange(layout.split(indices[:, 1:]), "B t h w q -> q B (t h w)")
    scores: dict[int, list[TokenScores]] = {digit: [] for digit in range(layout.num_digits)}
    for digit, piece, logits in forced_logits(model, layout, indices, actions):
        scores[digit].append(score_logits(logits, targets[digit][:, piece]))

    def as_grid(parts: Sequence[Tensor]) -> Tensor:
        return rearrange(torch.cat(list(parts), dim=1), "B (t h w) -> B t h w", t=frames - 1, h=height)

    return join_scores([map_scores(pieces, as_grid) for pieces in scores.values()], layout.is_parallel)


@torch.no_grad()
def forced_logits(
    model: nn.Module, layout: TokenLayout, indices: Tensor, actions: Tensor | None
) -> Iterator[tuple[int, slice, Tensor]]:
    """Give, piece by piece, what a model says of every token after the first frame, given all true tokens before it.

    Arguments as of teacher_forced_scores. Gives (digit, places, logits): logits (B, n, values of the digit) of the n places that the
    slice takes of the (t - 1) h w behind the first frame. The pieces of a digit come in the order of their places and cover them once.
    """
    predict = _predictor(model, layout, layout.flatten(indices, actions))
    # At most a frame at a time: the fp32 softmax of a whole clip would double the memory that its logits take.
    rows = max(1, min(layout.cells, HELD_LOGITS // (len(indices) * layout.num_logits)))
    for slot in range(layout.slots_per_place):
        positions = layout.positions_of(slot, indices.shape[1])[layout.cells :].to(indices.device)
        for at in range(0, len(positions), rows):
            logits = predict(positions[at : at + rows])
            for digit, due in zip(layout.due_digits(slot), layout.due_logits(logits, slot), strict=True):
                yield digit, slice(at, at + rows), due


def _predictor(model: nn.Module, layout: TokenLayout, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Give a function from positions (n,) of input_ids (B, L) to the logits (B, n, V) that predict them.

    Where there are more than HELD_LOGITS, they are computed when asked for.
    """
    if isinstance(model, VidGPTForCausalLM) and input_ids.numel() * layout.num_logits > HELD_LOGITS:
        network, hidden_states = model, model.model(input_ids).last_hidden_state
        return lambda positions: network.lm_head(hidden_states[:, positions - 1])
    logits = model(input_ids).logits
    return lambda positions: logits[:, positions - 1]


@dataclass(frozen=True)
class ForcedFrames:
    """What a model makes of every frame after the first, from the real frames before it."""

    generated: Tensor  # (B, t - 1, h, w), its own tokens
    scores: TokenScores  # of the real tokens, each under what the model says behind its own tokens


class FrameReader(Protocol):
    """Reads the slots of frames 1 .. t - 1 side by side, each frame behind the real ones before it."""

    def read(self, slot: int, ids: Tensor) -> Tensor:
        """Take the ids (B, t - 1) that stand in slot `slot` of each frame, 0 the lead; gives the logits (B, t - 1, V) of the next one."""


@torch.no_grad()
def temporally_forced(
    model: FusedModel | nn.Module,
    layout: TokenLayout,
    indices: Tensor,
    actions: Tensor | None,
    options: SamplingOptions | None = None,
    seed: int = 0,
    first_sequence: int = 0,
) -> ForcedFrames:
    """Let a model draw each frame from the real ones before it, and score the real tokens under what it says on the way.

    All frames of a clip are drawn at once: a pass reads one slot of each. The frames are those of stream_tokens with the same seed and
    first_sequence, the real past as context and a future of 1. indices, actions, model: as of teacher_forced_scores, or the fused
    copy of a model, without which every slot costs a pass over everything.
    """
    options, frames = options or SamplingOptions(temperature=0.0), indices.shape[1]
    input_ids = layout.flatten(indices, actions)
    reader: FrameReader = (
        FusedFrames(model, input_ids) if isinstance(model, FusedModel) else PlainFrames(model, layout, input_ids)
    )
    begins = torch.arange(1, frames, device=indices.device)[None] * layout.tokens_per_frame
    keys = sequence_keys(seed, len(indices), indices.device, first=first_sequence)
    # Every frame is the first that is drawn.
    sampler = Sampler(layout, options, keys, first_frames=begins // layout.tokens_per_frame)
    targets = rearrange(layout.split(indices[:, 1:]), "B t h w q -> (h w) q B t")
    scores: dict[int, list[TokenScores]] = {digit: [] for digit in range(layout.num_digits)}
    ids, drawn = input_ids[:, layout.tokens_per_frame :: layout.tokens_per_frame], []
    for slot in range(layout.slots_per_frame):
        logits = reader.read(slot, ids)
        ids = sampler.draw(logits, (begins + slot + 1).expand(len(indices), -1))
        drawn.append(ids)
        for digit, due in zip(layout.due_digits(slot), layout.due_logits(logits, slot), strict=True):
            scores[digit].append(score_logits(due, targets[slot // layout.slots_per_place, digit]))

    def as_grid(parts: Sequence[Tensor]) -> Tensor:
        return rearrange(torch.stack(list(parts)), "(h w) B t -> B t h w", h=layout.height)

    generated = layout.frame(rearrange(torch.stack(drawn), "slot B t -> (B t) slot"))
    return ForcedFrames(
        rearrange(generated, "(B t) h w -> B t h w", t=frames - 1),
        join_scores([map_scores(pieces, as_grid) for pieces in scores.values()], layout.is_parallel),
    )


def forced_batch_size(model: FusedModel, frames: int, most: int) -> int:
    """Give for how many clips of so many frames the keys and values of temporally_forced fit into HELD_CACHE: 1 to `most`."""
    slots = 2 * (frames - 1) * model.layout.tokens_per_frame
    a_clip = 2 * slots * len(model.layers) * model.groups * model.head_dim * model.dtype.itemsize
    return max(1, min(most, HELD_CACHE // max(1, a_clip)))


class PlainFrames:
    """A FrameReader of any model(input_ids).logits: slow, and the reference for the other."""

    def __init__(self, model: nn.Module, layout: TokenLayout, input_ids: Tensor) -> None:
        self.model, size = model, layout.tokens_per_frame
        self.rows = [input_ids[:, :begin] for begin in range(size, input_ids.shape[1], size)]

    def read(self, slot: int, ids: Tensor) -> Tensor:
        """See FrameReader."""
        self.rows = [torch.cat([row, own[:, None]], dim=1) for row, own in zip(self.rows, ids.unbind(1), strict=True)]
        return torch.stack([self.model(row).logits[:, -1] for row in self.rows], dim=1)


class FusedFrames:
    """A FrameReader that reads the real frames once; every frame keeps its own tokens behind them, seen by none but itself.

    Fewer frames a pass would see fewer keys in vain, but attention over 6 queries takes longer than over 23 (tried on a CPU core).
    """

    def __init__(self, model: FusedModel, input_ids: Tensor) -> None:
        self.model, size = model, model.layout.tokens_per_frame
        self.past, self.frames = input_ids.shape[1] - size, input_ids.shape[1] // size - 1
        self.cache = model.new_cache(2 * self.past, len(input_ids))
        positions = torch.arange(self.past, device=input_ids.device)
        self.begins, self.real = (1 + torch.arange(self.frames, device=input_ids.device)) * size, positions
        self.rule = rule_of(model.config)
        mask = None if self.rule is causal else self._mask(self.rule(positions[:, None], positions))
        self._read(input_ids[:, : self.past], positions, positions, self.past, mask)

    def read(self, slot: int, ids: Tensor) -> Tensor:
        """See FrameReader."""
        positions, end = self.begins + slot, self.past + (slot + 1) * self.frames
        earlier = (self.real < self.begins[:, None]) & self.rule(positions[:, None], self.real)
        own = torch.eye(self.frames, dtype=torch.bool, device=ids.device).repeat(1, slot + 1)
        slots, mask = torch.arange(end - self.frames, end, device=ids.device), self._mask(torch.cat([earlier, own], dim=1))
        return self.model.logits(self._read(ids, positions, slots, end, mask))

    def _read(self, ids: Tensor, positions: Tensor, slots: Tensor, end: int, mask: Tensor | None) -> Tensor:
        """Read ids (B, n) at positions (n,) into slots (n,); gives the states (B, n, D)."""
        places, turns = positions[None] % self.model.layout.tokens_per_frame, self.model.turns(positions[None])
        with self.cache.writing(slots[None], end):
            return self.model.read(ids, places, turns, self.cache, mask, is_causal=mask is None, keep=len(positions))

    def _mask(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, float("-inf"))[None, None]

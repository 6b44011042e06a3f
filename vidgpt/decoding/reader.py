"""What a rollout has drawn and read, and the one way in which plans read on: ids at positions, into the cache, for logits.

A position counts from where the longest context of the batch begins; rows of shorter ones begin later (`starts`), and what lies
before is seen by nobody. The last slot of the newest frame is drawn, but read only together with what comes next.
"""

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel, Turns
from vidgpt.masks import MaskRule, causal, rule_of
from vidgpt.sampling import Sampler

MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class Queries:
    """Positions to be read, with all that a pass needs to know of them: made once for many passes."""

    positions: Tensor  # (1, n), or (B, n) where rows differ
    places: Tensor  # the same shape: slots within the frame
    turns: Turns
    mask: Tensor | None  # (B or 1, 1, n, slots); None where all that is read may be attended

    def part(self, start: int, stop: int) -> "Queries":
        """Give queries start .. stop - 1."""
        turns = Turns(self.turns.cos[:, start:stop], self.turns.sin[:, start:stop])
        mask = None if self.mask is None else self.mask[:, :, start:stop]
        return Queries(self.positions[:, start:stop], self.places[:, start:stop], turns, mask)

    def unmasked(self) -> "Queries":
        """Let the queries attend all that is read."""
        return replace(self, mask=None)

    def at(self, index: Tensor) -> "Queries":
        """Give other queries for each row; index: (B, n) of the queries (1, m) here."""
        turns = Turns(*(_at(part, index) for part in (self.turns.cos, self.turns.sin)))
        mask = None if self.mask is None else _at(self.mask[:, 0], index)[:, None]
        return Queries(_at(self.positions, index), _at(self.places, index), turns, mask)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Give (B, n, ...) of table (1 or B, m, ...) at index (B, n)."""
    if len(table) == 1:
        return table[0][index]
    rows = torch.arange(len(table), device=index.device)[:, None]
    return table[rows, index.expand(len(table), -1) if len(index) == len(table) else index.repeat(len(table) // len(index), 1)]


@dataclass
class Reader:
    """The state of a rollout; a plan advances it frame by frame, and no module keeps any.

    num_frames: frames that fit into the cache. A model with a sliding window writes new frames over those that it no longer sees.
    guidance: how far to go from the logits without actions to those with them; 1 is those with them, and reads half as much.
    """

    model: FusedModel
    sampler: Sampler
    work: Work
    batch: int
    num_frames: int
    guidance: float = 1.0
    rule: MaskRule = causal  # what the plan lets a token see; the model's own window comes on top
    starts: Tensor | None = field(init=False, default=None)  # (B,) whole frames; None where all rows begin at 0
    drawn_before: Tensor | int = field(init=False, default=0)  # (B, 1) positions that each row has drawn before position 0
    length: int = field(init=False, default=0)  # positions drawn, whole frames
    context_states: Tensor = field(init=False)  # (B, up to a frame, D), what prefill read last

    def __post_init__(self) -> None:
        """Allocate the cache and room for the ids."""
        self.layout, self.device = self.model.layout, self.model.device
        config, size = self.model.config, self.model.layout.tokens_per_frame
        self.is_guided = self.guidance != 1
        self.cache = self.model.new_cache(
            self.num_frames * size, self.batch * (2 if self.is_guided else 1), config.sink_frames * size
        )
        self.tokens = torch.zeros(self.batch, 0, dtype=torch.long, device=self.device)

    @property
    def frames(self) -> int:
        """Give the frames of the longest row."""
        return self.length // self.layout.tokens_per_frame

    @property
    def is_plain(self) -> bool:
        """Tell whether causality alone decides what a token sees."""
        return self.rule is causal and self.starts is None and not self.model.config.attention_frames

    def prefill(self, context: Tensor, starts: Tensor | None = None, drawn_before: Tensor | int = 0) -> None:
        """Begin with whole frames, input_ids (B, L): read all but the last slot."""
        started = time.perf_counter()
        self.cache.reset()
        self.starts, self.drawn_before, self.length = starts, drawn_before, 0
        self.tokens, self.length = context, context.shape[1]
        positions = torch.arange(self.length - 1, device=self.device)
        queries = self.queries(positions, self.length - 1, use_mask=not self.is_plain)
        keep = min(self.length - 1, self.layout.tokens_per_frame)
        self.context_states = self.read(queries, self.length - 1, is_causal=self.is_plain, keep=keep)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the time would be that of asking for it
        self.work.prefills += 1
        self.work.prefill_seconds += time.perf_counter() - started

    def repeat(self, samples: int, sampler: Sampler) -> None:
        """Let every row stand `samples` times, row by row: several futures of one context share its prefill."""
        self.cache.repeat_rows(samples)
        self.batch, self.sampler = self.batch * samples, sampler
        self.tokens, self.context_states = (part.repeat_interleave(samples, dim=0) for part in (self.tokens, self.context_states))
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(samples)

    def extend(self, leads: Tensor) -> None:
        """Make room for frames behind the newest one, whose leads (B, n) are given."""
        room = self.tokens.new_zeros(self.batch, leads.shape[1], self.layout.tokens_per_frame)
        room[:, :, 0] = leads
        self.tokens = torch.cat([self.tokens[:, : self.length], room.flatten(1)], dim=1)

    def queries(self, positions: Tensor, end: int, rule: MaskRule | None = None, use_mask: bool = True) -> Queries:
        """Prepare to read positions (n,), the same for all rows, when positions up to `end` are in the cache or being written.

        rule: who may be attended, the plan's by default.
        """
        own = positions[None]
        if self.starts is not None:
            own = (own - self.starts[:, None]).clamp(min=0)
        mask = self._mask(positions, end, rule or self.rule) if use_mask else None
        return Queries(positions[None], positions[None] % self.layout.tokens_per_frame, self.model.turns(own), mask)

    def logits(self, states: Tensor) -> Tensor:
        """Give the logits (B, n, num_logits) of what comes next, from what `read` gives."""
        logits = self.model.logits(states)
        if self.is_guided:
            given, free = logits.chunk(2)
            logits = free + self.guidance * (given - free)
        return logits

    def read(
        self,
        queries: Queries,
        end: int,
        ids: Tensor | None = None,
        slots: Tensor | None = None,
        is_causal: bool = False,
        keep: int = 1,
    ) -> Tensor:
        """Read queries in one forward pass; gives the states (B, or with guidance 2 B, keep, D) of the last ones, for `logits`.

        ids: (B, n), by default those drawn at their positions. slots: (1, n) positions under which to write, by default their own.
        end: above all positions in use, those of this pass included.
        """
        positions, mask, turns = queries.positions, queries.mask, queries.turns
        if ids is None:
            ids = self.tokens.index_select(1, positions[0]) if len(positions) == 1 else self.tokens.gather(1, positions)
        writes = positions if slots is None else slots
        if self.is_guided:
            ids = torch.cat([ids, self.layout.without_actions(ids)])
            twice = len(writes) > 1
            writes = writes.repeat(2, 1) if twice else writes
            turns = Turns(turns.cos.repeat(2, 1, 1, 1), turns.sin.repeat(2, 1, 1, 1)) if len(turns.cos) > 1 else turns
            mask = mask.repeat(2, 1, 1, 1) if mask is not None and len(mask) > 1 else mask
        with self.cache.writing(writes, end) as in_slots:
            mask = None if mask is None else mask[..., : in_slots.shape[1]]
            places = queries.places if not self.is_guided or len(queries.places) == 1 else queries.places.repeat(2, 1)
            states = self.model.read(ids, places, turns, self.cache, mask, is_causal, keep)
        self.work.forward_passes += 1
        return states

    def draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draw ids (B, n) for positions (1 or B, n) from the logits that predict them."""
        return self.sampler.draw(logits, self._own(positions))

    def guess(self, states: Tensor, positions: Tensor) -> Tensor:
        """Guess ids (B, n) for positions (1 or B, n) by the draft head, from the states of a frame before those that predict them."""
        # Guided or not: a guess is a guess.
        return self.sampler.guess(self.model.draft_logits(states[: self.batch]), self._own(positions))

    def _own(self, positions: Tensor) -> Tensor:
        """Give positions (1 or B, n) as each row counts them, (B, n)."""
        own = positions + self.drawn_before
        if self.starts is not None:
            own = own - self.starts[:, None]
        return own.expand(self.batch, -1)

    def _mask(self, positions: Tensor, end: int, rule: MaskRule) -> Tensor:
        keys = self.cache.slot_positions(end, self.device)
        allowed = rule_of(self.model.config, rule)(positions[:, None], keys[None])[None, None]
        if self.starts is not None:
            begun, is_own = (where[None] >= self.starts[:, None] for where in (positions, keys))
            # Before its start a row has nothing to see: every token there keeps itself, or its softmax would be NaN.
            alone = (positions[:, None] == keys) & ~begun[:, None, :, None]
            allowed = (allowed & is_own[:, None, None]) | alone
        return torch.zeros(allowed.shape, dtype=self.model.dtype, device=self.device).masked_fill_(~allowed, MINUS_INFINITY)

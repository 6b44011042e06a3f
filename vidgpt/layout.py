"""The one place that knows how a frame grid, actions and special ids become one sequence and back.

A frame is one lead slot and then its h * w places in raster order. The lead of the first frame is `bos_id`; of a later one
`separator_id`, or, in a model of actions, the action that led to the frame. A lead is given, never predicted.
A token's position is its index in the whole sequence, so an engine that counts positions gives the right phases.

Outside, an id of a large or residual codebook is one integer a place; here it has digits (vidtok.digits, coarsest first).
With digits="slots" each digit takes a slot of its own, beside those of its place, and has ids of its own. With "parallel"
a place is one slot that holds the whole id, and its digits are predicted together, independent of each other given the past.
With one digit, the common case, the two are the same.

Travels with exported models (vidgpt.exporting), so it imports torch alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vidgpt.config import VidGPTConfig
from vidtok.digits import pack_digits, unpack_digits

IGNORED = -100


@dataclass(frozen=True)
class TokenLayout:
    """Sizes of one frame and of the vocabulary: picture ids first, then bos, separator, actions."""

    codebook_size: int
    height: int
    width: int
    num_actions: int = 0
    factors: tuple[int, ...] = ()  # how many values each digit has, their product is codebook_size; () is one digit
    digits: str = "slots"

    def __post_init__(self) -> None:
        """Fill in the factors."""
        object.__setattr__(self, "factors", tuple(self.factors) or (self.codebook_size,))
        assert math.prod(self.factors) == self.codebook_size

    @classmethod
    def from_config(cls, config: VidGPTConfig) -> "TokenLayout":
        """Read the sizes from a model's config."""
        factors = tuple(config.factors or ())
        return cls(config.codebook_size, config.grid_height, config.grid_width, config.num_actions, factors, digits=config.digits)

    @property
    def num_digits(self) -> int:
        """Digits of an id."""
        return len(self.factors)

    @property
    def is_parallel(self) -> bool:
        """Tell whether one slot holds several digits."""
        return self.digits == "parallel" and self.num_digits > 1

    @property
    def slots_per_place(self) -> int:
        """Slots that a place of the grid takes."""
        return 1 if self.is_parallel else self.num_digits

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Give the first logit, and row of the embedding, of each digit and the one after its last; special ids follow."""
        return list(pairwise(accumulate(self.factors, initial=0)))

    @property
    def bos_id(self) -> int:
        """Lead of the first frame."""
        return self.codebook_size if self.is_parallel else sum(self.factors)

    @property
    def separator_id(self) -> int:
        """Lead of a later frame in a model without actions."""
        return self.bos_id + 1

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the values of every digit, two specials and the actions. All ids lie below it, but in parallel."""
        return sum(self.factors) + 2 + self.num_actions

    @property
    def num_logits(self) -> int:
        """Logits a slot: one a row of the embedding, in parallel the values of every digit alone."""
        return sum(self.factors) if self.is_parallel else self.vocab_size

    @property
    def cells(self) -> int:
        """Places a frame."""
        return self.height * self.width

    @property
    def slots_per_frame(self) -> int:
        """Picture slots a frame."""
        return self.cells * self.slots_per_place

    @property
    def tokens_per_frame(self) -> int:
        """Lead and picture slots a frame."""
        return self.slots_per_frame + 1

    def is_lead(self, positions: Tensor) -> Tensor:
        """Tell which positions are lead slots."""
        return positions % self.tokens_per_frame == 0

    def coordinates(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give (t, h, w) of positions; a lead stands left of its frame's first place, at (t, 0, -1), digits all at their place."""
        place = (positions % self.tokens_per_frame - 1) // self.slots_per_place
        row = place.clamp(min=0) // self.width
        return positions // self.tokens_per_frame, row, place - row * self.width

    def positions_of(self, slot: int, num_frames: int) -> Tensor:
        """Give the position of slot `slot`, 0 .. slots_per_place - 1, of every place of num_frames frames, in order: (t * h * w,)."""
        frames = torch.arange(num_frames)[:, None] * self.tokens_per_frame
        return (frames + 1 + slot + torch.arange(self.cells) * self.slots_per_place).flatten()

    def due_digits(self, slot: int) -> range:
        """Give the digits that stand in picture slot `slot` of a frame, 0 .. slots_per_frame - 1."""
        first = slot % self.slots_per_place
        return range(self.num_digits) if self.is_parallel else range(first, first + 1)

    def legal_ids(self, positions: Tensor) -> Tensor:
        """Tell which ids (..., vocab_size) may stand in the picture slots at positions (...), where each digit has a slot of its own."""
        bounds = torch.tensor(self.spans, device=positions.device)[(positions % self.tokens_per_frame - 1) % self.slots_per_place]
        ids = torch.arange(self.vocab_size, device=positions.device)
        return (ids >= bounds[..., :1]) & (ids < bounds[..., 1:])

    def due_logits(self, logits: Tensor, slot: int) -> list[Tensor]:
        """Cut the logits (..., num_logits) that predict picture slot `slot` into one (..., factor) for each digit due there."""
        return [logits[..., slice(*self.spans[digit])] for digit in self.due_digits(slot)]

    def token(self, digits: Sequence[Tensor], slot: int) -> Tensor:
        """Give the input id, of any shape, of picture slot `slot` from the digits due there."""
        if self.is_parallel:
            return self.join(torch.stack(list(digits), dim=-1))
        return digits[0] + self.spans[self.due_digits(slot)[0]][0]

    def split(self, indices: Tensor) -> Tensor:
        """Give the digits (..., Q) of indices (...), unchecked: a check makes every step wait for the GPU."""
        return unpack_digits(indices, self.factors)

    def join(self, digits: Tensor) -> Tensor:
        """Give the indices (...) of digits (..., Q): the inverse of split, unchecked too."""
        return pack_digits(digits, self.factors)

    def embedding_rows(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Give, in parallel, the embedding's rows (..., Q) of the digits of input_ids (...), and which ids are leads.

        A lead has its own row in every place of Q.
        """
        is_lead = input_ids >= self.codebook_size
        lead_rows = (input_ids - self.codebook_size + sum(self.factors))[..., None]
        rows = self._rows(input_ids.masked_fill(is_lead, 0))
        return torch.where(is_lead[..., None], lead_rows, rows), is_lead

    def leads(self, num_frames: int, batch_size: int, actions: Tensor | None = None) -> Tensor:
        """Give the lead ids (B, t).

        actions: (B, t) in [0, num_actions), the first one is not used; None exactly where num_actions is 0. Raises ValueError.
        """
        self._check_actions(actions, (batch_size, num_frames))
        if actions is None:
            leads = torch.full((batch_size, num_frames), self.separator_id)
        else:
            leads = self.separator_id + 1 + actions.long().cpu()
        leads[:, 0] = self.bos_id
        return leads

    def without_actions(self, input_ids: Tensor) -> Tensor:
        """Put the plain separator in place of every action, in input_ids of any shape."""
        return input_ids.clamp(max=self.separator_id)

    def flatten(self, indices: Tensor, actions: Tensor | None = None) -> Tensor:
        """Give input_ids (B, L), L = t * tokens_per_frame, of indices (B, t, h, w) and actions (B, t)."""
        self._check_indices(indices)
        leads = self.leads(indices.shape[1], indices.shape[0], actions).to(indices.device)
        slots = self._rows(indices) if self.slots_per_place > 1 else indices[..., None]
        return torch.cat([leads[:, :, None], slots.flatten(2)], dim=2).flatten(1)

    def unflatten(self, input_ids: Tensor) -> Tensor:
        """Give indices (B, t, h, w) of whole frames input_ids (B, L). Raises ValueError on ids that are no picture ids."""
        if input_ids.shape[1] % self.tokens_per_frame:
            raise ValueError(
                f"{input_ids.shape[1]} tokens are no whole number of frames of {self.tokens_per_frame}: pass complete frames"
            )
        frames = input_ids.unflatten(1, (input_ids.shape[1] // self.tokens_per_frame, self.tokens_per_frame))
        ids = frames[:, :, 1:].unflatten(2, (self.height, self.width, self.slots_per_place))
        indices = self._joined(ids) if self.slots_per_place > 1 else ids[..., 0]
        self._check_indices(indices)
        return indices

    def frame(self, input_ids: Tensor) -> Tensor:
        """Give the indices (B, h, w) of the picture slots input_ids (B, slots_per_frame) of one frame, unchecked."""
        slots = input_ids.unflatten(1, (self.height, self.width, self.slots_per_place))
        if self.slots_per_place == 1:
            return slots[..., 0]
        return self.join(slots - torch.tensor([start for start, _ in self.spans], device=slots.device))

    def labels(self, input_ids: Tensor) -> Tensor:
        """Give labels (B, L): the ids themselves, IGNORED at lead slots (the model shifts them)."""
        return input_ids.masked_fill(self.is_lead(torch.arange(input_ids.shape[1], device=input_ids.device)), IGNORED)

    def _rows(self, indices: Tensor) -> Tensor:
        """Give the embedding's rows (..., Q) of the digits of indices (...)."""
        digits = self.split(indices).unbind(-1)
        return torch.stack([digit + start for digit, (start, _) in zip(digits, self.spans, strict=True)], dim=-1)

    def _joined(self, ids: Tensor) -> Tensor:
        """Give indices (...) of picture slots (..., Q), one digit each."""
        digits = []
        for digit, (values, (start, end)) in enumerate(zip(ids.unbind(-1), self.spans, strict=True)):
            wrong = (values < start) | (values >= end)
            if wrong.any():
                raise ValueError(
                    f"id {int(values[wrong][0])} stands in a slot of digit {digit}, whose ids are {start} to {end - 1}: "
                    "pass whole frames of this layout"
                )
            digits.append(values - start)
        return self.join(torch.stack(digits, dim=-1))

    def _check_indices(self, indices: Tensor) -> None:
        if indices.ndim != 4 or tuple(indices.shape[2:]) != (self.height, self.width):
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} do not fit (B, t, {self.height}, {self.width}): use tokens of this grid"
            )
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= self.codebook_size):
            wrong = int(indices.max()) if int(indices.max()) >= self.codebook_size else int(indices.min())
            raise ValueError(
                f"id {wrong} lies outside the codebook of {self.codebook_size}: these tokens come from another tokenizer"
            )

    def _check_actions(self, actions: Tensor | None, shape: tuple[int, int]) -> None:
        if actions is None:
            if self.num_actions:
                raise ValueError(
                    f"this model was trained with {self.num_actions} actions, and none came: give one action a frame"
                )
            return
        if not self.num_actions:
            raise ValueError("actions came, but this model was trained without actions: leave them away")
        if tuple(actions.shape) != shape:
            raise ValueError(f"actions have shape {tuple(actions.shape)}, the frames need {shape}: give one action a frame")
        if actions.numel() and (int(actions.min()) < 0 or int(actions.max()) >= self.num_actions):
            raise ValueError(
                f"actions lie in [{int(actions.min())}, {int(actions.max())}], allowed is [0, {self.num_actions}): check the recording"
            )

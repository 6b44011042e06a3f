"""What transformers' own generate needs to write only legal sequences. Travels with exported models (vidgpt.exporting)."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vidgpt.layout import TokenLayout

MINUS_INFINITY = float("-inf")


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
        ids = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        if not self.layout.is_lead(slot):
            digit = self.layout.due_digits(int(slot) % self.layout.tokens_per_frame - 1)[0]
            start, end = self.layout.spans[digit]
            return scores.masked_fill((ids < start) | (ids >= end), MINUS_INFINITY)
        lead = self._lead_ids(int(self.layout.coordinates(slot)[0]), len(scores)).to(scores.device)
        is_lead = ids == lead[:, None]
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
            actions = actions[:, : frame + 1].repeat_interleave(rows // len(actions), dim=0)
        return self.layout.leads(frame + 1, rows, actions)[:, frame]

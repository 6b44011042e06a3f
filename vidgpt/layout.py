"""The one place that knows how a frame grid, actions and special ids become one sequence and back.

A frame is one lead slot and then its h * w tokens in raster order. The lead of the first frame is `bos_id`; of a later one
`separator_id`, or, in a model of actions, the action that led to the frame. A lead is given, never predicted.
A token's position is its index in the whole sequence, so an engine that counts positions gives the right phases.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from vidgpt.config import VidGPTConfig

IGNORED = -100


@dataclass(frozen=True)
class TokenLayout:
    """Sizes of one frame and of the vocabulary: picture ids first, then bos, separator, actions."""

    codebook_size: int
    height: int
    width: int
    num_actions: int = 0

    @classmethod
    def from_config(cls, config: VidGPTConfig) -> "TokenLayout":
        """Read the sizes from a model's config."""
        return cls(config.codebook_size, config.grid_height, config.grid_width, config.num_actions)

    @property
    def bos_id(self) -> int:
        """Lead of the first frame."""
        return self.codebook_size

    @property
    def separator_id(self) -> int:
        """Lead of a later frame in a model without actions."""
        return self.codebook_size + 1

    @property
    def vocab_size(self) -> int:
        """Picture ids, two specials and the actions."""
        return self.codebook_size + 2 + self.num_actions

    @property
    def cells(self) -> int:
        """Picture tokens a frame."""
        return self.height * self.width

    @property
    def tokens_per_frame(self) -> int:
        """Lead and picture tokens a frame."""
        return self.cells + 1

    def is_lead(self, positions: Tensor) -> Tensor:
        """Tell which positions are lead slots."""
        return positions % self.tokens_per_frame == 0

    def coordinates(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give (t, h, w) of positions; a lead stands left of its frame's first token, at (t, 0, -1)."""
        slot = positions % self.tokens_per_frame - 1
        row = slot.clamp(min=0) // self.width
        return positions // self.tokens_per_frame, row, slot - row * self.width

    def leads(self, num_frames: int, batch_size: int, actions: Tensor | None = None) -> Tensor:
        """Give the lead ids (B, t).

        actions: (B, t) in [0, num_actions), the first one is not used; None exactly where num_actions is 0. Raises ValueError.
        """
        self._check_actions(actions, (batch_size, num_frames))
        if actions is None:
            leads = torch.full((batch_size, num_frames), self.separator_id)
        else:
            leads = self.codebook_size + 2 + actions.long().cpu()
        leads[:, 0] = self.bos_id
        return leads

    def flatten(self, indices: Tensor, actions: Tensor | None = None) -> Tensor:
        """Give input_ids (B, L), L = t * tokens_per_frame, of indices (B, t, h, w) and actions (B, t)."""
        self._check_indices(indices)
        leads = self.leads(indices.shape[1], indices.shape[0], actions).to(indices.device)
        cells = rearrange(indices, "b t h w -> b t (h w)")
        return rearrange(torch.cat([leads[:, :, None], cells], dim=2), "b t n -> b (t n)")

    def unflatten(self, input_ids: Tensor) -> Tensor:
        """Give indices (B, t, h, w) of whole frames input_ids (B, L). Raises ValueError on ids that are no picture ids."""
        if input_ids.shape[1] % self.tokens_per_frame:
            raise ValueError(
                f"{input_ids.shape[1]} tokens are no whole number of frames of {self.tokens_per_frame}: pass complete frames"
            )
        frames = rearrange(input_ids, "b (t n) -> b t n", n=self.tokens_per_frame)
        indices = rearrange(frames[:, :, 1:], "b t (h w) -> b t h w", h=self.height)
        self._check_indices(indices)
        return indices

    def labels(self, input_ids: Tensor) -> Tensor:
        """Give labels (B, L): the ids themselves, IGNORED at lead slots (the model shifts them)."""
        positions = repeat(torch.arange(input_ids.shape[1], device=input_ids.device), "n -> b n", b=input_ids.shape[0])
        return input_ids.masked_fill(self.is_lead(positions), IGNORED)

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

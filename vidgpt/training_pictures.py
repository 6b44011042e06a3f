"""What a transformer has learnt, to look at while it trains: held-out frames over those it would have drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidtok.card import Card
from vidtok.folders import load_model
from vidtok.model import VidTokModel
from vidtok.tokenizer import family_of
from vidtok.video import to_frames

MOST_FRAMES = 8  # latent ones


def load_decoder(tokens: str | Path, device: torch.device) -> VidTokModel | None:
    """Load the tokenizer that lies in a token dataset; None where there is none of ours, whose decoder is small enough to train beside.

    Raises ValueError for a damaged one.
    """
    folder = Path(tokens) / "tokenizer"
    if not (folder / "config.json").is_file() or family_of(folder) is not None:
        return None
    return load_model(VidTokModel, folder).to(device)


@torch.no_grad()
def likeliest_tokens(model: VidGPTForCausalLM, layout: TokenLayout, indices: Tensor, actions: Tensor | None) -> Tensor:
    """Give the token (B, t - 1, h, w) that the model finds likeliest at each place after the first frame, given all true ones before it.

    indices: (B, t, h, w); actions: (B, t) or None.
    """
    hidden_states = model.model(layout.flatten(indices, actions)).last_hidden_state
    digits: dict[int, list[Tensor]] = {digit: [] for digit in range(layout.num_digits)}
    for slot in range(layout.slots_per_place):
        positions = layout.positions_of(slot, indices.shape[1])[layout.cells :].to(indices.device)
        # A frame at a time: the logits of a clip may be larger than the model.
        for place in positions.split(layout.cells):
            logits = model.lm_head(hidden_states[:, place - 1])
            for digit, due in zip(layout.due_digits(slot), layout.due_logits(logits, slot), strict=True):
                digits[digit].append(due.argmax(-1))
    joined = layout.join(torch.stack([torch.cat(parts, dim=1) for parts in digits.values()], dim=-1))
    return rearrange(joined, "B (t h w) -> B t h w", h=layout.height, w=layout.width)


def drawing(
    decoder: VidTokModel, model: VidGPTForCausalLM, layout: TokenLayout, card: Card, indices: Tensor, actions: Tensor | None
) -> Callable[[], np.ndarray]:
    """Give what draws the picture (2 H, n W, 3) of the first n latent frames of a clip: the real tokens decoded, over the likeliest ones.

    indices: (1, t, h, w); actions: (1, t) or None. The first frame is given, and real in both rows.
    """

    def draw() -> np.ndarray:
        real = indices[:, :MOST_FRAMES]
        found = likeliest_tokens(model, layout, real, None if actions is None else actions[:, :MOST_FRAMES])
        size = (1 + (real.shape[1] - 1) * card.stride_t, card.frame_height, card.frame_width)
        rows = torch.cat([decoder.decode(row, size) for row in (real, torch.cat([real[:, :1], found], dim=1))])
        return to_frames(rearrange(rows[:, :, :: card.stride_t], "r c t h w -> c 1 (r h) (t w)"))[0]

    return draw

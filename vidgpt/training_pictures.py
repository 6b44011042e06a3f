"""What a transformer has learnt, to look at while it trains: held-out frames over those it would have drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.regimes import forced_logits
from vidtok.card import Card
from vidtok.folders import load_model
from vidtok.model import VidTokModel
from vidtok.tokenizer import family_of
from vidtok.video import to_frames

MOST_FRAMES = 8  # latent ones


def load_decoder(tokens: str | Path, device: torch.device, say: Callable[[str], None]) -> VidTokModel | None:
    """Load the tokenizer that lies in a token dataset; None where there is none, and for a damaged one, which `say` is told.

    None for a tokenizer of another project, whose decoder may be too large to keep beside a training.
    """
    folder = Path(tokens) / "tokenizer"
    if not (folder / "config.json").is_file():
        return None
    try:
        return None if family_of(folder) is not None else load_model(VidTokModel, folder).to(device)
    except ValueError as error:
        # Pictures only show the training: it needs the tokens alone.
        say(f"no pictures in samples/: {error}")
        return None


@torch.no_grad()
def likeliest_tokens(model: VidGPTForCausalLM, layout: TokenLayout, indices: Tensor, actions: Tensor | None) -> Tensor:
    """Give the token (B, t - 1, h, w) that the model finds likeliest at each place after the first frame, given all true ones before it.

    indices: (B, t, h, w); actions: (B, t) or None.
    """
    digits: dict[int, list[Tensor]] = {digit: [] for digit in range(layout.num_digits)}
    for digit, _, logits in forced_logits(model, layout, indices, actions):
        digits[digit].append(logits.argmax(-1))
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

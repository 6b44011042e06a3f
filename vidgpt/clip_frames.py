"""Windows of a token dataset as frames: decoded where they lie in their row, and those that they were made of, where they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from vidgpt.rollout import Predictor
from vidtok.card import Card
from vidtok.data import build_episodes
from vidtok.encoding import Segment, cut_segments
from vidtok.tokenizer import check_decoder
from vidtok.tokens import TokenDataset
from vidtok.video import to_video

SOURCE, RECONSTRUCTION = "source_frames", "tokenizer_reconstruction"


class ClipFrames:
    """Decode windows as a viewer of the whole video would see them, and read their real frames.

    data: the data source that the tokens were encoded from; None takes what the tokenizer makes of the real tokens for real.
    Raises ValueError where the tokenizer cannot decode, and for data of another manifest than the tokens'.
    """

    def __init__(self, clips: TokenDataset, predictor: Predictor, data: Mapping[str, Any] | None = None) -> None:
        check_decoder(predictor.tokenizer)
        self.clips, self.predictor, self.card = clips, predictor, clips.card
        self.segments = None if data is None else matching_segments(data, self.card, str(clips.folder))
        card = self.card
        # In front of a window its first latent frame is one like the others, also where a row's first one is not.
        least = 0 if card.first_frames == card.stride_t else 1
        self.past = max(least, -(-predictor.tokenizer.history_frames // card.stride_t))

    @property
    def reference(self) -> str:
        """Name what predictions are compared with."""
        return RECONSTRUCTION if self.segments is None else SOURCE

    def decode(self, index: int, indices: Tensor) -> Tensor:
        """Give the frames (N, C, T, H, W) in [-1, 1] of indices (N, t, h, w) that stand at the place of a window, after its row's past."""
        past = repeat(self.clips.past(index, self.past), "t h w -> N t h w", N=len(indices))
        video = self.predictor.decode(torch.cat([past, indices], dim=1).to(self.predictor.device)).cpu()
        # A decoder may overshoot a little; figures are of frames as they can be shown.
        return video[:, :, self._frames(past.shape[1]) :].float().clamp(-1, 1)

    def real(self, index: int) -> Tensor | None:
        """Give the frames (C, T, H, W) that a window was made of; None where the data was not given."""
        if self.segments is None:
            return None
        row, start = self.clips.place(index)
        segment = self.segments[row]
        first, last = self._frames(start), self._frames(start + self.clips.window)
        return to_video(segment.episode.frames[segment.first + first : segment.first + last])

    def describe(self, index: int) -> str:
        """Say where a window lies in its video."""
        row, start = self.clips.place(index)
        name, seconds = self.clips.source(row)
        return f"{name} at {seconds + self._frames(start) / self.card.fps:.1f} s"

    def _frames(self, latent_frames: int) -> int:
        """Give how many pixel frames so many latent frames at the beginning of a row stand for."""
        return self.card.frames_of(latent_frames) if latent_frames else 0


def matching_segments(data: Mapping[str, Any], card: Card, name: str) -> list[Segment]:
    """Give the stretch of video of every row of the tokens in folder `name`; raises ValueError unless they were made of this data."""
    episodes = build_episodes(data)
    keys = {
        "data_name": episodes.name,
        "manifest_hash": episodes.manifest_hash,
        "fps": episodes.fps,
        "frame_height": episodes.height,
        "frame_width": episodes.width,
    }
    for key, value in keys.items():
        if value != getattr(card, key):
            raise ValueError(
                f"data={data['name']} has {key}={value}, but the tokens {name} were made of {key}={getattr(card, key)}: give the data keys "
                "of their vidtok-encode command, or leave data away to compare with the tokenizer's reconstruction"
            )
    segments = list(cut_segments(episodes, card)) if card.clip_hop else []
    if len(segments) != card.rows:
        raise ValueError(
            f"data={data['name']} gives {len(segments)} rows, the tokens {name} have {card.rows}: encode them again, or leave data away to "
            "compare with the tokenizer's reconstruction"
        )
    return segments

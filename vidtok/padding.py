"""Sizes that a tokenizer accepts: which frame counts are whole, what grid a clip becomes, and the padding up to it and off again.

A tokenizer of (first_frames, stride_t, stride_s) takes first_frames + k * stride_t frames whose sides are multiples of stride_s.
What is missing is added at the end, right and bottom by repeating the last frame, column and row, so that the tokens of a growing
video never change.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def valid_frames(frames: int, stride_t: int, first_frames: int = 1) -> tuple[int, int]:
    """Give the largest whole frame count up to `frames` (at least first_frames) and the smallest from it on."""
    if frames < 1:
        raise ValueError(f"{frames} frames are no clip: give 1 or more")
    above = first_frames + max(0, -(-(frames - first_frames) // stride_t)) * stride_t
    return (above if above <= frames else max(first_frames, above - stride_t)), above


def grid_for(frames: int, height: int, width: int, stride_t: int, stride_s: int, first_frames: int = 1) -> tuple[int, int, int]:
    """Give the latent grid (t, h, w) of a clip of any size, after padding."""
    if min(height, width) < 1:
        raise ValueError(f"frames of {height}x{width} are no pictures: both sides must be 1 or more")
    whole = valid_frames(frames, stride_t, first_frames)[1]
    return 1 + (whole - first_frames) // stride_t, -(-height // stride_s), -(-width // stride_s)


def pad_clip(video: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Repeat the last frame, row and column of (B, C, T, H, W) up to the given size; what is large enough comes back as it is."""
    missing = [frames - video.shape[2], height - video.shape[3], width - video.shape[4]]
    if min(missing) < 0:
        raise ValueError(f"a clip of {tuple(video.shape[2:])} does not fit into {(frames, height, width)}: pad to a larger size")
    if not any(missing):
        return video
    padded = F.pad(video, (0, missing[2], 0, missing[1], 0, 0), mode="replicate")
    last = padded[:, :, -1:]
    return torch.cat([padded, last.expand(-1, -1, missing[0], -1, -1)], dim=2) if missing[0] else padded


def trim_clip(video: Tensor, size: tuple[int, int, int] | None) -> Tensor:
    """Cut (B, C, T, H, W) back to size (frames, height, width); None keeps all. Raises ValueError when the clip is smaller."""
    if size is None:
        return video
    frames, height, width = size
    if min(size) < 1 or any(wanted > given for wanted, given in zip(size, video.shape[2:], strict=True)):
        raise ValueError(
            f"size={tuple(size)} cannot be cut from a decoded clip of {tuple(video.shape[2:])}: give a size of 1 to that"
        )
    return video[:, :, :frames, :height, :width]

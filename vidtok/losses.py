"""Reconstruction loss of the tokenizer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vidtok.options import LossOptions


def motion_weights(video: Tensor, options: LossOptions) -> Tensor:
    """Give weights (B, 1, T, H, W) with mean 1 a batch: 1 + motion_weight where the picture moves, 1 elsewhere, normalised.

    video: (B, C, T, H, W) in [-1, 1].
    """
    still = video.mean(dim=2, keepdim=True)
    moves = (video - still).abs().amax(dim=1, keepdim=True) >= options.motion_threshold
    # One pixel around what moves counts too: its edge is where a wrong position shows.
    moves = F.max_pool3d(moves.float(), (1, 3, 3), stride=1, padding=(0, 1, 1))
    weights = 1.0 + options.motion_weight * moves
    return weights / weights.mean()


def reconstruction_loss(reconstruction: Tensor, video: Tensor, options: LossOptions) -> Tensor:
    """Give the weighted mean of absolute and squared error, a scalar; both (B, C, T, H, W) in [-1, 1]."""
    error = reconstruction.float() - video
    weights = motion_weights(video, options) if options.motion_weight > 0 else torch.ones_like(video[:, :1])
    return (weights * (options.l1_weight * error.abs() + options.l2_weight * error.square())).mean()

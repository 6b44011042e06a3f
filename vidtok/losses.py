"""Reconstruction loss of the tokenizer: named terms, each a mean, in fp32 whatever surrounds it."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from vidtok.options import LossOptions
from vidtok.perceptual import Lpips

CHARBONNIER_EPSILON = 1e-3


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


def multiscale_error(error: Tensor, levels: int) -> Tensor:
    """Give the mean absolute error of pictures averaged over 2x2, 4x4, ... pixels, over up to `levels` such sizes.

    error: (B, C, T, H, W); what is left over at the right and bottom of an odd size is not seen.
    """
    images = rearrange(error, "B C T H W -> (B T) C H W")
    found: list[Tensor] = []
    while len(found) < levels and min(images.shape[-2:]) >= 2:
        images = F.avg_pool2d(images, 2)
        found.append(images.abs().mean())
    return torch.stack(found).mean() if found else error.new_zeros(())


def gradient_error(error: Tensor) -> Tensor:
    """Give the mean absolute error of differences between neighbouring pixels, right and below, of errors (B, C, T, H, W)."""
    return 0.5 * (_mean_difference(error, 4) + _mean_difference(error, 3))


def temporal_error(error: Tensor) -> Tensor:
    """Give the mean absolute error of differences between neighbouring frames, of errors (B, C, T, H, W); 0 for one frame."""
    return _mean_difference(error, 2)


def reconstruction_loss(
    reconstruction: Tensor, video: Tensor, options: LossOptions, lpips: Lpips | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the weighted sum of the terms that have a weight, a scalar, and each of them by name, without its weight.

    reconstruction, video: (B, C, T, H, W) in [-1, 1].
    """
    with torch.autocast(video.device.type, enabled=False):
        reconstruction, video = reconstruction.float(), video.float()
        error = reconstruction - video
        # Averages and differences are linear: those of the error are the error of those.
        weighted = _weighted_mean(motion_weights(video, options)) if options.motion_weight > 0 else torch.mean
        terms = {
            "l1": lambda: weighted(error.abs()),
            "l2": lambda: weighted(error.square()),
            "charbonnier": lambda: weighted((error.square() + CHARBONNIER_EPSILON**2).sqrt()),
            "multiscale": lambda: multiscale_error(error, options.multiscale_levels),
            "gradient": lambda: gradient_error(error),
            "temporal": lambda: temporal_error(error),
        }
        if lpips is not None:
            terms["lpips"] = lambda: lpips.of_clips(reconstruction, video, options.lpips_frames)
        weights = {name: 1.0 if (weight := getattr(options, f"{name}_weight")) is None else float(weight) for name in terms}
        found = {name: term() for name, term in terms.items() if weights[name]}
        return torch.stack([weights[name] * value for name, value in found.items()]).sum(), found


def _weighted_mean(weights: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: (weights * values).mean()


def _mean_difference(error: Tensor, axis: int) -> Tensor:
    return error.diff(dim=axis).abs().mean() if error.shape[axis] > 1 else error.new_zeros(())

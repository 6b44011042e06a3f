"""What a video does from frame to frame: wrong changes (dtSSD), flicker, warping error, motion.

Changes belong to a pair of frames, so a clip of T frames has T - 1 of them. To measure the change into the first predicted frame,
put the last given frame before both the prediction and the real clip: entry k - 1 is then horizon k. Figures that need no reference
(flicker, warping error, motion) are never good by themselves: a frozen or blurred video scores well, so put the real clip's beside them.
MotionMeter of vidtok.temporal_metrics measures the flicker of pixels that stand still in the real clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from vidtok.metrics import by_frame, check_pair
from vidtok.temporal_metrics import GREY_LEVELS
from vidtok.video_metrics.flow import grey, lucas_kanade, trusted, warp


@dataclass(frozen=True)
class WarpedSteps:
    """How far the frames of clips are explained by motion; every field float64 (B, T - 1), one entry a step from a frame to the next.

    error: mean over trusted pixels and colours of (frame - next frame fetched along the motion)^2, values in [0, 1]; NaN where no pixel is
    trusted. trusted: their share of the frame. speed: mean length of the motion over all pixels, in pixels a frame.
    """

    error: Tensor
    trusted: Tensor
    speed: Tensor


def dtssd_by_step(video: Tensor, reference: Tensor) -> Tensor:
    """Root of the mean squared difference between the changes of the video and of the real one, in grey levels of 255.

    video, reference: (B, C, T, H, W) in [-1, 1]. Gives float64 (B, T - 1), 0 where the changes are equal. Over pixels and colours.
    Source: dtSSD of Erofeev et al., Perceptually Motivated Benchmark for Video Matting, BMVC 2015.
    """
    check_pair(video, reference)
    _check_length(video, 2, "dtSSD")
    return by_frame(_dtssd, *_pairs(video), *_pairs(reference))


def flicker_by_frame(video: Tensor) -> Tensor:
    """Mean |before - 2 * frame + after| over pixels and colours, in grey levels of 255: change that does not go on.

    video: (B, C, T, H, W) in [-1, 1]. Gives float64 (B, T - 2), of the frames that have both neighbours. No reference.
    """
    check_pair(video, video)
    _check_length(video, 3, "flicker")
    return by_frame(_second_difference, video[:, :, :-2], video[:, :, 1:-1], video[:, :, 2:])


def warped_steps(video: Tensor) -> WarpedSteps:
    """Measure warping error and motion of clips (B, C, T, H, W) in [-1, 1], by Lucas-Kanade flow between the video's own frames.

    Source of the error: Lai et al., Learning Blind Video Temporal Consistency, arXiv:1808.00449, with video_metrics.flow in place of
    FlowNet 2; what counts is in flow.trusted. The figures of another estimator are other numbers.
    """
    check_pair(video, video)
    _check_length(video, 2, "the warping error")
    error, share, speed = by_frame(_warped, *_pairs(video)).unbind(dim=-1)
    return WarpedSteps(error, share, speed)


def _pairs(video: Tensor) -> tuple[Tensor, Tensor]:
    return video[:, :, :-1], video[:, :, 1:]


def _check_length(video: Tensor, least: int, name: str) -> None:
    if video.shape[2] < least:
        raise ValueError(
            f"A video of {video.shape[2]} frames came, {name} needs {least}: put the last given frame before the others."
        )


def _dtssd(before: Tensor, after: Tensor, real_before: Tensor, real_after: Tensor) -> Tensor:
    difference = (after.double() - before.double()) - (real_after.double() - real_before.double())
    return GREY_LEVELS * reduce(difference.square(), "N C H W -> N", "mean").sqrt()


def _second_difference(before: Tensor, frame: Tensor, after: Tensor) -> Tensor:
    return GREY_LEVELS * reduce((before.double() - 2 * frame.double() + after.double()).abs(), "N C H W -> N", "mean")


def _warped(images: Tensor, following: Tensor) -> Tensor:
    """Give error, trusted share and speed of pairs of images (N, C, H, W): (N, 3)."""
    first, second = grey(images), grey(following)
    forward, backward = lucas_kanade(torch.cat([first, second]), torch.cat([second, first])).chunk(2)
    counted = trusted(forward, backward)
    squared = reduce((images.float() - warp(following.float(), forward)).square() / 4, "N C H W -> N H W", "mean")
    share = reduce(counted.double(), "N H W -> N", "mean")
    error = reduce((squared * counted).double(), "N H W -> N", "mean") / share
    # Not norm(dim=1), which takes five times as long across so short an axis.
    speed = reduce(forward.square().sum(dim=1).sqrt().double(), "N H W -> N", "mean")
    return torch.stack([error, share, speed], dim=-1)

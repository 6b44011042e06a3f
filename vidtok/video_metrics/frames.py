"""Full-reference figures of every frame beside the PSNR and SSIM of vidtok.metrics: errors and their sums, uniform SSIM, MS-SSIM, LPIPS.

Every function gives float64 (B, T), one figure a frame; average over frames first and over clips then (video_metrics.table does).
Colours: red, green and blue weigh the same; nothing is turned into luma.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from vidtok.metrics import by_frame, check_pair
from vidtok.perceptual import Lpips
from vidtok.similarity import GAUSSIAN, Window, similarity_maps

# Wang, Simoncelli and Bovik, Multiscale Structural Similarity, Asilomar 2003: the weight of each scale, the finest first.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SCALES = len(MS_SSIM_WEIGHTS)


def as_video(frames: np.ndarray | Tensor) -> Tensor:
    """Give float32 clips (B, C, T, H, W) in [-1, 1].

    frames: uint8 (T, H, W, C) or (B, T, H, W, C), or floats that are such clips already. Raises ValueError on anything else.
    """
    video = torch.from_numpy(np.ascontiguousarray(frames)) if isinstance(frames, np.ndarray) else frames
    if video.dtype == torch.uint8 and video.ndim in (4, 5) and video.shape[-1] in (1, 3) and 0 not in video.shape:
        clips = video if video.ndim == 5 else rearrange(video, "T H W C -> 1 T H W C")
        return rearrange(clips, "B T H W C -> B C T H W").contiguous().float() / 127.5 - 1
    if not video.is_floating_point() or video.ndim != 5 or 0 in video.shape:
        raise ValueError(
            f"Frames of {video.dtype} {tuple(video.shape)} came: give uint8 (T, H, W, C) or (B, T, H, W, C) with 1 or 3 colours, "
            "or floats (B, C, T, H, W) in [-1, 1]."
        )
    low, high = (value.item() for value in torch.aminmax(video.detach()))
    # Written so that a NaN fails too.
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(
            f"A video with values in [{low:.4g}, {high:.4g}] came: floats must lie in [-1, 1]; give 0..255 as uint8."
        )
    return video.float()


def mse_by_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error of every frame over pixels and colours, of values in [0, 1]."""
    check_pair(video, reference)
    return by_frame(_squared_error, video, reference)


def mae_by_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute error of every frame over pixels and colours, of values in [0, 1]."""
    check_pair(video, reference)
    return by_frame(_absolute_error, video, reference)


def sum_over_pixels(mean_error: Tensor, reference: Tensor) -> Tensor:
    """Turn mse_by_frame or mae_by_frame into the Moving-MNIST convention: the sum over the pixels of a frame, values in [0, 1].

    The published tables are of grey frames; of several colours this is the sum of their mean, so that digits drawn in three equal
    colours have the error of the grey ones. reference: the clips (B, C, T, H, W).
    """
    return mean_error * (reference.shape[-2] * reference.shape[-1])


def ssim_uniform_by_frame(video: Tensor, reference: Tensor, window: Window | None = None, data_range: float = 1.0) -> Tensor:
    """SSIM with equal weights: another number than ssim_by_frame, for rows that were published with it.

    Windows of 7 x 7 and the sample covariance, scikit-image's default, unless `window` says otherwise. Tables made with scikit-image
    before 0.20 from frames in [0, 1] without a data_range have data_range=2, because that version took floats for [-1, 1].
    Window(8, None, stride=4, is_sample_covariance=True, k1=0.01 / 8) is the ssim filter of ffmpeg.
    """
    check_pair(video, reference)
    chosen = window or Window(7, None, is_sample_covariance=True)
    _check_sides(reference, chosen.size, f"SSIM of {chosen.size} x {chosen.size} windows", "use larger frames or leave it out")
    return by_frame(partial(_ssim, window=chosen, data_range=data_range), video, reference)


def ms_ssim_scales(height: int, width: int) -> int:
    """Give how many scales of MS-SSIM fit: at the coarsest the window of 11 x 11 pixels must; 0 where none does, at most 5."""
    side = min(height, width)
    return sum(side >> scale >= GAUSSIAN.size for scale in range(MS_SSIM_SCALES))


def ms_ssim_by_frame(video: Tensor, reference: Tensor, scales: int = MS_SSIM_SCALES, is_last_padded: bool = False) -> Tensor:
    """Multi-scale SSIM of every frame, at most 1, with the weights of the paper (Wang et al., 2003).

    Windows and constants of ssim_by_frame, whole windows only; frames are halved by the mean of 2 x 2, an odd last row or column
    falls away. Each scale's mean over places and colours, cut off at 0, is raised to its weight. scales: below 5 the first weights
    are used, divided by their sum, which is another number: say how many. is_last_padded: reflect the borders of the coarsest scale,
    as torchmetrics does. Raises ValueError where the scales do not fit; five need 176 pixels, three 44 (ms_ssim_scales).
    """
    check_pair(video, reference)
    if not 1 <= scales <= MS_SSIM_SCALES:
        raise ValueError(f"MS-SSIM of {scales} scales was asked for: 1 to {MS_SSIM_SCALES} are defined.")
    advice = f"{ms_ssim_scales(*reference.shape[-2:])} scales fit these frames"
    _check_sides(reference, GAUSSIAN.size << (scales - 1), f"MS-SSIM of {scales} scales", advice)
    return by_frame(partial(_ms_ssim, scales=scales, is_last_padded=is_last_padded), video, reference)


def lpips_by_frame(lpips: Lpips, video: Tensor, reference: Tensor) -> Tensor:
    """LPIPS of every frame, of the network that load_lpips built; say its name and checksum beside the figure."""
    check_pair(video, reference)
    return by_frame(lambda images, targets: lpips(images, targets), video, reference)


def _check_sides(reference: Tensor, least: int, name: str, advice: str) -> None:
    height, width = reference.shape[-2:]
    if min(height, width) < least:
        raise ValueError(f"{name} got frames of {height} x {width} pixels and needs at least {least} x {least}: {advice}.")


def _squared_error(images: Tensor, targets: Tensor) -> Tensor:
    return reduce((images.double() - targets.double()).square() / 4, "N C H W -> N", "mean")


def _absolute_error(images: Tensor, targets: Tensor) -> Tensor:
    return reduce((images.double() - targets.double()).abs() / 2, "N C H W -> N", "mean")


def _ssim(images: Tensor, targets: Tensor, window: Window, data_range: float) -> Tensor:
    return reduce(similarity_maps((images + 1) / 2, (targets + 1) / 2, window, data_range)[0], "N C h w -> N", "mean")


def _ms_ssim(images: Tensor, targets: Tensor, scales: int, is_last_padded: bool) -> Tensor:
    images, targets = (images.float() + 1) / 2, (targets.float() + 1) / 2
    border = [GAUSSIAN.size // 2] * 4
    result = images.new_ones(len(images))
    for scale in range(scales):
        is_last = scale == scales - 1
        pair = [F.pad(x, border, mode="reflect") if is_last and is_last_padded else x for x in (images, targets)]
        similarity, contrast = similarity_maps(pair[0], pair[1], GAUSSIAN)
        mean = reduce(similarity if is_last else contrast, "N C h w -> N", "mean").clamp(min=0)
        result = result * mean ** (MS_SSIM_WEIGHTS[scale] / sum(MS_SSIM_WEIGHTS[:scales]))
        images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
    return result

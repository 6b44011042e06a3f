"""The two frame-interpolation errors: how well a video's own frames foretell those between them, and how well a model fills a gap.

There is no single "frame interpolation error" in general use; these are two figures with two names. fie_smooth needs no reference and asks
whether motion is even: a frozen or blurred video does well, so put the real clip's beside it (VBench's motion smoothness, arXiv:2311.17982,
is fie_smooth with a trained interpolator). fie_task asks a model for the frames between two given ones (VIDIM-Bench, arXiv:2404.01203).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor

from vidtok.metrics import by_frame, check_pair, psnr_by_frame, ssim_by_frame
from vidtok.temporal_metrics import GREY_LEVELS
from vidtok.video_metrics.flow import grey, lucas_kanade, warp
from vidtok.video_metrics.frames import mae_by_frame

Interpolator = Callable[[Tensor, Tensor, float], Tensor]


def blend(first: Tensor, second: Tensor, place: float) -> Tensor:
    """Mix two images (N, C, H, W); place: 0 gives the first, 1 the second."""
    return (1 - place) * first + place * second


def lucas_kanade_between(first: Tensor, second: Tensor, place: float) -> Tensor:
    """Move two images (N, C, H, W) in [-1, 1] along their motion to a place between 0 and 1, and mix them.

    The motion at that place is put together of both directions as in Super SloMo (Jiang et al., arXiv:1712.00080, equation 4).
    """
    one, other = grey(first), grey(second)
    forward, backward = lucas_kanade(torch.cat([one, other]), torch.cat([other, one])).chunk(2)
    back = -(1 - place) * place * forward + place**2 * backward
    onward = (1 - place) ** 2 * forward - place * (1 - place) * backward
    return blend(warp(first.float(), back), warp(second.float(), onward), place)


INTERPOLATORS: dict[str, Interpolator] = {"linear": blend, "lucas_kanade": lucas_kanade_between}


def fie_smooth_by_frame(video: Tensor, interpolator: Interpolator = blend) -> Tensor:
    """Drop frames 1, 3, 5, ... and make each of its neighbours; gives the mean absolute error, in grey levels of 255.

    video: (B, C, T, H, W) in [-1, 1], T >= 3. Gives float64 (B, (T - 1) // 2); entry k is frame 2 * k + 1. No reference.
    """
    check_pair(video, video)
    if video.shape[2] < 3:
        raise ValueError(
            f"A video of {video.shape[2]} frames came, fie_smooth needs 3: put the last given frame before the others."
        )
    count = 2 * ((video.shape[2] - 1) // 2)

    def error(before: Tensor, frame: Tensor, after: Tensor) -> Tensor:
        return GREY_LEVELS * reduce((interpolator(before, after, 0.5) - frame).abs().double(), "N C H W -> N", "mean")

    return by_frame(error, video[:, :, 0:count:2], video[:, :, 1:count:2], video[:, :, 2 : count + 1 : 2])


def fill_between(video: Tensor, interpolator: Interpolator) -> Tensor:
    """Replace all frames of clips (B, C, T, H, W) but the first and the last by what the interpolator makes of these two."""
    ends = video[:, :, 0], video[:, :, -1]
    last = video.shape[2] - 1
    inner = [interpolator(*ends, frame / last) for frame in range(1, last)]
    return torch.stack([ends[0], *inner, ends[1]], dim=2)


def fie_task(filled: Tensor, reference: Tensor) -> dict[str, dict[str, float]]:
    """Judge the frames that a model filled in between two given ends, beside a blend and a flow interpolation of the same ends.

    filled, reference: (B, C, T, H, W) in [-1, 1]; the first and the last frame are the given ones and are not scored, T >= 3.
    Gives for the rows model, linear and lucas_kanade: PSNR, SSIM and MAE in grey levels of 255, over all
    inner frames and of the middle one (of two the earlier), mean over frames, then clips.
    """
    check_pair(filled, reference)
    if filled.shape[2] < 3:
        raise ValueError(f"Clips of {filled.shape[2]} frames came, fie_task needs 3: two given ends and a frame between.")
    rows = {"model": filled} | {name: fill_between(reference, fill) for name, fill in INTERPOLATORS.items()}
    middle = (filled.shape[2] - 2 - 1) // 2
    return {name: _scores(row[:, :, 1:-1], reference[:, :, 1:-1], middle) for name, row in rows.items()}


def _scores(inner: Tensor, reference: Tensor, middle: int) -> dict[str, float]:
    by_name = {
        "psnr_db": psnr_by_frame(inner, reference),
        "ssim": ssim_by_frame(inner, reference),
        "mae_grey_levels_of_255": 255 * mae_by_frame(inner, reference),
    }
    everywhere = {f"fie_task_{name}": float(values.mean()) for name, values in by_name.items()}
    return everywhere | {f"fie_task_{name}_middle_frame": float(values[:, middle].mean()) for name, values in by_name.items()}

"""What a reconstruction does over time: flicker where the source stands still, loss of what moves, tokens that change without need."""

from __future__ import annotations

import math

import torch
from einops import reduce
from torch import Tensor

from vidtok.metrics import PSNR_CAP_DB, check_pair
from vidtok.padding import pad_clip

GREY_LEVELS = 127.5  # levels of 255 in one unit of [-1, 1]
STATIC_LEVELS = 2.0
# Two levels of a frame that was uint8 must not become 2.0001 by rounding.
_ROUNDING_LEVELS = 1e-2


def static_pixels(video: Tensor) -> Tensor:
    """Tell which pixels stand still from each frame to the next.

    video: (B, C, T, H, W) in [-1, 1]. Gives bool (B, T - 1, H, W): no colour changes by more than STATIC_LEVELS of 255.
    """
    steps = reduce(video.diff(dim=2).abs(), "B C T H W -> B T H W", "max")
    return _is_static(steps)


def static_places(video: Tensor, grid: tuple[int, int, int], first_frames: int, stride_t: int, stride_s: int) -> Tensor:
    """Tell which places of the latent grid stand still from each latent frame to the next.

    video: (B, C, T, H, W) in [-1, 1]; grid: (t, h, w); the first latent frame stands for first_frames frames, the others for stride_t.
    Gives bool (B, t - 1, h, w): over all frames of the two latent frames no pixel of the patch of stride_s x stride_s moves by more than
    STATIC_LEVELS of 255; with stride_t = 1 these are two frames. Padding repeats the last frame, row and column, as tokenizers do.
    """
    t, h, w = grid
    padded = pad_clip(video, first_frames + (t - 1) * stride_t, h * stride_s, w * stride_s)
    spans = padded.split([first_frames] + [stride_t] * (t - 1), dim=2)
    highest = torch.stack([span.amax(dim=2) for span in spans], dim=2)
    lowest = torch.stack([span.amin(dim=2) for span in spans], dim=2)
    moved = highest[:, :, 1:].maximum(highest[:, :, :-1]) - lowest[:, :, 1:].minimum(lowest[:, :, :-1])
    return _is_static(reduce(moved, "b c t (h ph) (w pw) -> b t h w", "max", ph=stride_s, pw=stride_s))


def _is_static(change: Tensor) -> Tensor:
    return change * GREY_LEVELS <= STATIC_LEVELS + _ROUNDING_LEVELS


class MotionMeter:
    """Average, over clips, what happens to still and to moving pixels of the source (static_pixels), apart from each other.

    Flicker is the mean of |d r - d s| over colours and static pixels, in grey levels of 255; d is the step from a frame to the next,
    r the reconstruction and s the source. A reconstruction that follows the source has 0; one that freezes the source's own noise has
    that noise, the mean of |d s|, which is the reference beside it; what flickers by itself has more.
    After the temporal flickering of VBench (arXiv:2311.17982, mean |d r| of still scenes) and dtSSD (Erofeev et al., BMVC 2015, which
    compares d r with d s). Moving pixels have a PSNR of their own, of their pooled squared error in the later frame of the two: small
    things that vanish hardly touch a frame's PSNR.
    """

    def __init__(self) -> None:
        self.flicker = self.source = self.moving_error = 0.0
        self.static = self.pixels = 0

    def update(self, reconstruction: Tensor, source: Tensor) -> Tensor:
        """Add clips (B, C, T, H, W) in [-1, 1]; gives each clip's own flicker, float64 (B,), NaN where nothing stands still."""
        check_pair(reconstruction, source)
        static = static_pixels(source)
        steps = source.diff(dim=2)
        flicker, own = (GREY_LEVELS * _sum_over(change.abs(), static) for change in (reconstruction.diff(dim=2) - steps, steps))
        counts = reduce(static, "B T H W -> B", "sum").double()
        self.flicker += float(flicker.sum())
        self.source += float(own.sum())
        self.moving_error += float(_sum_over((reconstruction - source)[:, :, 1:].square(), ~static).sum())
        self.static += int(counts.sum())
        self.pixels += static.numel()
        return (flicker / counts).cpu()

    def figures(self) -> dict[str, float | None]:
        """Give flicker, the source's own, their difference, moving pixels' PSNR and the static share; None where there are none."""
        flicker, own = (total / self.static if self.static else None for total in (self.flicker, self.source))
        moving = self.pixels - self.static
        return {
            "flicker_static_grey_levels_of_255": flicker,
            "flicker_static_of_source_grey_levels_of_255": own,
            "flicker_static_above_source_grey_levels_of_255": None if flicker is None or own is None else flicker - own,
            "psnr_db_moving_pixels": _psnr(self.moving_error / moving) if moving else None,
            "static_pixels_fraction": self.static / self.pixels if self.pixels else None,
        }


def _sum_over(values: Tensor, mask: Tensor) -> Tensor:
    """Sum the mean over colours of (B, C, T, H, W) where the mask (B, T, H, W) is set; gives float64 (B,)."""
    return reduce((reduce(values, "B C T H W -> B T H W", "mean") * mask).double(), "B T H W -> B", "sum")


def _psnr(mean_squared_error: float) -> float:
    return min(PSNR_CAP_DB, -10 * math.log10(mean_squared_error / 4)) if mean_squared_error else PSNR_CAP_DB


class ChangeMeter:
    """Count how often a token differs from the one before it at its place, where the source stands still and where it moves."""

    def __init__(self) -> None:
        self.places = {True: 0, False: 0}
        self.changed = {True: 0, False: 0}

    def update(self, indices: Tensor, static: Tensor) -> None:
        """Add ids (B, t, h, w) and static_places (B, t - 1, h, w)."""
        changed = indices.diff(dim=1) != 0
        for kind in (True, False):
            chosen = static == kind
            self.places[kind] += int(chosen.sum())
            self.changed[kind] += int((changed & chosen).sum())

    def figures(self) -> dict[str, float | None]:
        """Give the share of ids that change, static and moving, and the share of static places; None where there are none."""
        static, moving = (self.changed[kind] / self.places[kind] if self.places[kind] else None for kind in (True, False))
        total = sum(self.places.values())
        return {
            "changed_ids_static_fraction": static,
            "changed_ids_moving_fraction": moving,
            "static_places_fraction": self.places[True] / total if total else None,
        }

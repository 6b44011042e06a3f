"""The pixel table: forecasts of the same clips as rows, every figure by horizon, by clip and as one number, and what drifts.

Convention of every mean: a figure is taken frame by frame, then averaged over the future frames of a clip, then over clips; given
frames never count. Of N samples a clip, mean_of_N is the mean of their figures and best_of_N that of the sample with the best clip
mean, chosen for each figure and clip by itself: two columns that are not to be mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from vidtok.metrics import SSIM_WINDOW, check_pair, psnr_by_frame, ssim_by_frame
from vidtok.perceptual import Lpips
from vidtok.temporal_metrics import MotionMeter
from vidtok.video_metrics.drift import drift_slope, half_life_frames
from vidtok.video_metrics.frames import (
    lpips_by_frame,
    mae_by_frame,
    ms_ssim_by_frame,
    ms_ssim_scales,
    mse_by_frame,
    ssim_uniform_by_frame,
    sum_over_pixels,
)
from vidtok.video_metrics.interpolation import INTERPOLATORS, blend, fie_smooth_by_frame
from vidtok.video_metrics.temporal import dtssd_by_step, flicker_by_frame, warped_steps
from vidtok.video_metrics.vmaf import vmaf_by_frame

Better = Literal["higher", "lower", "like_real"]
FLOOR = "copy_last_frame"
REAL = "real"


@dataclass(frozen=True)
class Scores:
    """A figure of some clips: float64 values (B, T) by horizon, NaN where it is not defined; what is good."""

    values: Tensor
    better: Better


def score_fidelity(
    video: Tensor, real: Tensor, last: Tensor, lpips: Lpips | None = None, is_vmaf: bool = False
) -> dict[str, Scores]:
    """Give every full-reference figure of predicted frames by name.

    video, real: future frames (B, C, T, H, W) in [-1, 1]; last: the last given frame (B, C, H, W), before horizon 1. SSIM and MS-SSIM are
    left out where frames are smaller than their windows; the name of MS-SSIM says how many scales fit.
    """
    check_pair(video, real)
    squared, absolute = mse_by_frame(video, real), mae_by_frame(video, real)
    found = {
        "mse": Scores(squared, "lower"),
        "mae": Scores(absolute, "lower"),
        "mse_sum_over_pixels_moving_mnist": Scores(sum_over_pixels(squared, real), "lower"),
        "mae_sum_over_pixels_moving_mnist": Scores(sum_over_pixels(absolute, real), "lower"),
        "psnr_db": Scores(psnr_by_frame(video, real), "higher"),
    }
    if min(real.shape[-2:]) >= SSIM_WINDOW:
        found["ssim"] = Scores(ssim_by_frame(video, real), "higher")
        # Both conventions stand in published tables; see conf/experiment/moving_mnist.yaml.
        found["ssim_uniform_7x7_moving_mnist"] = Scores(ssim_uniform_by_frame(video, real), "higher")
        wide = ssim_uniform_by_frame(video, real, data_range=2.0)
        found["ssim_uniform_7x7_data_range_2_moving_mnist"] = Scores(wide, "higher")
    if (scales := ms_ssim_scales(*real.shape[-2:])) > 1:
        found[f"ms_ssim_{scales}_scales"] = Scores(ms_ssim_by_frame(video, real, scales), "higher")
    if lpips is not None:
        found[f"lpips_{lpips.name}"] = Scores(lpips_by_frame(lpips, video, real), "lower")
    joined, joined_real = with_last(video, last), with_last(real, last)
    if is_vmaf:
        found["vmaf"] = Scores(vmaf_by_frame(joined, joined_real)[:, 1:], "higher")
    found["dtssd_grey_levels_of_255"] = Scores(dtssd_by_step(joined, joined_real), "lower")
    return found


def score_motion(video: Tensor, last: Tensor, is_flow: bool = True) -> dict[str, Scores]:
    """Give every figure that needs no reference; compare with the real clip's own. video, last: as score_fidelity takes them.

    is_flow: also those of optical flow, which take most of the time.
    """
    joined, horizons, found = with_last(video, last), video.shape[2], {}
    if is_flow:
        steps = warped_steps(joined)
        found["motion_lucas_kanade_pixels_per_frame"] = steps.speed
        found["warping_error_lucas_kanade_mse"] = steps.error
        found["warping_trusted_lucas_kanade_fraction"] = steps.trusted
    if horizons > 1:
        every, odd = range(horizons - 1), range(0, horizons - 1, 2)
        found["flicker_second_difference_grey_levels_of_255"] = _placed(flicker_by_frame(joined), every, horizons)
        for name, interpolator in INTERPOLATORS.items() if is_flow else [("linear", blend)]:
            errors = fie_smooth_by_frame(joined, interpolator)
            found[f"fie_smooth_{name}_grey_levels_of_255"] = _placed(errors, odd, horizons)
    return {name: Scores(values, "like_real") for name, values in found.items()}


def with_last(video: Tensor, last: Tensor) -> Tensor:
    """Put the last given frame (B, C, H, W) before clips (B, C, T, H, W)."""
    return torch.cat([rearrange(last, "B C H W -> B C 1 H W").to(video), video], dim=2)


def _placed(values: Tensor, horizons: range, count: int) -> Tensor:
    """Put values (B, len(horizons)) at their horizons of `count`, from 0; the others are NaN."""
    result = values.new_full((len(values), count), math.nan)
    result[:, list(horizons)] = values
    return result


class PixelTable:
    """Gather clips and give the table.

    lpips: of load_lpips, or None. is_vmaf: needs the vmaf extra and takes long. is_flow: see score_motion.
    Every clip must have the same number of future frames, and a row the same number of samples throughout.
    """

    def __init__(self, lpips: Lpips | None = None, is_vmaf: bool = False, is_flow: bool = True) -> None:
        self.lpips, self.is_vmaf, self.is_flow = lpips, is_vmaf, is_flow
        self._values: dict[str, dict[str, list[Tensor]]] = {}
        self._better: dict[str, Better] = {}
        self._static: dict[str, MotionMeter] = {}

    @torch.no_grad()
    def update(self, rows: Mapping[str, Tensor], real: Tensor, last: Tensor) -> None:
        """Add clips. rows: forecasts by name, (B, C, T, H, W), or (N, B, C, T, H, W) of N samples a clip, in [-1, 1].

        real: (B, C, T, H, W), what did happen; last: the last given frame (B, C, H, W). The row "real" makes itself.
        """
        self._check(rows, real)
        self._keep(REAL, 1, score_motion(real, last, self.is_flow))
        for name, forecast in rows.items():
            samples = forecast if forecast.ndim == 6 else rearrange(forecast, "B C T H W -> 1 B C T H W")
            count = len(samples)
            video = rearrange(samples, "N B C T H W -> (N B) C T H W")
            truth = real if count == 1 else repeat(real, "B C T H W -> (N B) C T H W", N=count)
            before = last if count == 1 else repeat(last, "B C H W -> (N B) C H W", N=count)
            scores = score_fidelity(video, truth, before, self.lpips, self.is_vmaf) | score_motion(video, before, self.is_flow)
            self._keep(name, count, scores)
            meter = self._static.setdefault(name, MotionMeter())
            meter.update(with_last(video, before), with_last(truth, before))

    def values(self, row: str, figure: str) -> Tensor:
        """Give a figure of every sample, clip and horizon: float64 (N, clips, T), NaN where it is not defined. For intervals and pairs."""
        return torch.cat(self._values[row][figure], dim=1)

    def figures(self, row: str) -> list[str]:
        """Give the names of a row's figures."""
        return list(self._values[row])

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Give one number a figure, row by row: mean over frames, then clips, and the ratio to the real clips of what has no reference.

        With N samples a clip the names end in _mean_of_N and _best_of_N. Flicker and PSNR of static and moving pixels are MotionMeter's.
        """
        table: dict[str, dict[str, float | None]] = {}
        for row in self._values:
            table[row] = {name: _mean(curve) for name, curve in self.by_clip(row).items()}
            if row != REAL:
                table[row] |= self._ratios(row) | self._static[row].figures()
        return table

    def by_horizon(self) -> dict[str, dict[str, list[float | None]]]:
        """Give the mean over clips at each horizon; entry 0 is the first predicted frame, None where a figure is not defined."""
        return {row: {name: _curve(values) for name, values in self.by_clip(row).items()} for row in self._values}

    def drift(self) -> dict[str, dict[str, float | int | None]]:
        """Give slope and half-life of every full-reference figure's mean over samples, row by row.

        Slopes in the figure's unit a frame. The floor of the half-life is the row copy_last_frame at the last horizon; without it None.
        """
        table: dict[str, dict[str, float | int | None]] = {}
        for row in self._values:
            table[row] = {}
            for figure in self.figures(row):
                better = self._better[figure]
                if better == "like_real":
                    continue
                curve = _curve(self.values(row, figure).mean(dim=0))
                floor = _curve(self.values(FLOOR, figure).mean(dim=0))[-1] if FLOOR in self._values else None
                table[row][f"{figure}_drift_slope_per_frame"] = drift_slope(curve)
                table[row][f"{figure}_half_life_frames"] = half_life_frames(curve, floor, better == "higher")
        return table

    def by_clip(self, row: str) -> dict[str, Tensor]:
        """Give every figure over samples, float64 (clips, T) with NaN where it is not defined, under the names that the summary uses."""
        found = {}
        for figure in self.figures(row):
            values, better = self.values(row, figure), self._better[figure]
            if len(values) == 1:
                found[figure] = values[0]
                continue
            found[f"{figure}_mean_of_{len(values)}"] = values.mean(dim=0)
            if better != "like_real":
                means = values.nanmean(dim=-1)
                best = means.argmax(dim=0) if better == "higher" else means.argmin(dim=0)
                found[f"{figure}_best_of_{len(values)}"] = values[best, torch.arange(len(best))]
        return found

    def _ratios(self, row: str) -> dict[str, float | None]:
        """Give each figure without reference over that of the real clips.

        A ratio of means, since a single still clip would spoil a mean of ratios.
        """
        found: dict[str, float | None] = {}
        for figure in self.figures(REAL):
            mean, real = _mean(self.values(row, figure).mean(dim=0)), _mean(self.values(REAL, figure)[0])
            found[f"{figure}_ratio_to_real"] = mean / real if mean is not None and real else None
        return found

    def _keep(self, row: str, samples: int, scores: Mapping[str, Scores]) -> None:
        kept = self._values.setdefault(row, {})
        for name, score in scores.items():
            kept.setdefault(name, []).append(rearrange(score.values.cpu(), "(N B) T -> N B T", N=samples))
            self._better[name] = score.better

    def _check(self, rows: Mapping[str, Tensor], real: Tensor) -> None:
        if REAL in rows:
            raise ValueError("A row came under the name 'real', which is that of the clips themselves: give it another name.")
        for name, forecast in rows.items():
            if forecast.ndim not in (5, 6) or forecast.shape[-5:] != real.shape:
                raise ValueError(
                    f"Row {name} has the shape {tuple(forecast.shape)}; the real clips are (B, C, T, H, W) = {tuple(real.shape)}: give "
                    "as much, or several samples as (N, B, C, T, H, W)."
                )
        known = {row: self.values(row, self.figures(row)[0]) for row in self._values if row != REAL}
        changed = [row for row in known if row not in rows or len(known[row]) != (len(rows[row]) if rows[row].ndim == 6 else 1)]
        fresh = [row for row in rows if known and row not in known]
        lengths = {values.shape[-1] for values in known.values()}
        if changed or fresh or lengths - {real.shape[2]}:
            raise ValueError(
                f"Clips of {real.shape[2]} frames with the rows {sorted(rows)} came after others of {sorted(lengths)} frames with the rows "
                f"{sorted(known)}: rows, samples and frames must stay the same from clip to clip."
            )


def _mean(values: Tensor) -> float | None:
    """Average (clips, T) over frames, then over clips, leaving NaN out; None where nothing is known."""
    means = values.nanmean(dim=-1)
    return None if means.isnan().all() else float(means.nanmean())


def _curve(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.nanmean(dim=0).tolist()]

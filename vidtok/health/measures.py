"""What a tokenizer does to clips, measured batch by batch so that memory does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vidtok.health.seams import Coder
from vidtok.metrics import SSIM_WINDOW, CodeMeter, FrameMeter, code_figures, psnr_by_frame, ssim_by_frame
from vidtok.temporal_metrics import ChangeMeter, MotionMeter, static_places

RAW_BITS_PER_PIXEL = 24


@dataclass(frozen=True)
class ClipFigures:
    """One clip: means over its frames; worst_frame counts from 0, flicker is None where nothing stands still."""

    psnr_db: float
    psnr_db_of_worst_frame: float
    worst_frame: int
    ssim: float | None
    flicker_static_grey_levels_of_255: float | None


def code_usage(codes: CodeMeter) -> dict[str, float]:
    """Give codes.summary() with what the verdicts judge: of several codebooks the lowest.

    Attainable is the mean number of entries that so many uniform draws hit, K (1 - (1 - 1/K)^N): no more can be expected.
    """
    figures = [code_figures(counts) for counts in codes.digit_counts]
    tokens = int(codes.digit_counts[0].sum())
    reached = [of["used_codes"] / _expected_codes(int(of["size_codes"]), tokens) for of in figures]
    return codes.summary() | {
        "codebook_used_of_attainable_fraction": min(1.0, *reached),
        "codebook_perplexity_of_size_fraction": min(of["perplexity_codes"] / of["size_codes"] for of in figures),
    }


def _expected_codes(size: int, tokens: int) -> float:
    return size if size == 1 else -size * math.expm1(tokens * math.log1p(-1 / size))


class HealthMeter:
    """Gather what one pass over the clips tells: fidelity by frame, flicker, codes and how they change."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self.psnr, self.ssim, self.motion = FrameMeter(), FrameMeter(), MotionMeter()
        self.codes = CodeMeter(coder.tokenizer.codebook_factors) if coder.is_discrete else None
        self.changes = ChangeMeter()
        self.clips: list[ClipFigures] = []
        self.size = (0, 0, 0)  # frames, height and width of a clip
        self.grid = (0, 0, 0)
        self.latent_channels = 0

    def update(self, video: Tensor) -> None:
        """Code clips (B, 3, T, H, W), all of one size, and measure them."""
        coder, tokenizer = self.coder, self.coder.tokenizer
        codes = coder.encode(video)
        reconstruction = coder.decode(codes, video)
        frames, height, width = video.shape[2:]
        t, h, w = codes.shape[-3:]
        self.size, self.grid = (frames, height, width), (t, h, w)
        psnr = psnr_by_frame(reconstruction, video).cpu()
        self.psnr.update(psnr)
        ssim = ssim_by_frame(reconstruction, video).cpu() if min(height, width) >= SSIM_WINDOW else None
        if ssim is not None:
            self.ssim.update(ssim)
        flicker = self.motion.update(reconstruction, video)
        if self.codes is None:
            self.latent_channels = codes.shape[1]
        else:
            self.codes.update(codes)
            static = static_places(video, self.grid, tokenizer.first_frames, tokenizer.stride_t, tokenizer.stride_s)
            self.changes.update(codes, static)
        for index, values in enumerate(psnr):
            level = float(flicker[index])
            self.clips.append(
                ClipFigures(
                    psnr_db=float(values.mean()),
                    psnr_db_of_worst_frame=float(values.min()),
                    worst_frame=int(values.argmin()),
                    ssim=None if ssim is None else float(ssim[index].mean()),
                    flicker_static_grey_levels_of_255=None if math.isnan(level) else level,
                )
            )

    def figures(self, fps: float) -> dict[str, Any]:
        """Give every figure under a key that names its unit; fps: frames a second of the clips."""
        has_ssim = len(self.ssim.counts) > 0
        psnr, ssim = self.psnr.by_frame(), self.ssim.by_frame() if has_ssim else None
        worst = _worst_tenth([clip.psnr_db for clip in self.clips])
        return {
            "psnr_db_mean_of_frames": self.psnr.mean(),
            "psnr_db_worst_tenth_of_clips": worst,
            "psnr_db_worst_tenth_below_mean": self.psnr.mean() - worst,
            "psnr_db_drop_over_frame_index": self._drop(psnr),
            "ssim_mean_of_frames": self.ssim.mean() if has_ssim else None,
            "ssim_worst_tenth_of_clips": _worst_tenth([clip.ssim or 0.0 for clip in self.clips]) if has_ssim else None,
            "psnr_db_by_frame_index": psnr,
            "ssim_by_frame_index": ssim,
            **self.motion.figures(),
            **self._rate(fps),
            **({} if self.codes is None else self.changes.figures() | code_usage(self.codes)),
        }

    def _drop(self, psnr: list[float]) -> float | None:
        """Give the mean PSNR of the first half of latent frames minus that of the second, the first latent frame left out.

        That one may be coded alone and better. None where no two latent frames are left.
        """
        first, stride_t = self.coder.tokenizer.first_frames, self.coder.tokenizer.stride_t
        steps = [sum(psnr[at : at + stride_t]) / stride_t for at in range(first, len(psnr) - stride_t + 1, stride_t)]
        half = len(steps) // 2
        return (sum(steps[:half]) - sum(steps[-half:])) / half if half else None

    def _rate(self, fps: float) -> dict[str, Any]:
        """Give how many numbers and bits stand for a pixel and a second; entropy: of each codebook by itself, without context."""
        frames, height, width = self.size
        pixels, places = frames * height * width, math.prod(self.grid)
        if self.codes is None:
            return {"latent_channels": self.latent_channels, "latent_values_per_pixel": self.latent_channels * places / pixels}
        raw, coded = sum(math.log2(size) for size in self.codes.factors), self.codes.entropy_bits()
        per_second = places / frames * fps
        return {
            "ids_per_clip": places,
            "ids_per_second": per_second,
            "bits_per_pixel_raw": raw * places / pixels,
            "bits_per_pixel_entropy_coded": coded * places / pixels,
            "bits_per_second_raw": raw * per_second,
            "bits_per_second_entropy_coded": coded * per_second,
            "compression_of_24_bit_pixels_raw": RAW_BITS_PER_PIXEL * pixels / (raw * places) if raw else None,
        }


def _worst_tenth(values: Sequence[float]) -> float:
    """Give the mean of the lowest tenth, at least one."""
    lowest = sorted(values)[: max(1, len(values) // 10)]
    return sum(lowest) / len(lowest)

"""Is a forecaster right as often as it says? Expected calibration error."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from vidgpt.clip_sums import Sums

BINS = 15


def expected_calibration_error(counts: Tensor, confidences: Tensor, hits: Tensor) -> Tensor:
    """Give sum over bins of |hits - confidences| / sum of counts, from sums (..., BINS); NaN where nothing was counted.

    This is sum of n_b / N |accuracy_b - mean confidence_b| (Naeini et al., 2015; Guo et al., arXiv:1706.04599), over BINS bins of equal
    width of the probability of the likeliest token: ((b - 1) / BINS, b / BINS]. Of few tokens it is too large: chance alone parts the two.
    """
    total = counts.sum(-1)
    return torch.where(total > 0, (hits - confidences).abs().sum(-1) / total, math.nan)


class Calibration:
    """Sums by bin of confidence: of each clip by frame, and over all clips by place of the grid."""

    names = ("bin_count", "bin_confidence", "bin_hits")

    def __init__(self, grid: tuple[int, int]) -> None:
        self._frames: list[Tensor] = []  # (3, B, t, BINS), frame 0 first
        self._places = torch.zeros(3, grid[0] * grid[1], BINS, dtype=torch.float64)

    def add(self, first_frame: int, confidence: Tensor, hits: Tensor) -> None:
        """Add tokens (B, t, h, w), NaN confidences and all, of frames first_frame .. first_frame + t - 1 of B clips."""
        batch, frames = confidence.shape[:2]
        bins = ((confidence.nan_to_num(0.0) * BINS).ceil().long() - 1).clamp(0, BINS - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, hits]).flatten(1)
        row = repeat(torch.arange(batch * frames), "(b t) -> (b t c)", b=batch, c=self._places.shape[1])
        place = repeat(torch.arange(self._places.shape[1]), "c -> (n c)", n=batch * frames)
        by_frame = _sum_by(row * BINS + bins.flatten(), values, batch * frames * BINS)
        parted = rearrange(by_frame, "kind (b t bin) -> kind b t bin", b=batch, t=frames)
        self._frames.append(F.pad(parted, (0, 0, first_frame, 0)))
        self._places += _sum_by(place * BINS + bins.flatten(), values, self._places[0].numel()).view_as(self._places)

    def by_frame(self) -> Sums:
        """Give the sums of each clip by frame index: (clips, t, BINS)."""
        longest = max((part.shape[2] for part in self._frames), default=0)
        padded = [F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in self._frames]
        sums = torch.cat(padded, dim=1) if padded else torch.zeros(3, 0, 0, BINS, dtype=torch.float64)
        return dict(zip(self.names, sums, strict=True))

    def total(self) -> Sums:
        """Give the sums of each clip: (clips, BINS)."""
        return {name: values.sum(1) for name, values in self.by_frame().items()}

    def by_place(self) -> Sums:
        """Give the sums over all clips by place, in raster order: (h * w, BINS)."""
        return dict(zip(self.names, self._places, strict=True))


def _sum_by(group: Tensor, values: Tensor, count: int) -> Tensor:
    """Add values (kinds, n) up by group (n,): (kinds, count)."""
    return torch.stack([torch.bincount(group, kind, minlength=count) for kind in values])

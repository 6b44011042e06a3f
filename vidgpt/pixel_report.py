"""What predicted frames are worth, as figures with intervals, a protocol and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vidgpt.clip_sums import Bootstrap, ClipPlace, number_episodes
from vidgpt.metrics import HIGH, LOW
from vidtok.video_metrics.detectors import FrechetMeter
from vidtok.video_metrics.table import REAL, PixelTable

MODEL, CEILING = "model", "tokenizer_ceiling"
RANKED_BY = "psnr_db"  # what is called the best and the worst clip
Row = dict[str, Any]


@dataclass(frozen=True)
class PixelReport:
    """Forecasts in pixels: the model's beside copying, extrapolation and the tokenizer's ceiling."""

    table: PixelTable
    distances: Sequence[FrechetMeter]
    protocol: dict[str, Any]  # what two evaluations must share
    bootstrap: Bootstrap
    places: Sequence[ClipPlace]  # of each clip

    @cached_property
    def episodes(self) -> list[int]:
        """Give the number of the episode that each clip was cut from."""
        return number_episodes(self.places)

    @cached_property
    def rows(self) -> list[str]:
        """Name the rows of every table, the real clips last."""
        names = list(self.table.summary())
        return [name for name in names if name != REAL] + [REAL]

    @cached_property
    def summary(self) -> dict[str, Row]:
        """Give every figure of every row, with the bounds of its interval, how it drifts, and its distances."""
        means, drift = self.table.summary(), self.table.drift()
        found = {}
        for row in self.rows:
            clips = {name: values.nanmean(dim=-1, keepdim=True) for name, values in self.table.by_clip(row).items()}
            bounds = self._bounds(clips)
            found[row] = {
                **{key: value for name, mean in means[row].items() for key, value in _with_bounds(name, mean, bounds, 0).items()},
                **drift[row],
                **({} if row == REAL else self._distances(row)),
            }
        return found

    @cached_property
    def by_horizon(self) -> list[Row]:
        """Give one row for each forecaster and horizon, 1 being the first predicted frame."""
        rows = []
        table = self.table.by_horizon()
        # Of one future frame and without optical flow nothing is known of the real clips.
        frames = max(len(curve) for curves in table.values() for curve in curves.values())
        for name, curves in table.items():
            bounds = self._bounds(self.table.by_clip(name))
            for horizon in range(frames):
                row: Row = {"forecaster": name, "horizon_frames": horizon + 1}
                for figure, curve in curves.items():
                    row |= _with_bounds(figure, curve[horizon], bounds, horizon)
                rows.append(row)
        return rows

    def by_clip(self) -> list[Row]:
        """Give one row for each forecaster and clip, its mean over future frames, for paired comparison of evaluations."""
        rows = []
        for name in self.rows:
            means = {figure: values.nanmean(dim=-1).tolist() for figure, values in self.table.by_clip(name).items()}
            for clip, place in enumerate(self.places):
                figures = {figure: _known(values[clip]) for figure, values in means.items()}
                rows.append({"forecaster": name} | place.columns() | figures)
        return rows

    def metrics(self) -> dict[str, Any]:
        """Give what metrics.json says under "pixels"."""
        about = {"protocol": self.protocol | {"distances": self._cards()}, "episodes_count": len(set(self.episodes))}
        return about | self.summary

    def worst_first(self) -> list[int]:
        """Give the numbers of the clips in order of RANKED_BY of the model, mean over samples and future frames."""
        return self.table.values(MODEL, RANKED_BY).mean(dim=0).nanmean(dim=-1).argsort(stable=True).tolist()

    def clip_mean(self, row: str, clip: int) -> float:
        """Give RANKED_BY of one clip, mean over samples and future frames."""
        return float(self.table.values(row, RANKED_BY)[:, clip].mean(dim=0).nanmean())

    def _bounds(self, figures: dict[str, Tensor]) -> dict[str, tuple[list[float], list[float]]]:
        """Give the bounds of the mean over clips of figures (clips, n), NaN where one is not defined; none of one episode."""
        if not figures:
            return {}
        stacked = torch.stack(list(figures.values()), dim=1)
        known, filled = (~stacked.isnan()).double(), stacked.nan_to_num(0.0)

        def means(weights: Tensor) -> Tensor:
            return torch.tensordot(weights, filled, dims=1) / torch.tensordot(weights, known, dims=1)

        bounds = self.bootstrap.interval(self.episodes, means, known.bool())
        if bounds is None:
            return {}
        return {name: (low.tolist(), high.tolist()) for name, low, high in zip(figures, *bounds, strict=True)}

    def _distances(self, row: str) -> Row:
        """Give each Fréchet distance of a row; None with the reason where it cannot be told."""
        found: Row = {}
        for meter in self.distances:
            name = f"{meter.detector.figure}_distance"
            try:
                found[name] = meter.distance(row)
            except ValueError as error:
                found |= {name: None, f"{name}_missing_because": str(error)}
        return found

    def _cards(self) -> dict[str, Any]:
        return {
            meter.detector.figure: {row: meter.card(row).as_dict() for row in self.rows if row != REAL}
            for meter in self.distances
        }


def join_samples(video: Tensor) -> Tensor:
    """Put samples (N, B, ...) behind one another: (N * B, ...)."""
    return rearrange(video, "N B ... -> (N B) ...")


def _with_bounds(name: str, value: float | None, bounds: dict[str, tuple[list[float], list[float]]], place: int) -> Row:
    """Give a figure with the bounds of its interval, where it has one."""
    row: Row = {name: value}
    if value is not None and name in bounds:
        low, high = bounds[name]
        row |= {name + LOW: _known(low[place]), name + HIGH: _known(high[place])}
    return row


def _known(value: float) -> float | None:
    return None if value != value else value

"""Forecasts without a model, and how figures drift."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vidtok.video_metrics.drift import drift_slope, half_life_frames
from vidtok.video_metrics.predictors import baseline_rows, copy_last_frame, linear_extrapolation


def test_copying_and_extrapolating_a_known_pixel() -> None:
    context = torch.tensor([9.0, -0.2, 0.1]).clamp(-1, 1).reshape(1, 1, 3, 1, 1).expand(1, 3, 3, 2, 2)
    assert copy_last_frame(context, 2)[0, 0, :, 0, 0].tolist() == pytest.approx([0.1, 0.1])
    # 2 * last - before, then the same step again, cut off at the end only.
    assert linear_extrapolation(context, 5)[0, 2, :, 1, 1].tolist() == pytest.approx([0.4, 0.7, 1.0, 1.0, 1.0])
    assert list(baseline_rows(context, 2)) == ["copy_last_frame", "linear_extrapolation"]
    assert list(baseline_rows(context[:, :, :1], 2)) == ["copy_last_frame"]


def test_forecasts_of_nothing_or_from_too_little_are_refused() -> None:
    context = torch.zeros(1, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="the last two"):
        linear_extrapolation(context, 3)
    with pytest.raises(ValueError, match="1 or more"):
        copy_last_frame(context, 0)
    with pytest.raises(ValueError, match="uint8"):
        copy_last_frame(context.to(torch.uint8), 1)


def test_the_drift_slope_is_that_of_numpy_and_leaves_unknown_horizons_out() -> None:
    curve = [30.0, 27.0, 25.5, 26.0, 22.0]
    assert drift_slope(curve) == pytest.approx(np.polyfit(np.arange(1, 6), curve, 1)[0])
    gaps = [30.0, None, 25.5, float("nan"), 22.0]
    assert drift_slope(gaps) == pytest.approx(np.polyfit([1, 3, 5], [30.0, 25.5, 22.0], 1)[0])
    assert drift_slope([1.0]) is None and drift_slope([]) is None


def test_the_half_life_is_the_first_horizon_half_way_to_the_floor() -> None:
    assert half_life_frames([30.0, 26.0, 25.0, 20.0], floor=20.0) == 3
    assert half_life_frames([0.1, 0.2, 0.35, 0.3], floor=0.5, is_higher_better=False) == 3
    assert half_life_frames([30.0, None, 25.1], floor=20.0) is None
    assert half_life_frames([18.0, 10.0], floor=20.0) is None  # nothing to lose
    assert half_life_frames([18.0, 10.0], floor=None) is None

"""How a figure changes with the horizon: its slope, and where the quality halves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Curve = Sequence[float | None]  # entry 0 is horizon 1; None or NaN where the figure is not defined


def drift_slope(curve: Curve) -> float | None:
    """Give the slope of the least-squares line through a figure over the horizon, in its unit a frame; None below two known values."""
    known = [(horizon, value) for horizon, value in enumerate(curve, 1) if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return None
    points = torch.tensor(known, dtype=torch.float64)
    horizons, values = (points - points.mean(dim=0)).unbind(dim=1)
    return float((horizons * values).sum() / horizons.square().sum())


def half_life_frames(curve: Curve, floor: float | None, is_higher_better: bool = True) -> int | None:
    """Give the first horizon at which half of what the forecast was worth at horizon 1 is gone.

    That is where the figure has gone half the way, or more, from its value at horizon 1 to the floor; the floor of a table is the
    copied last frame at the last horizon, which knows the place but nothing of what happened since. None: never in this curve, or there
    is nothing to lose, because the figure of horizon 1 is no better than the floor.
    """
    sign = 1.0 if is_higher_better else -1.0
    if not curve or curve[0] is None or floor is None or not sign * (curve[0] - floor) > 0:
        return None
    middle = sign * (curve[0] + floor) / 2
    return next((horizon for horizon, value in enumerate(curve, 1) if value is not None and sign * value <= middle), None)

"""Forecasts without a model, in pixels: the rows that every table needs to be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import repeat
from torch import Tensor

from vidtok.metrics import check_pair


def copy_last_frame(context: Tensor, future: int) -> Tensor:
    """Repeat the last given frame. context: (B, C, T, H, W) in [-1, 1]; gives (B, C, future, H, W)."""
    _check(context, future, 1)
    return repeat(context[:, :, -1], "B C H W -> B C T H W", T=future)


def linear_extrapolation(context: Tensor, future: int) -> Tensor:
    """Go on with the last change of every pixel: frame k is last + k * (last - before), cut off at [-1, 1].

    The first is 2 * last - before. context: (B, C, T, H, W) in [-1, 1] of two frames or more; gives (B, C, future, H, W).
    """
    _check(context, future, 2)
    last, before = context[:, :, -1:], context[:, :, -2:-1]
    steps = torch.arange(1, future + 1, device=context.device, dtype=context.dtype).reshape(-1, 1, 1)
    # Cut off once at the end: in between it would make a pixel that touches the limit stop there, one step too late or for good.
    return (last + steps * (last - before)).clamp(-1, 1)


BASELINES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "copy_last_frame": copy_last_frame,
    "linear_extrapolation": linear_extrapolation,
}


def baseline_rows(context: Tensor, future: int) -> dict[str, Tensor]:
    """Give every baseline's frames by its name; after a single given frame there is no linear extrapolation."""
    rows = {"copy_last_frame": copy_last_frame(context, future)}
    return rows | ({"linear_extrapolation": linear_extrapolation(context, future)} if context.shape[2] > 1 else {})


def _check(context: Tensor, future: int, least: int) -> None:
    check_pair(context, context)
    if context.shape[2] < least:
        raise ValueError(f"{context.shape[2]} given frame came, linear extrapolation needs the last two: give one more.")
    if future < 1:
        raise ValueError(f"{future} frames were asked for: the number must be 1 or more.")

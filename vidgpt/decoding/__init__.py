"""Decoding plans: which positions run in each forward pass and which are committed. One file a plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from vidgpt.decoding.raster import passes_per_frame, raster
from vidgpt.layout import TokenLayout


@dataclass(frozen=True)
class Plan:
    """A plan and what it costs."""

    decode: Callable[..., Iterator[Tensor]]  # called as raster is
    passes_per_frame: Callable[[TokenLayout], float]  # forward passes a latent frame, in closed form


PLANS = {"raster": Plan(raster, passes_per_frame)}

__all__ = ["PLANS", "Plan", "raster"]

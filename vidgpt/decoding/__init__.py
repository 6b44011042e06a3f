"""Decoding plans: which positions run in each forward pass and which are committed. One file a plan."""

from vidgpt.decoding.raster import raster

PLANS = {"raster": raster}

__all__ = ["PLANS", "raster"]

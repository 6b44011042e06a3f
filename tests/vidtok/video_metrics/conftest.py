from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@pytest.fixture
def moving() -> Callable[..., Tensor]:
    """Give a maker of clips (B, 3, T, H, W) in [-1, 1]: a smooth random texture that glides by `speed` (x, y) pixels a frame."""

    def make(clips: int = 2, frames: int = 9, size: int = 32, speed: tuple[int, int] = (2, 1), seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        side = size + frames * max(abs(step) for step in speed) + 6
        noise = torch.rand(clips, 3, side, side, generator=generator)
        texture = (F.avg_pool2d(noise, 5, stride=1) * 6 - 3).clamp(-1, 1)
        # The window goes against the motion, so that what it shows goes with it.
        places = [tuple((frames - 1 - t) * step if step > 0 else -t * step for step in speed) for t in range(frames)]
        return torch.stack([texture[..., y : y + size, x : x + size] for x, y in places], dim=2)

    return make

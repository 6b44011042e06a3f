"""Large frames in tiles: each tile is worked on with some of its neighbours around it, and the results are blended into one."""

from collections.abc import Callable

import torch
from torch import Tensor


def run_tiled(
    work: Callable[[Tensor], Tensor],
    source: Tensor,
    cells: tuple[int, int],
    scales: tuple[int, int],
    tile: int,
    overlap: int,
    ramp: int,
) -> Tensor:
    """Give work(source), computed tile by tile.

    source: (B, C, T, H, W), H and W cells[i] * scales[0]; work gives sides of cells * scales[1]. tile: cells a side of a tile;
    overlap: cells of the neighbours that are worked on with it, on every side; ramp: cells over which two neighbours are blended
    on each side of their border (linear weights that sum to 1), 0 cuts there, which is exact where overlap reaches as far as `work` looks.
    """
    result: Tensor | None = None
    for rows in _spans(cells[0], tile, overlap):
        for columns in _spans(cells[1], tile, overlap):
            part = source[..., _scaled(rows, scales[0]), _scaled(columns, scales[0])]
            done = work(part)
            if result is None:
                sides = [count * scales[1] for count in cells]
                result = done.new_zeros(*done.shape[:3], *sides)
            weights = [
                _weights(span, count, tile, ramp, scales[1]).to(done) for span, count in ((rows, cells[0]), (columns, cells[1]))
            ]
            result[..., _scaled(rows, scales[1]), _scaled(columns, scales[1])] += done * weights[0][:, None] * weights[1]
    assert result is not None
    return result


def _spans(count: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """Give (first, end, core) of every tile along a side of `count` cells; the core starts at `core` and has `tile` cells or the rest."""
    return [(max(0, core - overlap), min(count, core + tile + overlap), core) for core in range(0, count, tile)]


def _scaled(span: tuple[int, int, int], scale: int) -> slice:
    return slice(span[0] * scale, span[1] * scale)


def _weights(span: tuple[int, int, int], count: int, tile: int, ramp: int, scale: int) -> Tensor:
    """Give the weight of every value of a tile along one side: 1 in its core, linear across its inner borders, 0 beyond."""
    first, end, core = span
    places = torch.arange(first * scale, end * scale) + 0.5
    weights = torch.ones(len(places))
    width = max(2 * ramp * scale, 1e-6)
    if core > 0:
        weights = weights * ((places - core * scale) / width + 0.5).clamp(0, 1)
    if core + tile < count:
        weights = weights * ((core + tile) * scale - places).div(width).add(0.5).clamp(0, 1)
    return weights

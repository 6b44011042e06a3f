"""Large frames in tiles: each tile is worked on with some of its neighbours around it, and the results are blended into one."""

import sys
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

    source: (B, C, T, H, W), H and W cells[i] * scales[0], the last cell may be smaller; work gives whole cells of scales[1] a side.
    tile: cells a side of a tile;
    overlap: cells of the neighbours that are worked on with it, on every side; ramp: cells over which two neighbours are blended
    on each side of their border (linear weights that sum to 1), 0 cuts there, which is exact where overlap reaches as far as `work` looks.
    """
    if tile >= max(cells):
        return work(source)
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


def tile_cells(tile: int | None, overlap: int | None, reach: int, cell: int) -> tuple[int, int, int]:
    """Give a tile's cells, its overlap and its ramp in cells, for run_tiled, of pixels; `cell`: pixels a side of a cell.

    tile None: whole frames. overlap None, or more than reach, the pixels that layers look beyond a cell: as far as that.
    Raises ValueError.
    """
    if tile is None:
        return sys.maxsize, 0, 0
    if tile < cell or (overlap is not None and overlap < 0):
        raise ValueError(f"tile={tile} and overlap={overlap} are in pixels: a tile needs {cell} or more, an overlap 0 or more")
    far = -(-reach // cell)
    cells = far if overlap is None else min(far, -(-overlap // cell))
    # As far as layers look, a tile's own part is exact and is cut out; nearer, its error fades towards the tile's middle.
    # Ramps of two borders must not meet inside a tile, or three tiles would share a place.
    ramp = min(max(1, cells // 2), tile // cell // 2) if 0 < cells < far else 0
    return tile // cell, cells, ramp


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

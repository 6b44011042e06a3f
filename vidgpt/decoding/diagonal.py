"""Diagonal decoding: several rows at once, each `window` tokens behind the one above.

A frame of H rows and W columns takes W + window (H - 1) forward passes instead of H W, and `delay` of them where the next frame begins
so many passes behind it. What is drawn in one pass is drawn independently, so this is another distribution than raster's, but for
window >= W without a delay. A row begins before the row above has ended: a stand-in for that row's last token is read in its
place, seen by nobody else, and the true one is read as soon as it is drawn. Source: arXiv:2503.14070, with what is not drawn yet hidden.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice, repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgpt.decoding.reader import Queries, Reader
from vidgpt.layout import TokenLayout
from vidgpt.masks import MaskRule, diagonal_passes, stand_in_age
from vidgpt.masks import diagonal as diagonal_rule


@dataclass
class Pass:
    """What one forward pass reads: positions for their keys alone, then those that each predict the next one."""

    ends: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    sources: dict[int, int] = field(default_factory=dict)  # of queries that are not drawn yet: where to take the id from
    complete: int = 0  # frames that are complete after it

    @property
    def reads(self) -> list[int]:
        """Give all positions."""
        return [*self.ends, *self.queries]


def schedule(layout: TokenLayout, first: int, frames: int, window: int, delay: int) -> Iterator[Pass]:
    """Yield the passes that draw `frames` frames from position `first` on; the slot before it is drawn, but not read."""
    columns, size = layout.width * layout.slots_per_place, layout.tokens_per_frame
    window, step = min(window, columns), diagonal_passes(layout, window, delay)
    age = stand_in_age(layout, window, delay)
    passes = defaultdict[int, Pass](Pass)
    passes[0].ends.append(first - 1)
    for frame in range(frames):
        lead = first + frame * size
        for row in range(layout.height):
            begin, before = frame * step + window * row, lead + row * columns
            for column in range(columns):
                passes[begin + column].queries.append(before + column)
            if row and window < columns:
                passes[begin].sources[before] = before - size * min(age, lead // size)
            if window < columns or row == layout.height - 1:
                # Nobody's query, because the row below has begun, or comes with the next frame.
                passes[begin + columns].ends.append(before + columns)
        passes[begin + columns - 1].complete += 1
        # The frames to come begin later: these passes are whole.
        yield from (passes.pop(number) for number in range(frame * step, (frame + 1) * step))
    yield from (passes[number] for number in sorted(passes) if passes[number].queries)


def diagonal(reader: Reader, leads: Tensor, window: int = 1, delay: int = 0) -> Iterator[Tensor]:
    """Yield the picture slots of each frame to come, arguments as of raster."""
    layout, size = reader.layout, reader.layout.tokens_per_frame
    step, row_rule = diagonal_passes(layout, window, delay), diagonal_rule(layout, window, delay, begins_row=True)
    passes = iter(schedule(layout, reader.length, leads.shape[1], window, delay))
    # Until as many frames are under way as ever will be, each block differs from the one before: these are prepared together.
    rising = -(-diagonal_passes(layout, window) // step)
    end, former = reader.length, None
    reader.extend(leads)
    for frames in chain([rising], repeat(1, leads.shape[1] - rising), repeat(rising)):
        if not (block := list(islice(passes, step * frames))):
            break
        ends = [end := max(end, *due.reads, 0) for due in block]
        writes = [_writes(due, last + 1) for due, last in zip(block, ends, strict=True)]
        former = _prepare(reader, block, writes, row_rule, former)
        queries, slots, sources, start = former.queries, former.places[2:], former.sources, 0
        for due, written, last in zip(block, writes, ends, strict=True):
            stop = start + len(written)
            part = queries.part(start, stop)
            above = max(last, *written) + 1
            states = reader.read(
                part, above, reader.tokens.gather(1, sources[:, start:stop]), slots[:, start:stop], keep=len(due.queries)
            )
            targets = part.positions[:, len(due.ends) :] + 1
            reader.tokens.index_copy_(1, targets[0], reader.draw(reader.logits(states), targets))
            start = stop
            for _ in range(due.complete):
                reader.length += size
                reader.work.frames += 1
                yield reader.tokens[:, reader.length - size + 1 : reader.length]


def _writes(due: Pass, free: int) -> list[int]:
    """Give where each read of a pass writes its keys: stand-ins behind all that is in use, until others come there."""
    spare = count(free)
    return [next(spare) if position in due.sources else position for position in due.reads]


@dataclass(frozen=True)
class _Block:
    """What several passes read, one behind the other."""

    places: Tensor  # (3, n): positions, those of their ids, slots to write
    queries: Queries
    sources: Tensor  # (B, n), as each row counts the second of the places

    def is_a_frame_before(self, reader: Reader, places: Tensor) -> bool:
        """Tell whether other places are these, a frame on, and see what these see and the first frame, which all of these see."""
        size = reader.layout.tokens_per_frame
        is_endless = reader.starts is None and not reader.model.config.attention_frames
        if not is_endless or places.shape != self.places.shape or not torch.equal(places, self.places + size):
            return False
        assert self.queries.mask is not None
        return not bool(self.queries.mask[..., :size].any())


def _prepare(
    reader: Reader, block: list[Pass], writes: list[list[int]], row_rule: MaskRule, former: _Block | None = None
) -> _Block:
    """Make ready to read several passes; former: the block before, which is often the same but for the frame."""
    reads = [position for due in block for position in due.reads]
    sources = [due.sources.get(position, position) for due in block for position in due.reads]
    places = torch.tensor([reads, sources, list(chain(*writes))], device=reader.device)
    if former is not None and former.queries.mask is not None and former.is_a_frame_before(reader, places):
        queries = reader.queries(places[0], max(chain(*writes)) + 1, use_mask=False)
        mask = F.pad(former.queries.mask, (reader.layout.tokens_per_frame, 0))
        return _Block(places, replace(queries, mask=mask), places[1:2].expand(reader.batch, -1))
    is_stand_in = (places[0] != places[1])[:, None]

    def allow(query_positions: Tensor, key_positions: Tensor) -> Tensor:
        seen = torch.where(is_stand_in, row_rule(query_positions, key_positions), reader.rule(query_positions, key_positions))
        return seen | (places[2][:, None] == key_positions)

    queries = reader.queries(places[0], max(chain(*writes)) + 1, allow)
    own = places[1:2].expand(reader.batch, -1)
    if reader.starts is not None:
        # A row that began later has its stand-ins from its own first frame.
        size = reader.layout.tokens_per_frame
        missing = -(-(reader.starts[:, None] - own) // size)
        own = torch.where(is_stand_in[:, 0], own + missing.clamp(min=0) * size, own)
    return _Block(places, queries, own)

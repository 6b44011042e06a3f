"""Raster decoding: one slot a forward pass, the reference for every other plan."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vidgpt.decoding.reader import Reader


def raster(reader: Reader, leads: Tensor) -> Iterator[Tensor]:
    """Yield the picture slots (B, S) of each frame to come, whose leads (B, frames) are given, as it is ready.

    The last token of a frame is read together with the next lead: its keys are missing from the cache until then.
    """
    size = reader.layout.tokens_per_frame
    reader.extend(leads)
    for _ in range(leads.shape[1]):
        first = reader.length
        # The last slot of the frame before, the lead, and all slots that predict another.
        positions = torch.arange(first - 1, first + size - 1, device=reader.device)
        queries = reader.queries(positions, first + size)
        for slot in range(1, size):
            part = queries.part(slot if slot > 1 else 0, slot + 1)
            # A single token sees all that is in use, but for windows and rows that begin later.
            states = reader.read(part.unmasked() if slot > 1 and reader.is_plain else part, first + slot)
            reader.tokens[:, first + slot] = reader.draw(reader.logits(states), positions[None, slot : slot + 1] + 1)[:, 0]
        reader.length = first + size
        reader.work.frames += 1
        yield reader.tokens[:, first + 1 : first + size]

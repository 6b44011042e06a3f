"""Keys and values of what was already read, in slots allocated once; the caller owns the object, no module keeps state.

Plain use appends: slot = position, all rows alike, and reads give the filled slots alone, so that unused length costs nothing.
A decoding plan may also say which positions a pass writes (`writing`): any, row by row, again or for the first time. The cache then
marks which position stands in every slot of every row; what is unfilled, taken back or overwritten has no mark. Slots behind the sinks
go round, so that a rollout may be longer than the cache: a row that writes position p loses the one a round before.
Where a position stands is arithmetic (`slot_positions`), so that a plan makes the masks of many passes at once, before any of them:
it hides what it has not written yet, and so reads marked slots alone. No mark says that an id is final: whatever may still change is
read again, before or while others see it.
It keeps transformers' contract (`update(key, value, layer_idx)`), so `model.generate` runs on it.
Travels with exported models (vidgpt.exporting).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

EMPTY = -1


@dataclass
class Cursor:
    """Where the pass under way writes and reads; one object for all layers of a cache."""

    length: int = 0  # slots filled by appending
    slots: Tensor | None = None  # (B, n), or (1, n) where all rows are alike, to be written; None appends
    end: int = 0  # slots to be read where `slots` says what to write
    is_told: bool = False  # whether positions came, so that appending is over


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (B, heads, slots, head_dim); those of the cache's last layer end a pass."""

    is_croppable = True

    def __init__(self, num_slots: int, cursor: Cursor, is_last: bool) -> None:
        super().__init__()
        self.num_slots, self.cursor, self.is_last = num_slots, cursor, is_last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all slots with the batch, dtype and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write the slots of this pass, give all those in use, in the dtype that came. Raises ValueError when there is no room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.keys):
            raise ValueError(f"the cache has {len(self.keys)} rows and {len(key_states)} came: make one for each batch size")
        cursor = self.cursor
        end = cursor.end if cursor.slots is not None else self._append(key_states.shape[2])
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        if cursor.slots is None and self.is_last:
            cursor.length = end
        dtype = key_states.dtype
        return self.unpack(self.keys[:, :, :end], dtype), self.unpack(self.values[:, :, :end], dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give (keys after the next update, offset of the first)."""
        return self.cursor.length + query_length, 0

    def get_seq_length(self) -> int:
        """Give the number of slots filled by appending."""
        return self.cursor.length

    def get_max_length(self) -> int:
        """Give the number of slots."""
        return self.num_slots

    def pack(self, states: Tensor) -> Tensor:
        """Turn states (B, heads, n, head_dim) into what is stored."""
        # The first keys may have come under autocast and these not.
        return states.to(self.dtype)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn what is stored into states (B, heads, n, head_dim)."""
        return stored.to(dtype)

    def _append(self, count: int) -> int:
        """Give the slots filled after appending so many. Raises ValueError when that cannot be."""
        end = self.cursor.length + count
        if self.cursor.is_told:
            raise ValueError("this cache was told which positions it holds, so a pass must say which it writes: use writing()")
        if end > self.num_slots:
            raise ValueError(f"the cache has {self.num_slots} slots and {end} are needed: make it longer or predict fewer frames")
        return end

    def _allocate(self, states: Tensor) -> Tensor:
        packed = self.pack(states[:, :, :0])
        # Zeros: a masked slot still enters a product, where NaN times 0 is NaN.
        return packed.new_zeros(*packed.shape[:2], self.num_slots, packed.shape[-1])

    def _write(self, stored: Tensor, states: Tensor) -> None:
        states, slots, length = self.pack(states), self.cursor.slots, self.cursor.length
        if slots is None:
            stored[:, :, length : length + states.shape[2]] = states
        elif len(slots) == 1:
            stored.index_copy_(2, slots[0], states)
        else:
            stored[torch.arange(len(slots), device=slots.device)[:, None], :, slots] = states.transpose(1, 2)


class SlotCache(Cache):
    """A preallocated cache for every layer.

    num_slots: for num_slots positions, or, where a rollout is longer, for the sinks and the newest others.
    sink_slots: the first so many slots are never taken again. layer_class: how a layer stores its states.
    """

    def __init__(self, num_layers: int, num_slots: int, sink_slots: int = 0, layer_class: type[SlotLayer] = SlotLayer) -> None:
        self.cursor, last = Cursor(), num_layers - 1
        super().__init__(layers=[layer_class(num_slots, self.cursor, n == last) for n in range(num_layers)])
        self.num_slots, self.sink_slots = num_slots, sink_slots
        # (B, slots), or (1, slots) where all rows are alike; EMPTY where nothing may be read; None while all was appended.
        self.positions: Tensor | None = None
        self.end = 0
        # Passes that were recorded over these slots (vidgpt.recording): gone with their memory.
        self.recorded: Any = None

    def slot_positions(self, end: int, device: torch.device | str = "cpu") -> Tensor:
        """Give the position (slots in use,) that stands in each slot once all positions below `end` are written.

        While some are not, one above those written stands for an older one, or for none: nobody may attend it there.
        """
        slots = torch.arange(min(end, self.num_slots), device=device)
        if end <= self.num_slots:
            return slots
        ring = self.num_slots - self.sink_slots
        return torch.where(slots < self.sink_slots, slots, slots + (end - 1 - slots) // ring * ring)

    def _slots_of(self, positions: Tensor, end: int) -> Tensor:
        """Give where positions, all below `end`, stand."""
        if end <= self.num_slots:
            return positions
        sinks, behind = self.sink_slots, positions - self.sink_slots
        return torch.where(behind < 0, positions, sinks + behind % (self.num_slots - sinks))

    @contextmanager
    def writing(self, positions: Tensor, end: int) -> Iterator[Tensor]:
        """Let the next forward pass write positions (B, n); gives the position in each slot (B, slots in use) that it may read.

        B may be 1 where all rows are alike. A row's positions differ, and lie less than a round apart. end: above every position so
        far, known on the host, so that nothing waits for a GPU. Should the pass fail, what it wrote stays unread, and so does what it
        wrote over.
        """
        if positions.shape[1] > self.num_slots:
            raise ValueError(f"{positions.shape[1]} tokens in one pass exceed the {self.num_slots} slots: read fewer at a time")
        assert self.cursor.slots is None, "one pass at a time"
        known = self._known(positions)
        self.end = used = max(self.end, min(end, self.num_slots))
        slots = self._slots_of(positions, end)
        rows = max(len(known), len(slots))
        marked = slots.expand(rows, -1)
        # Unread from now on: should the pass fail, some layers hold the old states and others the new.
        self.positions = known = known.expand(rows, -1).scatter(1, marked, EMPTY)
        self.cursor.slots, self.cursor.end = slots, used
        try:
            seen = known.scatter(1, marked, positions.expand(rows, -1))
            yield seen[:, :used]
            self.positions = seen
        finally:
            self.cursor.slots = None

    def forget(self, first: Tensor) -> None:
        """Let no row read its positions from first (B,), or (1,) for all rows, on."""
        known = self._known(first)
        self.positions = known.masked_fill(known >= first[:, None], EMPTY)

    def evict(self, last: Tensor) -> None:
        """Let no row read its positions before last (B,), or (1,) for all rows, sinks excepted."""
        known = self._known(last)
        self.positions = known.masked_fill((known < last[:, None]) & (known >= self.sink_slots), EMPTY)

    def rewind(self, length: int) -> None:
        """Keep positions below `length`. Raises ValueError when fewer were appended."""
        if self.positions is not None:
            return self.forget(self.positions.new_full((1,), length))
        filled = self.cursor.length
        if not 0 <= length <= filled:
            raise ValueError(f"cannot rewind to {length}: {filled} positions are filled")
        self.cursor.length = length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, all appended; transformers passes their number as a negative count."""
        assert not self.cursor.is_told, "use rewind() or forget()"
        self.rewind(max(0, self.cursor.length - abs(tokens_to_remove)))

    def reset(self) -> None:
        """Forget everything; the memory is kept, and cleared: a NaN of one clip would reach the next through its masked slots."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()
        self.positions, self.end, self.cursor.length, self.cursor.is_told = None, 0, 0, False

    def repeat_rows(self, count: int) -> None:
        """Let every row stand `count` times, row by row: several samples of one context read it once."""
        if self.layers[0].is_initialized:
            self.select_rows(torch.arange(len(self.layers[0].keys)).repeat_interleave(count))

    def select_rows(self, rows: Tensor) -> None:
        """Keep the given rows (rows,), in that order, some perhaps several times."""
        self.recorded = None
        for layer in self.layers:
            if layer.is_initialized:
                on = rows.to(layer.keys.device)
                layer.keys, layer.values = layer.keys.index_select(0, on), layer.values.index_select(0, on)
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    # The names under which transformers asks for the same.
    batch_repeat_interleave = repeat_rows
    batch_select_indices = reorder_cache = select_rows

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        tensors = [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _known(self, like: Tensor) -> Tensor:
        """Give the position in every slot, kept from now on beside what was appended."""
        if self.positions is None:
            slots, filled = torch.arange(self.num_slots, device=like.device), self.cursor.length
            self.positions, self.end, self.cursor.is_told = torch.where(slots < filled, slots, EMPTY)[None], filled, True
        return self.positions

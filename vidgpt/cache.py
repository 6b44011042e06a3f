"""Keys and values of what was already read, in slots allocated once; the caller owns the object, no module keeps state.

Reads return filled slots only, so that an unfilled or stale slot is never attended and unused length costs nothing. It keeps
transformers' contract (`update(key, value, layer_idx)`), so `model.generate` runs on it.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (B, heads, slots, head_dim); slot = position."""

    is_croppable = True

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all slots with the batch, dtype and device of the first keys."""
        batch, heads, _, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, heads, self.num_slots, dim)
        self.values = value_states.new_empty(batch, heads, self.num_slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write the next slots, give all filled ones. Raises ValueError when there is no room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.num_slots:
            raise ValueError(
                f"the cache has {self.num_slots} slots and {end} are needed: allocate a longer one or predict fewer frames"
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give (keys after the next update, offset of the first)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Give the number of filled slots."""
        return self.length

    def get_max_length(self) -> int:
        """Give the number of slots."""
        return self.num_slots

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; transformers passes their number as a negative count."""
        self.length = max(0, self.length - abs(tokens_to_remove))


class SlotCache(Cache):
    """A preallocated cache of `num_slots` positions for every layer."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        super().__init__(layers=[SlotLayer(num_slots) for _ in range(num_layers)])

    def rewind(self, length: int) -> None:
        """Keep the first `length` positions. Raises ValueError when fewer are filled."""
        filled = self.get_seq_length()
        if not 0 <= length <= filled:
            raise ValueError(f"cannot rewind to {length}: {filled} positions are filled")
        for layer in self.layers:
            layer.crop(length - filled)

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        tensors = [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * torch.finfo(tensor.dtype).bits // 8 for tensor in tensors)

"""Keys and values in a byte a number: half the memory of bf16, for more time a read. `SlotCache(..., layer_class=Int8Layer)`."""

import torch
from torch import Tensor

from vidgpt.cache import SlotLayer


class Int8Layer(SlotLayer):
    """Stores (B, heads, slots, head_dim + 2) bytes: steps of a 127th of the token's largest number, and that step in bf16."""

    def pack(self, states: Tensor) -> Tensor:
        """Round to the nearest step."""
        step = (states.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30).bfloat16()
        # Clamped: the step is rounded, so that the largest number may be half a step more than 127 of them.
        numbers = (states / step.float()).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([numbers, step.view(torch.int8)], dim=-1)

    def unpack(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Give the states again, to half a step."""
        step = stored[..., -2:].contiguous().view(torch.bfloat16).float()
        return (stored[..., :-2] * step).to(dtype)

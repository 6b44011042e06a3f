"""Attention masks as small rules over positions, shared by training, decoding and tests."""

from collections.abc import Callable

from torch import Tensor

# allow(query position, key position) -> may attend; both broadcastable integer tensors.
MaskRule = Callable[[Tensor, Tensor], Tensor]


def causal(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """A token sees itself and all before it."""
    return key_positions <= query_positions


def build_mask(rule: MaskRule, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Give the boolean mask (B, 1, queries, keys), True = may attend, of positions (B, queries) and (B, keys)."""
    return rule(query_positions[:, None, :, None], key_positions[:, None, None, :]).contiguous()

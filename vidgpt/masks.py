"""Attention masks as small rules over positions, shared by training, decoding and tests.

Travels with exported models (vidgpt.exporting).
"""

from collections.abc import Callable

from torch import Tensor

from vidgpt.config import VidGPTConfig
from vidgpt.layout import TokenLayout

# allow(query position, key position) -> may attend; both broadcastable integer tensors.
MaskRule = Callable[[Tensor, Tensor], Tensor]


def causal(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """A token sees itself and all before it."""
    return key_positions <= query_positions


def sliding(layout: TokenLayout, frames: int, sinks: int = 0) -> MaskRule:
    """Give the rule of a window: a token sees no frame older than the newest `frames`, its own included, but the first `sinks`.

    It says nothing about what lies behind the token: rule_of joins it with a rule that does.
    """

    def allow(query_positions: Tensor, key_positions: Tensor) -> Tensor:
        size = layout.tokens_per_frame
        frame = key_positions // size
        return (frame > query_positions // size - frames) | (frame < sinks)

    return allow


def rule_of(config: VidGPTConfig, base: MaskRule = causal) -> MaskRule:
    """Give the rule of a model: what both `base` (causal, or that of a decoding plan) and the model's own window allow.

    It is `base` itself where the model sees all frames.
    """
    if not config.attention_frames:
        return base
    window = sliding(TokenLayout.from_config(config), config.attention_frames, config.sink_frames)
    return lambda query_positions, key_positions: base(query_positions, key_positions) & window(query_positions, key_positions)


def diagonal_passes(layout: TokenLayout, window: int, delay: int = 0) -> int:
    """Give by how many passes of diagonal decoding a frame begins behind the one before: W + window (H - 1), or a shorter delay."""
    columns = layout.width * layout.slots_per_place
    whole = columns + min(window, columns) * (layout.height - 1)
    return min(delay, whole) if delay else whole


def stand_in_age(layout: TokenLayout, window: int, delay: int = 0) -> int:
    """Give how many frames ago the end of a row was drawn last, when the row below it begins; with a delay it may be several."""
    columns = layout.width * layout.slots_per_place
    return max(1, -(-(columns - min(window, columns)) // diagonal_passes(layout, window, delay)))


def diagonal(layout: TokenLayout, window: int, delay: int = 0, begins_row: bool = False) -> MaskRule:
    """Give the rule of diagonal decoding: row r + 1 begins when row r has `window` tokens, and so on downwards.

    A token (r, c) sees (r', c') where r' <= r and window r' + c' <= window r + c: what is drawn by then, for it predicts (r, c + 1).
    delay: a frame begins so many passes behind the one before, complete or not; 0 waits for it. begins_row: the queries are stand-ins
    at the ends of rows, which predict the row below and see what is drawn before it.
    Source: arXiv:2503.14070; tokens that are not drawn yet are hidden here, unlike there.
    """
    columns = layout.width * layout.slots_per_place
    # A wider window changes nothing: the row above is then complete.
    window, passes = min(window, columns), diagonal_passes(layout, window, delay)

    def allow(query_positions: Tensor, key_positions: Tensor) -> Tensor:
        queries, keys = (_places(layout, columns, positions) for positions in (query_positions, key_positions))
        if begins_row:
            # Left of the row's first place, as a lead stands left of its frame's.
            queries = queries[0], queries[1] + 1, queries[2] - columns
        rows, key_rows = (frame * layout.height + row for frame, row, _ in (queries, keys))
        drawn_in, key_drawn_in = (passes * frame + window * row + column for frame, row, column in (queries, keys))
        return (key_rows <= rows) & (key_drawn_in <= drawn_in)

    return allow


def _places(layout: TokenLayout, columns: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give (frame, row, column) of positions in slots; a lead stands left of its frame's first place, in column -1."""
    slot = positions % layout.tokens_per_frame - 1
    row = slot.clamp(min=0) // columns
    return positions // layout.tokens_per_frame, row, slot - row * columns


def build_mask(rule: MaskRule, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Give the boolean mask (B, 1, queries, keys), True = may attend, of positions (B, queries) and (B, keys)."""
    return rule(query_positions[:, None, :, None], key_positions[:, None, None, :]).contiguous()

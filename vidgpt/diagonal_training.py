"""The sequence on which a transformer learns to draw several rows at once, as vidgpt.decoding.diagonal draws them.

Every token sees what is drawn when its pass runs. The first token of a row is drawn before the row above has ended, so a stand-in for
that row's end predicts it: the id of the same place in the newest frame that has one by then, seen by itself alone. The true end is
read too, for those who see it later, and predicts nothing. Stand-ins are tokens more, at positions that occur twice.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vidgpt.config import VidGPTConfig
from vidgpt.layout import IGNORED, TokenLayout
from vidgpt.masks import build_mask, diagonal, rule_of, stand_in_age


@dataclass(frozen=True)
class DiagonalBatch:
    """Arguments of VidGPTForCausalLM.forward: N stand-ins, then the L tokens of the sequence."""

    input_ids: Tensor  # (B, N + L)
    position_ids: Tensor  # (1, N + L)
    attention_mask: Tensor  # (1, 1, N + L, N + L), True = may attend
    labels: Tensor  # (B, N + L), each what the token before it in the row predicts, or IGNORED


def diagonal_batch(config: VidGPTConfig, input_ids: Tensor, labels: Tensor, window: int, delay: int = 0) -> DiagonalBatch:
    """Lay whole frames out for training with the rule of diagonal decoding.

    input_ids: (B, L), what is read; labels: (B, L), ids at their own places or IGNORED. window, delay: see vidgpt.decoding.
    The first frame has no frame before it, so its rows begin without a stand-in, and what they begin with is not learned. Where the
    window is a row's width or more there are no stand-ins; without a delay that is raster order.
    """
    layout = TokenLayout.from_config(config)
    columns = layout.width * layout.slots_per_place
    window = min(window, columns)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    stand_ins = _stand_ins(layout, positions) if window < columns else positions[:0]
    frames_ago = (stand_ins // layout.tokens_per_frame).clamp(max=stand_in_age(layout, window, delay))
    read = torch.cat([input_ids[:, stand_ins - frames_ago * layout.tokens_per_frame], input_ids], dim=1)
    queries, starts = positions[None], stand_ins[None]
    rule, row_rule = (diagonal(layout, window, delay, begins_row) for begins_row in (False, True))
    sees, starts_see = (build_mask(rule_of(config, given), at, queries) for given, at in ((rule, queries), (row_rule, starts)))
    own = torch.eye(len(stand_ins), len(stand_ins) + len(positions), dtype=torch.bool, device=input_ids.device)[None, None]
    mask = F.pad(torch.cat([starts_see, sees], dim=2), (len(stand_ins), 0))
    mask[:, :, : len(stand_ins)] |= own
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    begun = targets[:, stand_ins]
    if window < columns:
        targets = targets.masked_fill(_ends_row(layout, positions), IGNORED)
    # The model shifts labels back by one; the sequence stands last because its last token predicts nothing.
    shifted = F.pad(torch.cat([begun, targets], dim=1)[:, :-1], (1, 0), value=IGNORED)
    return DiagonalBatch(read, torch.cat([starts, queries], dim=1), mask, shifted)


def is_diagonal_step(seed: int, step: int, share: float) -> bool:
    """Tell whether a step is one of the share of steps that train the diagonal mask: the same answer in every process and start."""
    return bool(np.random.default_rng((seed, step)).random() < share)


def _ends_row(layout: TokenLayout, positions: Tensor) -> Tensor:
    """Tell which positions are ends of rows with a row of the same frame below."""
    columns = layout.width * layout.slots_per_place
    slot = positions % layout.tokens_per_frame
    return (slot > 0) & (slot % columns == 0) & (slot < layout.slots_per_frame)


def _stand_ins(layout: TokenLayout, positions: Tensor) -> Tensor:
    """Give the positions of the stand-ins (N,): row ends of all frames but the first."""
    return positions[_ends_row(layout, positions) & (positions >= layout.tokens_per_frame)]

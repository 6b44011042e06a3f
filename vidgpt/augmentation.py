"""What training may do to the tokens that are read, never to those that are to be predicted. Drawn from torch's global generator."""

import torch
from torch import Tensor

from vidgpt.layout import TokenLayout

LARGEST = torch.iinfo(torch.int64).max


def corrupt_tokens(layout: TokenLayout, input_ids: Tensor, share: float) -> Tensor:
    """Give input_ids (B, L), whole frames, with each picture token replaced by a random id of its slot with probability `share`.

    A model that has read wrong tokens goes on better from its own. The random id may be the one that stood there.
    """
    slots = torch.arange(input_ids.shape[1], device=input_ids.device)
    spans = [(0, layout.codebook_size)] if layout.is_parallel else layout.spans
    bounds = torch.tensor(spans, device=input_ids.device)[(slots % layout.tokens_per_frame - 1) % len(spans)]
    sizes = bounds[:, 1] - bounds[:, 0]
    others = bounds[:, 0] + torch.randint(LARGEST, input_ids.shape, device=input_ids.device) % sizes
    is_replaced = (torch.rand(input_ids.shape, device=input_ids.device) < share) & ~layout.is_lead(slots)
    return torch.where(is_replaced, others, input_ids)


def drop_actions(layout: TokenLayout, input_ids: Tensor, share: float) -> Tensor:
    """Give input_ids (B, L), whole frames, with all actions of a clip replaced by the plain separator with probability `share`."""
    is_dropped = torch.rand(len(input_ids), 1, device=input_ids.device) < share
    is_action = layout.is_lead(torch.arange(input_ids.shape[1], device=input_ids.device)) & (input_ids != layout.bos_id)
    return torch.where(is_dropped & is_action, layout.separator_id, input_ids)

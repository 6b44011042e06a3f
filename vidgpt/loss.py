"""Cross-entropy over large vocabularies without holding all logits. Travels with exported models (vidgpt.exporting)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vidgpt.layout import IGNORED, TokenLayout


def place_cross_entropy(hidden_states: Tensor, head: Tensor, labels: Tensor, layout: TokenLayout, max_logits: int) -> Tensor:
    """Give the cross-entropy in nats a place of the grid, fp32: the sum over an id's digits of the mean of each.

    hidden_states: (B, L, D); head: (num_logits, D); labels: (B, L), ids or IGNORED, shifted here. Of several digits each is predicted
    among its own values alone, as it is drawn. See chunked_cross_entropy.
    """
    hidden_states, targets = hidden_states.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    if layout.num_digits == 1:
        return chunked_cross_entropy(hidden_states, head, targets, max_logits)
    if layout.is_parallel:
        is_ignored = (targets == IGNORED)[:, None]
        digits = layout.split(targets.clamp(min=0)).masked_fill(is_ignored, IGNORED)
        return chunked_cross_entropy(hidden_states, head, digits, max_logits, layout.factors)
    losses = []
    for start, end in layout.spans:
        digit = torch.where((start <= targets) & (targets < end), targets - start, IGNORED)
        losses.append(chunked_cross_entropy(hidden_states, head[start:end], digit, max_logits))
    return torch.stack(losses).sum()


def chunked_cross_entropy(
    hidden_states: Tensor, head: Tensor, labels: Tensor, max_logits: int, factors: Sequence[int] | None = None
) -> Tensor:
    """Give the mean cross-entropy in nats, fp32, over labels that are not IGNORED.

    hidden_states: (N, D); head: (V, D); labels: (N,), or (N, Q) whose Q cross-entropies are added, over `factors` logits each that
    make up V. At most max_logits logits exist at a time: with more, they are computed in chunks and again in the backward pass.
    """
    if factors is None:
        labels, factors = labels[:, None], (head.shape[0],)
    kept = labels[:, 0] != IGNORED
    hidden_states, labels = hidden_states[kept], labels[kept]
    if labels.numel() == 0:
        raise ValueError("no label is left to learn from: every position is ignored, pass at least one whole frame")
    rows = max(1, max_logits // head.shape[0])
    if labels.shape[0] <= rows:
        return _cross_entropy_sum(hidden_states, head, labels, factors) / labels.shape[0]
    sums = [
        checkpoint(_cross_entropy_sum, hidden_states[at : at + rows], head, labels[at : at + rows], factors, use_reentrant=False)
        for at in range(0, labels.shape[0], rows)
    ]
    return torch.stack(sums).sum() / labels.shape[0]


def _cross_entropy_sum(hidden_states: Tensor, head: Tensor, labels: Tensor, factors: Sequence[int]) -> Tensor:
    logits = F.linear(hidden_states, head).float().split(list(factors), dim=-1)
    digits = zip(logits, labels.unbind(-1), strict=True)
    return torch.stack([F.cross_entropy(scores, digit, reduction="sum") for scores, digit in digits]).sum()

"""Cross-entropy over large vocabularies without holding all logits."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vidgpt.layout import IGNORED


def chunked_cross_entropy(hidden_states: Tensor, head: Tensor, labels: Tensor, max_logits: int) -> Tensor:
    """Give the mean cross-entropy in nats, fp32, over labels that are not IGNORED.

    hidden_states: (N, D); head: (V, D); labels: (N,). At most max_logits logits exist at a time: with more, they are computed in
    chunks and again in the backward pass.
    """
    kept = labels != IGNORED
    hidden_states, labels = hidden_states[kept], labels[kept]
    if labels.numel() == 0:
        raise ValueError("no label is left to learn from: every position is ignored, pass at least one whole frame")
    rows = max(1, max_logits // head.shape[0])
    if labels.shape[0] <= rows:
        return _cross_entropy_sum(hidden_states, head, labels) / labels.shape[0]
    sums = [
        checkpoint(_cross_entropy_sum, hidden_states[at : at + rows], head, labels[at : at + rows], use_reentrant=False)
        for at in range(0, labels.shape[0], rows)
    ]
    return torch.stack(sums).sum() / labels.shape[0]


def _cross_entropy_sum(hidden_states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_states, head).float(), labels, reduction="sum")

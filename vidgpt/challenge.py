"""The loss of the 1X world model challenge (compression track), as its evaluation defines it.

An id of 2^18 is two digits of 512 values, id = d0 + 512 d1, predicted independent of each other. The loss is the mean, over clips,
frames 1 .. 15 of 16 and places, of CE(d0) + CE(d1) in nats, temporally teacher-forced: every frame given the real ones before it and
the model's own tokens inside it. A blind guess costs 2 ln 512 = 12.477. Source: github.com/1x-technologies/1xgpt, eval_utils.py
(compute_loss), genie/evaluate.py and README (Metric Details); there frames are 2 a second and windows do not overlap.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vidgpt.layout import TokenLayout
from vidgpt.metrics import TokenMeter
from vidtok.digits import split_digits

FACTORS = (512, 512)
FRAMES = 16


def challenge_loss(factored_logits: Tensor, indices: Tensor) -> float:
    """Give the loss of clips in nats a token.

    factored_logits: (B, 512, 2, t - 1, h, w), of frames 1 .. t - 1, as submissions give them. indices: (B, t, h, w), the real ids in
    [0, 2^18). Raises ValueError on other shapes and on ids outside.
    """
    batch, frames, height, width = indices.shape
    expected = (batch, FACTORS[0], len(FACTORS), frames - 1, height, width)
    if tuple(factored_logits.shape) != expected or frames < 2:
        raise ValueError(
            f"got logits of shape {tuple(factored_logits.shape)} for indices of shape {tuple(indices.shape)}; the challenge scores "
            f"{expected}: give logits (B, 512, 2, t - 1, h, w) of the frames after the first, for clips of 2 frames or more"
        )
    digits = split_digits(indices[:, 1:], FACTORS).movedim(-1, 1)
    return float(F.cross_entropy(factored_logits.detach().float(), digits, reduction="none").double().sum(dim=1).mean())


def is_scored(layout: TokenLayout) -> bool:
    """Tell whether a model predicts what the challenge scores: two independent digits of 512 values."""
    return layout.is_parallel and layout.factors == FACTORS


def challenge_figures(layout: TokenLayout, meter: TokenMeter, frames: int) -> dict[str, Any]:
    """Give the challenge's figures from a temporally teacher-forced meter of clips of so many frames.

    is_challenge_protocol: whether the clips have its 16 frames; rate and overlap are those of the tokens. Raises ValueError for a
    model of other digits, of which the loss is not defined.
    """
    if not is_scored(layout):
        raise ValueError(
            f"the 1X challenge scores two independent digits of 512 values, this model has {list(layout.factors)} predicted "
            f"{'together' if layout.is_parallel else 'in turn'}: train with model.digits=parallel on tokens of codebook_factors=[512,512]"
        )
    figures = meter.summary()
    return {
        "loss_nats_per_token": figures["cross_entropy_nats_per_token"],
        "token_accuracy_fraction": figures["generated_accuracy_fraction"],
        "regime": "temporally_teacher_forced",
        "clip_frames_count": frames,
        "is_challenge_protocol": frames == FRAMES,
    }

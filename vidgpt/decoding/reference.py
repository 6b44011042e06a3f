"""Decoding by transformers' own generate: slow, but nobody's code of ours between the model and the ids."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vidgpt.decoding.reader import Reader
from vidgpt.generation import LayoutLogitsProcessor


class DrawProcessor(LayoutLogitsProcessor):
    """Leave only the id that the rollout's sampler draws, so that seeds give the same ids under every plan; leads are the given ones."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader.layout)
        self.reader = reader

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask scores (B, V) of the slot after input_ids (B, L)."""
        reader, position = self.reader, input_ids.shape[1]
        if position % reader.layout.tokens_per_frame == 0:
            drawn = reader.tokens[:, position : position + 1]
        else:
            drawn = reader.draw(scores[:, None], torch.tensor([[position]], device=scores.device))
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


def reference(reader: Reader, leads: Tensor) -> Iterator[Tensor]:
    """Yield the picture slots of each frame to come, arguments as of raster; all are drawn before the first is there."""
    size, first = reader.layout.tokens_per_frame, reader.length
    reader.extend(leads)
    mask = None
    if reader.starts is not None:
        mask = (torch.arange(first + 1, device=reader.device) >= reader.starts[:, None]).long()
    drawn = reader.model.source.generate(
        reader.tokens[:, : first + 1],
        attention_mask=mask,
        max_new_tokens=leads.shape[1] * size - 1,
        do_sample=False,
        logits_processor=[DrawProcessor(reader)],
    )
    reader.tokens[:, first : drawn.shape[1]] = drawn[:, first:]
    reader.work.forward_passes += leads.shape[1] * size - 1
    for _ in range(leads.shape[1]):
        reader.length += size
        reader.work.frames += 1
        yield reader.tokens[:, reader.length - size + 1 : reader.length]

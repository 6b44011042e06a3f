"""Free-running futures of clips, drawn batch after batch and kept, so that they can be scored as tokens and shown as pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from vidgpt.decoding.stream import stream_tokens
from vidgpt.fused import FusedModel
from vidgpt.sampling import SamplingOptions

SAMPLE_STEP = (
    1 << 24
)  # between the noise of a clip's samples: more than there are clips, so that more samples change none of the others


class Futures:
    """Draw `samples` futures a clip. Sample 0 of a clip is the same whatever the batch is, and however many samples there are."""

    def __init__(self, model: FusedModel, sampling: SamplingOptions, seed: int = 0, samples: int = 1) -> None:
        self.model, self.sampling, self.seed, self.samples = model, sampling, seed, samples
        self._drawn: list[Tensor] = []

    def __call__(self, context: Tensor, future: int, actions: Tensor | None) -> Tensor:
        """Draw and keep the futures of the next clips, given indices (B, t, h, w); gives the first sample of each (B, future, h, w)."""
        first = sum(part.shape[1] for part in self._drawn)
        samples = []
        for sample in range(self.samples):
            stream = stream_tokens(
                self.model, context, future, seed=self.seed, options=self.sampling, decoding="speculative", actions=actions,
                first_sequence=first + sample * SAMPLE_STEP,
            )  # fmt: skip
            samples.append(torch.stack(list(stream), dim=1))
        self._drawn.append(torch.stack(samples).cpu())
        return samples[0]

    def indices(self) -> Tensor:
        """Give all futures so far: (N, clips, t, h, w) of N samples a clip. Raises ValueError where none were drawn."""
        if not self._drawn:
            raise ValueError("no futures were drawn: give rollout_clips=1 or more")
        return torch.cat(self._drawn, dim=1)

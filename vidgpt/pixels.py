"""The demo's held-out clips: PSNR of predicted frames by horizon, beside the baselines and the tokenizer's own ceiling."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.metrics import psnr_by_frame
from vidtok.video_metrics.predictors import baseline_rows


@dataclass(frozen=True)
class HeldOutReport:
    """Clips with their predictions, and PSNR in dB by horizon: entry 0 is the first predicted frame."""

    real: Tensor  # (B, 3, context + future, H, W)
    predicted: Tensor  # the same shape; given frames are the real ones
    ceiling: Tensor  # the same shape; encoded and decoded
    psnr_db: dict[str, list[float]]  # prediction, each baseline, tokenizer_ceiling: mean over clips of each frame's value

    def gain_db(self, first: int, last: int) -> float:
        """Give the mean gain over copying at horizons first .. last, from 1."""
        span = slice(first - 1, last)
        return float(np.mean(self.psnr_db["prediction"][span]) - np.mean(self.psnr_db["copy_last_frame"][span]))


@torch.no_grad()
def evaluate_pixels(
    predictor: Predictor,
    video: Tensor,
    context: int,
    actions: Tensor | None = None,
    options: SamplingOptions | None = None,
    seed: int = 0,
    history: int = 0,
) -> HeldOutReport:
    """Predict what follows the first `history + context` frames of clips (B, 3, T, H, W) and compare with what did follow.

    Greedy unless options say otherwise. context, history: as Predictor.predict takes them; the report is without the history.
    """
    end = history + context
    future = video.shape[2] - end
    given, real = (frames.to(predictor.device) for frames in (video[:, :, :end], video[:, :, history:]))
    ceiling = predictor.decode(predictor.encode(video))[:, :, history : video.shape[2]]
    predicted = predictor.predict(given, future, seed=seed, options=options, actions=actions, history=history)
    truth = real[:, :, context:]
    baselines = baseline_rows(real[:, :, :context], future)
    forecasts = {"prediction": predicted, **baselines, "tokenizer_ceiling": ceiling[:, :, context:]}
    curves = {name: psnr_by_frame(frames, truth).mean(dim=0).tolist() for name, frames in forecasts.items()}
    return HeldOutReport(real.cpu(), torch.cat([real[:, :, :context], predicted], dim=2).cpu(), ceiling.cpu(), curves)

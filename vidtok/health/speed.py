"""How fast a tokenizer is and how much memory it takes, on the machine at hand."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vidtok.health.seams import Coder
from vidtok.measuring import Call, measure, peak_bytes

PASSES = 5
MOST_SECONDS = 20.0
MEBIBYTE = 1 << 20


def measure_speed(coder: Coder, video: Tensor) -> dict[str, Any]:
    """Time coding and decoding of clips (B, 3, T, H, W): medians of up to PASSES rounds, fewer where a round takes long.

    Gives frames a second, the parameters where they can be counted, and the most memory of tensors beside the weights and the clips.
    """
    device, tokenizer, frames = video.device, coder.tokenizer, video.shape[0] * video.shape[2]
    weights = [*tokenizer.parameters(), *tokenizer.buffers()] if isinstance(tokenizer, nn.Module) else []
    start = time.perf_counter()
    codes = coder.encode(video)
    calls: dict[str, Call] = {"encode": lambda: coder.encode(video), "decode": lambda: coder.decode(codes, video)}
    peak = max(peak_bytes(call, [video, codes, *weights]) for call in calls.values())
    rounds = int(MOST_SECONDS / (time.perf_counter() - start))
    taken = measure(calls, max(1, min(PASSES, rounds)), device)
    return {
        **{f"{name}_median_frames_per_second": frames / median(seconds) for name, seconds in taken.items()},
        "peak_tensors_mebibytes": peak / MEBIBYTE,
        "timed_batch_clips": video.shape[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()) if weights else None,
    }

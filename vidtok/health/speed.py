"""How fast a tokenizer is and how much memory it takes, on the machine at hand."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vidtok.health.seams import Coder
from vidtok.measuring import Call, measure

PASSES = 5
MOST_SECONDS = 20.0
STATUS = Path("/proc/self/status")
MEBIBYTE = 1 << 20


def measure_speed(coder: Coder, video: Tensor) -> dict[str, Any]:
    """Time coding and decoding of clips (B, 3, T, H, W): medians of up to PASSES rounds, fewer where a round takes long.

    Gives frames a second, the parameters where they can be counted, and the peak of memory: on CUDA all that torch had allocated,
    weights included; elsewhere by how much the process grew while it worked, None where the system does not tell. Memory that the
    process keeps from earlier work hides its growth, so this comes before any other coding.
    """
    device = video.device
    resident = _start_peak(device)
    start = time.perf_counter()
    codes = coder.encode(video)
    coder.decode(codes, video)
    rounds = int(MOST_SECONDS / (time.perf_counter() - start))
    calls: dict[str, Call] = {"encode": lambda: coder.encode(video), "decode": lambda: coder.decode(codes, video)}
    taken = measure(calls, max(1, min(PASSES, rounds)), device)
    tokenizer, frames = coder.tokenizer, video.shape[0] * video.shape[2]
    return {
        **{f"{name}_median_frames_per_second": frames / median(seconds) for name, seconds in taken.items()},
        **_peak(device, resident),
        "timed_batch_clips": video.shape[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()) if isinstance(tokenizer, nn.Module) else None,
    }


def _start_peak(device: torch.device) -> int | None:
    """Forget earlier peaks; gives the resident bytes now, None where peaks cannot be told apart."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return None
    try:
        # Linux: 5 resets the high-water mark of the resident set (man 5 proc, clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device, resident: int | None) -> dict[str, float | None]:
    if device.type == "cuda":
        return {"peak_cuda_allocated_mebibytes": torch.cuda.max_memory_allocated(device) / MEBIBYTE}
    return {"peak_resident_growth_mebibytes": None if resident is None else (_resident("VmHWM") - resident) / MEBIBYTE}


def _resident(name: str) -> int:
    """Read one line of the kernel's account of this process, in bytes."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024

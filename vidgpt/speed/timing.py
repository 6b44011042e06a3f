"""How long rollouts take, and how near that is to what the machine's memory allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vidgpt.config import VidGPTConfig
from vidgpt.decoding import DecodingOptions
from vidgpt.decoding.stream import stream_tokens
from vidgpt.decoding.work import Work
from vidgpt.fused import FusedModel
from vidgpt.layout import TokenLayout
from vidgpt.speed.transforms import cache_bytes_per_position, weight_bytes
from vidtok.measuring import Call, speed_up, spread

# Of each of the three arrays that the triad runs over: together far more than a processor's own cache.
ARRAY_BYTES = 1 << 28
MEBIBYTE = 1 << 20


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Give what a call gives, and the seconds it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


@dataclass
class Runs:
    """The greedy rollouts of one row: a model and a plan, and what they took, run by run."""

    model: FusedModel
    decoding: DecodingOptions
    seconds: list[float] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)  # (B, future, h, w)
    works: list[Work] = field(default_factory=list)

    def run(self, context: Tensor, future: int, actions: Tensor | None) -> None:
        """Roll out once more from indices (B, t, h, w), actions (B, t + future)."""
        work, device = Work(), self.model.device
        stream = stream_tokens(self.model, context.to(device), future, decoding=self.decoding, actions=actions, work=work)
        frames, seconds = timed(lambda: list(stream), device)
        prefill = work.prefill_seconds
        if self.decoding.plan == "transformers":
            # generate reads the prompt itself; what ours took for that is none of its business.
            seconds -= prefill
            prefill = self._prefill_of_generate(context.to(device), actions)
        self.seconds.append(seconds)
        self.prefill_seconds.append(prefill)
        self.ids.append(torch.stack(frames, dim=1).cpu())
        self.works.append(work)

    def forget(self) -> None:
        """Begin anew, after warming up."""
        for kept in (self.seconds, self.prefill_seconds, self.ids, self.works):
            kept.clear()

    def total(self, name: str) -> float:
        """Give the sum of one count over all runs."""
        return sum(getattr(work, name) for work in self.works)

    @property
    def passes_per_frame(self) -> float:
        """Give the forward passes a latent frame; the one that reads the context alone is not counted."""
        return (self.total("forward_passes") - self.total("prefills")) / self.total("frames")

    @torch.no_grad()
    def _prefill_of_generate(self, context: Tensor, actions: Tensor | None) -> float:
        layout = self.model.layout
        prompt = layout.flatten(context, None if actions is None else actions[:, : context.shape[1]].to(context.device))
        source = self.model.source
        return timed(lambda: source(prompt, use_cache=True, logits_to_keep=1), self.model.device)[1]


def triad(num_bytes: int, device: torch.device) -> Call:
    """Give a = b + s c over arrays of num_bytes each, of which two are read and one is written (STREAM, McCalpin 1995)."""
    target, first, second = (torch.ones(num_bytes // 4, device=device) for _ in range(3))
    return lambda: torch.add(first, second, alpha=3.0, out=target)


def bytes_per_frame(passes: float, weights: int, bytes_per_position: int, positions: float) -> float:
    """Give the bytes that a frame's passes must read: all weights, and the keys and values of what came before."""
    return passes * (weights + bytes_per_position * positions)


def mean_positions(config: VidGPTConfig, context: int, future: int) -> float:
    """Give how many positions a pass attends, on average over a rollout in raster order."""
    size = TokenLayout.from_config(config).tokens_per_frame
    # The pass that draws slot s = 1 .. S of the f-th frame reads s + (context + f) (S + 1) positions.
    seen = (context + future / 2) * size
    return min(seen, (config.sink_frames + config.attention_frames) * size) if config.attention_frames else seen


def speed_row(runs: Runs, base: Runs, context: int, bandwidth: float) -> dict[str, Any]:
    """Give a row's figures of time and memory; base: the row that ratios are to; bandwidth: bytes a second."""
    model, batch, future = runs.model, *runs.ids[0].shape[:2]
    size, seconds, prefill = model.layout.tokens_per_frame, median(runs.seconds), median(runs.prefill_seconds)
    decode, base_decode = (
        [whole - part for whole, part in zip(each.seconds, each.prefill_seconds, strict=True)] for each in (runs, base)
    )
    position, drafted = cache_bytes_per_position(model) * batch, runs.total("drafted")
    needed = bytes_per_frame(runs.passes_per_frame, weight_bytes(model), position, mean_positions(model.config, context, future))
    is_reference = runs.decoding.plan == "transformers"
    return {
        "decoding": runs.decoding.plan,
        "tokens_per_second": batch * future * model.layout.slots_per_frame / seconds,
        "frames_per_second": batch * future / seconds,
        "spread_of_quartiles": spread(runs.seconds),
        "forward_passes_per_frame": runs.passes_per_frame,
        "drafts_accepted_fraction": runs.total("accepted") / drafted if drafted else None,
        "prefill_milliseconds": 1000 * prefill,
        "decode_milliseconds_per_frame": 1000 * median(decode) / future,
        "speed_up": speed_up(base.seconds, runs.seconds),
        "decode_speed_up": speed_up(base_decode, decode),
        # The library's own cache holds what was read, no more.
        "cache_mebibytes": (position * (context + future) * size if is_reference else runs.works[-1].cache_bytes) / MEBIBYTE,
        "weights_read_mebibytes": weight_bytes(model) / MEBIBYTE,
        "share_of_memory_bandwidth": needed / (median(decode) / future) / bandwidth,
    }

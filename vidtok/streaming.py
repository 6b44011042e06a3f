"""Clips of any length in chunks: how many frames at a time, and what is carried from one chunk to the next."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from vidtok.padding import pad_clip

# More than this a chunk makes nothing faster, on a CPU slower: its activations leave the caches.
ACTIVATION_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class StreamState:
    """What a network keeps of the frames so far. Nothing changes it in place, so it may be kept, branched and moved.

    tensors: the last frames each layer saw, (B, frames, C, H, W) in the order of the layers; none where no layer looks back.
    """

    tensors: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> "StreamState":
        """Give the same state on a device."""
        return StreamState(tuple(tensor.to(device) for tensor in self.tensors))


def in_chunks(
    step: Callable[[Tensor, StreamState | None], tuple[Tensor, StreamState]], clip: Tensor, first: int, later: int
) -> Iterator[Tensor]:
    """Run step over (B, C, T, H, W), `first` frames and then `later` frames at a time, with the state carried along."""
    state: StreamState | None = None
    at = 0
    while at < clip.shape[2]:
        size = first if at == 0 else later
        result, state = step(clip[:, :, at : at + size], state)
        at += size
        yield result


def regroup(chunks: Iterable[Tensor], stride_t: int) -> Iterator[Tensor]:
    """Cut a stream of (B, C, n, H, W), any n, into 1 + k * stride_t frames and then k * stride_t frames; the end is padded.

    A chunk is passed on as soon as it is whole; fewer than stride_t frames wait for the next one. Raises ValueError on no frames.
    """
    waiting: Tensor | None = None
    is_started = False
    for chunk in chunks:
        waiting = chunk if waiting is None else torch.cat([waiting, chunk], dim=2)
        whole = waiting.shape[2] // stride_t * stride_t if is_started else 1 + (waiting.shape[2] - 1) // stride_t * stride_t
        if whole > 0:
            yield waiting[:, :, :whole]
            waiting, is_started = waiting[:, :, whole:], True
    if waiting is None or not is_started:
        raise ValueError("the stream ended before its first frame: give at least one frame")
    if waiting.shape[2]:
        yield pad_clip(waiting, stride_t, *waiting.shape[3:])


def latents_at_once(bytes_per_latent: int, device: torch.device) -> int:
    """Give how many latent frames to work on at a time: a power of two, so that small changes of free memory change nothing."""
    budget = min(ACTIVATION_BYTES.get(device.type, 1 << 28), free_bytes(device) // 4)
    return 1 << max(0, (budget // max(1, bytes_per_latent)).bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Give the memory a device has left; of a CPU what the system can make available."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)

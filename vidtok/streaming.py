"""Clips of any length in parts: how many frames at a time, and what is carried from one part to the next."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

# More than this a part makes nothing faster, on a CPU slower: its activations leave the caches.
ACTIVATION_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class StreamState:
    """What a network keeps of the frames so far. Nothing changes it in place, so it may be kept, branched and moved.

    size: (B, H, W) of what came in, which all that follows must have.
    tensors: the last frames each layer saw, (B, frames, C, H, W) in the order of the layers; none where no layer looks back.
    """

    size: tuple[int, int, int]
    tensors: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> "StreamState":
        """Give the same state on a device."""
        return StreamState(self.size, tuple(tensor.to(device) for tensor in self.tensors))


# Gives the result for a part, and the tensors of the state after it.
Step = Callable[[Tensor, StreamState | None], tuple[Tensor, tuple[Tensor, ...]]]


def carry_state(step: Step, states: list[StreamState]) -> Callable[[Tensor], Tensor]:
    """Give a step that takes the next of `states`, none at a clip's start, and puts the state after it in its place.

    One state for each tile, which must come in the same order at every part of a clip. Raises ValueError for a part of another size.
    """
    before = iter(states.copy())
    states.clear()

    def work(part: Tensor) -> Tensor:
        state = next(before, None)
        size = _size_following(part, state)
        result, tensors = step(part, state)
        states.append(StreamState(size, tensors))
        return result

    return work


def in_parts(clip: Tensor, first: int, later: int) -> Iterator[Tensor]:
    """Cut (B, C, T, H, W) into `first` frames and then `later` frames at a time; views."""
    at, size = 0, first
    while at < clip.shape[2]:
        yield clip[:, :, at : at + size]
        at, size = at + size, later


def concatenate(parts: Iterable[Tensor], frames: int) -> Tensor:
    """Put clips (B, C, n, H, W) that follow one another into one of `frames` frames, whose memory is taken once."""
    whole: Tensor | None = None
    at = 0
    for part in parts:
        if part.shape[2] == frames:
            return part
        if whole is None:
            whole = part.new_empty(*part.shape[:2], frames, *part.shape[3:])
        whole[:, :, at : at + part.shape[2]] = part
        at += part.shape[2]
    assert whole is not None and at == frames
    return whole


def regroup(chunks: Iterable[Tensor], stride_t: int) -> Iterator[Tensor]:
    """Cut a stream of (B, C, n, H, W), any n, into 1 + k * stride_t frames and then k * stride_t frames, the last one perhaps fewer.

    A chunk is passed on as soon as it is whole; fewer than stride_t frames wait for the next one. Raises ValueError as check_same_size.
    """
    waiting: Tensor | None = None
    is_started = False
    for chunk in check_same_size(chunks):
        waiting = chunk if waiting is None or not waiting.shape[2] else torch.cat([waiting, chunk], dim=2)
        whole = waiting.shape[2] // stride_t * stride_t if is_started else 1 + (waiting.shape[2] - 1) // stride_t * stride_t
        if whole > 0:
            yield waiting[:, :, :whole]
            # A copy: a view would keep the whole chunk alive.
            waiting, is_started = waiting[:, :, whole:].clone(), True
    if waiting is not None and waiting.shape[2]:
        yield waiting


def check_same_size(chunks: Iterable[Tensor], axes: str = "BCnHW") -> Iterator[Tensor]:
    """Pass on chunks of these axes but those of no frames, n = 0.

    Raises ValueError for one of another rank, one whose other axes differ from the first's, and where no frame comes at all.
    """
    at, size, is_started = axes.index("n"), None, False
    for chunk in chunks:
        if chunk.ndim != len(axes):
            raise ValueError(f"a chunk of shape {tuple(chunk.shape)} came: it must be ({', '.join(axes)}), add or remove axes")
        found = (*chunk.shape[:at], *chunk.shape[at + 1 :])
        if size is not None and found != size:
            raise ValueError(_changed(axes.replace("n", ""), found, size))
        size = found
        if chunk.shape[at]:
            is_started = True
            yield chunk
    if not is_started:
        raise ValueError("the stream ended before its first frame: give at least one frame")


def _size_following(clip: Tensor, state: StreamState | None) -> tuple[int, int, int]:
    """Give the size (B, H, W) of (B, C, T, H, W). Raises ValueError when it differs from that of the frames before it."""
    size = (clip.shape[0], clip.shape[3], clip.shape[4])
    if state is not None and size != state.size:
        raise ValueError(_changed("BCHW", (*clip.shape[:2], *clip.shape[3:]), (state.size[0], clip.shape[1], *state.size[1:])))
    return size


def _changed(axes: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return (
        f"a chunk with ({', '.join(axes)}) = {found} came after one with {expected}: a stream keeps its size, "
        "start a new one for other clips"
    )


def latents_at_once(bytes_per_latent: int, device: torch.device) -> int:
    """Give how many latent frames to work on at a time: a power of two, so that small changes of free memory change nothing."""
    budget = min(ACTIVATION_BYTES.get(device.type, 1 << 28), free_bytes(device) // 4)
    return 1 << max(0, (budget // max(1, bytes_per_latent)).bit_length() - 1)


def free_bytes(device: torch.device) -> int:
    """Give the memory a device has left; of a CPU what the system can make available."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode, then each part as it was: encoding must not move an EMA codebook, frozen parts stay frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training

"""Forward passes in fixed shapes, recorded once a rollout and replayed: a GPU launches a small pass for longer than it computes.

A pass of n tokens runs as one of the next larger size in SIZES, its first token repeated in front: that writes the same keys to the
same slot again. It reads all slots of its cache, behind a mask, so that addresses and shapes stay what they were when it was recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgpt.cache import SlotCache

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
Call = Callable[[], Tensor]
Record = Callable[[Call], Call]
# Of states, cosines and sines (see vidgpt.fused.Turns), the cache and a mask: gives the last states.
Forward = Callable[[Tensor, Tensor, Tensor, SlotCache, Tensor | None], Tensor]


def is_small(length: int) -> bool:
    """Tell whether a pass of so many tokens has a size: a longer one is busy with arithmetic."""
    return length <= SIZES[-1]


def cuda_graph(call: Call) -> Call:
    """Record what `call` launches; gives a function that launches it again on the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compiling and choosing kernels cannot be recorded.
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


@dataclass(frozen=True)
class _Pass:
    """The memory that one recorded pass reads, and the pass."""

    inputs: tuple[Tensor, ...]  # states, cosines, sines: (B or 1, size, ...)
    slots: Tensor  # (B or 1, size)
    mask: Tensor  # (B or 1, 1, size, slots)
    replay: Call

    def fill(self, inputs: tuple[Tensor, ...], slots: Tensor, mask: Tensor | None, used: int) -> None:
        """Give it a pass of no more tokens; the first `used` slots may be attended, or those that mask (B or 1, 1, n, used) says."""
        padding = self.slots.shape[1] - slots.shape[1]
        for kept, part in zip((*self.inputs, self.slots), (*inputs, slots), strict=True):
            kept[:, padding:] = part
            kept[:, :padding] = part[:, :1]
        self.mask.fill_(float("-inf"))
        if mask is None:
            self.mask[..., :used] = 0
        else:
            self.mask[:, :, padding:, :used] = mask
            self.mask[:, :, :padding, :used] = mask[:, :, :1]


class RecordedPasses:
    """The passes of one rollout over one cache, which keeps them: no module does. record: cuda_graph, or what stands for it."""

    def __init__(self, forward: Forward, record: Record) -> None:
        self._forward, self._record = forward, record
        self._passes: dict[tuple[int, ...], _Pass] = {}

    def __call__(self, cache: SlotCache, mask: Tensor | None, *inputs: Tensor) -> Tensor:
        """Run a small pass inside cache.writing, states, cosines and sines as `inputs`; mask as of FusedModel.read.

        Gives states (B, n, D) that the next pass overwrites.
        """
        cursor = cache.cursor
        slots, used = cursor.slots, cursor.end
        assert slots is not None, "inside cache.writing"
        length = slots.shape[1]
        size = next(size for size in SIZES if size >= length)
        key = (size, len(slots), 1 if mask is None else len(mask), *map(len, inputs))
        if (known := self._passes.get(key)) is None:
            known = self._passes[key] = self._prepare(cache, size, key[2], slots, mask, inputs)
        known.fill(inputs, slots, mask, used)
        return known.replay()[:, size - length :]

    def _prepare(
        self, cache: SlotCache, size: int, mask_rows: int, slots: Tensor, mask: Tensor | None, inputs: tuple[Tensor, ...]
    ) -> _Pass:
        states = inputs[0]
        room = tuple(part.new_empty(len(part), size, *part.shape[2:]) for part in (*inputs, slots))
        own = states.new_empty(mask_rows, 1, size, cache.num_slots)
        cursor = cache.cursor

        def call() -> Tensor:
            told = cursor.slots, cursor.end
            # The layers ask for them while they run; what is recorded keeps the addresses.
            cursor.slots, cursor.end = room[-1], cache.num_slots
            try:
                return self._forward(room[0], room[1], room[2], cache, own)
            finally:
                cursor.slots, cursor.end = told

        # Recording runs the pass: with what is to be read, so that it writes what the pass will write.
        _Pass(room[:-1], room[-1], own, call).fill(inputs, slots, mask, cursor.end)
        return _Pass(room[:-1], room[-1], own, self._record(call))

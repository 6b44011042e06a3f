"""Measuring calls: seconds in rounds, arithmetic, memory of their tensors, and how fast the machine convolves at best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar
from weakref import WeakSet, finalize

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

LEAST_SECONDS = 0.05  # of one measurement: a shorter one measures the clock
# A 3x3 convolution so large that only its arithmetic counts: 4.8 GFLOP an image.
CHANNELS, SIDE = 256, 64


def measure(calls: Mapping[Name, Call], repeats: int, device: torch.device) -> dict[Name, list[float]]:
    """Time every call once a round, `repeats` rounds; gives its seconds, round by round.

    Within a round all calls meet the machine in about the same state, so ratios hold on one that is busy or slows down.
    """
    counts = {}
    for name, call in calls.items():
        _seconds(call, 1, device)  # compiles, allocates, picks kernels
        counts[name] = max(1, math.ceil(LEAST_SECONDS / max(_seconds(call, 1, device), 1e-9)))
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(_seconds(call, counts[name], device))
    return taken


def _seconds(call: Call, count: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def speed_up(base: Sequence[float], other: Sequence[float]) -> float:
    """Say how many times as fast `other` is: the median of the rounds' ratios."""
    return median(slow / fast for slow, fast in zip(base, other, strict=True))


def spread(seconds: Sequence[float]) -> float:
    """Give the distance between the quartiles, as a share of the median."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / middle)


def count_flops(call: Call) -> int:
    """Count the arithmetic of convolutions, matrix products and attention in a call; a multiplication with its addition is two."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def convolutions(precision: torch.dtype, device: torch.device) -> dict[str, Call]:
    """Give one large 3x3 convolution in either memory layout: the faster one is what the machine can do."""
    images = torch.randn(_images(device), CHANNELS, SIDE, SIDE, device=device, dtype=precision)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device, dtype=precision) / math.sqrt(9 * CHANNELS)

    def convolve(layout: torch.memory_format) -> Call:
        operands = images.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)

        @torch.no_grad()
        def call() -> Tensor:
            return F.conv2d(*operands, padding=1)

        return call

    return {"channels first": convolve(torch.contiguous_format), "channels last": convolve(torch.channels_last)}


def convolution_flops(device: torch.device) -> int:
    """Give the arithmetic of that convolution, its padding counted as if it were computed."""
    return 2 * _images(device) * CHANNELS * CHANNELS * 9 * SIDE * SIDE


def _images(device: torch.device) -> int:
    # One image is over before a GPU has begun.
    return 64 if device.type == "cuda" else 1


def peak_bytes(call: Call, known: Iterable[Tensor] = ()) -> int:
    """Give the most bytes that tensors made by a call hold at one time; known: tensors from before, of which it may make views.

    Scratch space inside a kernel is not seen.
    """
    with _LiveTensors(known) as live:
        call()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: WeakSet[torch.UntypedStorage] = WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.bytes -= size

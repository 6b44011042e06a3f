"""Several processes of one run: acting once for all of them, and sharing what each one found; and the precision they compute in."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

Result = TypeVar("Result")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the precisions in which weights themselves can be


def leave() -> None:
    """Part from the other processes, for the end of this one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
        # A thread of gloo's that gives its last tensor back while Python ends aborts the process, and torch has no way to wait for it.
        time.sleep(0.2)


def from_main(value: Result) -> Result:
    """Give the main process's value in every process."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def on_main(act: Callable[[], Result]) -> Result:
    """Act in the main process only; the others wait for its result, and fail as it fails."""
    if not distributed.is_initialized():
        return act()
    outcome: tuple[Any, Exception | None] = (None, None)
    if distributed.get_rank() == 0:
        try:
            outcome = (act(), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    result, problem = from_main(outcome)
    if problem is not None:
        raise problem
    return result


def from_all(value: Result) -> list[Result]:
    """Give every process's value, in the order of their ranks, in every process."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def averaged(tensor: Tensor) -> Tensor:
    """Give the mean over processes, detached; every process must call it."""
    mean = tensor.detach().clone()
    if distributed.is_initialized():
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    return mean


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Read fp32, bf16, or auto, which is bf16 where the device computes it fast."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in fp32, bf16 or auto."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(precision, device))


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 matrices in hardware: newer GPUs, and CPUs with AMX tiles (1.7x on two cores)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without tiles a CPU emulates bf16 and is slower than in fp32; torch keeps the question private, so it may go away.
    is_amx_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and is_amx_supported is not None and bool(is_amx_supported())

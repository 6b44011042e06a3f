"""The optimizer both models train with, the average of their weights, and what to report about them before step 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vidtok.run_options import RunOptions


def build_optimizer(model: nn.Module, options: RunOptions) -> AdamW:
    """Make AdamW over the trainable parameters; only matrices and kernels decay, never biases, norms or other vectors."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter: nothing to optimise.")
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = options.betas
    return AdamW([group for group in groups if group["params"]], lr=options.lr, betas=(first, second))


def missing_from_optimizer(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Give the names of trainable parameters that no optimizer group holds."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held]


def describe(model: nn.Module, optimizer: Optimizer, memory_bytes: int | None = None) -> list[str]:
    """Give the lines to print before step 1: parameters, what does not train, and the caller's memory estimate."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    lines = [f"parameters: {sum(counts.values()):,} ({parts})" + (f", of them frozen {frozen:,}" if frozen else "")]
    missing = missing_from_optimizer(model, optimizer)
    if missing:
        lines.append(f"not in the optimizer, so never trained: {', '.join(missing)}")
    if memory_bytes is not None:
        size = f"{memory_bytes / 2**20:.0f} MiB" if memory_bytes < 2**30 else f"{memory_bytes / 2**30:.2f} GiB"
        lines.append(f"estimated memory: {size}")
    return lines


class WeightAverage:
    """Keep an exponential moving average of a model's trainable parameters; buffers are always the model's own."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (from 1).

        The decay starts low, min(decay, (1 + step) / (10 + step)), or the random start would dominate a short run.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in self._pairs(model):
                self.weights[name].lerp_(value, 1 - decay)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from saved averages."""
        for name, value in self.weights.items():
            value.copy_(weights[name])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Lend the averages to the model; the trained weights are back afterwards, bit for bit."""
        trained = {name: value.detach().clone() for name, value in self._pairs(model)}
        self._copy(self.weights, model)
        try:
            yield
        finally:
            self._copy(trained, model)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in model.named_parameters() if name in self.weights)

    def _copy(self, source: Mapping[str, Tensor], model: nn.Module) -> None:
        with torch.no_grad():
            for name, value in self._pairs(model):
                value.copy_(source[name])

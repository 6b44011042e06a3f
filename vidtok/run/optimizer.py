"""The optimizer both models train with, the average of their weights, and what to report about them before step 1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vidtok.run.processes import has_fast_bf16
from vidtok.run_options import RunOptions


def build_optimizer(model: nn.Module, options: RunOptions) -> AdamW:
    """Make the optimizer over the trainable parameters; only matrices and kernels decay, never biases, norms or other vectors.

    optimizer=muon: the matrices and kernels between a model's `edge_layers` (names of modules where data enters and leaves) are
    moved by Muon, everything else by AdamW.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("The model has no trainable parameter: nothing to optimise.")
    is_muon, edges = options.optimizer == "muon", set(getattr(model, "edge_layers", ()))
    inner = {name for name, value in trainable.items() if is_muon and value.ndim >= 2 and edges.isdisjoint(name.split("."))}
    outer = {name for name, value in trainable.items() if value.ndim >= 2 and name not in inner}
    vectors = {name for name, value in trainable.items() if value.ndim < 2}
    groups: list[dict[str, Any]] = [
        {"params": [value for name, value in trainable.items() if name in names], **rest}
        for names, rest in (
            (inner, {"weight_decay": options.weight_decay, "is_muon": True}),
            (outer, {"weight_decay": options.weight_decay}),
            (vectors, {"weight_decay": 0.0}),
        )
    ]
    first, second = options.betas
    kind = Muon if is_muon else AdamW
    chosen = [group for group in groups if group["params"]]
    return kind(chosen, lr=options.lr, betas=(first, second))


class Muon(AdamW):
    """AdamW whose groups with is_muon=True move along orthogonalised momentum instead: every direction of a matrix gets a like step.

    A kernel (out, in, ...) counts as a matrix (out, in * ...). Steps are scaled to the size of AdamW's, so both share one lr.
    Source: K. Jordan, "Muon", 2024; the scale from arXiv:2502.16982, section 2.2.
    """

    momentum = 0.95

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all parameters once."""
        groups = self.param_groups
        # AdamW works on self.param_groups: it is shown its own ones only.
        self.param_groups = [group for group in groups if not group.get("is_muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("is_muon"):
                self._move(group)
        return loss

    @torch.no_grad()
    def _move(self, group: dict[str, Any]) -> None:
        # Matrices of one shape go through the orthogonalisation together: it is many small products, and calls cost more than they do.
        alike: defaultdict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[tuple(parameter.shape)].append(parameter)
        for parameters in alike.values():
            updates = orthogonalise(torch.stack([self._pull(parameter).flatten(1) for parameter in parameters]))
            scale = 0.2 * max(updates.shape[1:]) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)

    def _pull(self, parameter: nn.Parameter) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            # AdamW looks for a step in every state it loads.
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
        state["momentum"].lerp_(gradient, 1 - self.momentum)
        # Nesterov: the gradient pulls once more.
        return gradient.lerp(state["momentum"], self.momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Give about U V^T of each matrix U S V^T by five Newton-Schulz steps; singular values end between 0.7 and 1.2.

    matrices: (count, rows, columns). Coefficients: K. Jordan, "Muon", 2024.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    # bf16 is enough (the steps contract towards 1), and four times as fast where it is in hardware.
    estimate = (matrices.mT if is_tall else matrices).to(torch.bfloat16 if has_fast_bf16(matrices.device) else torch.float32)
    estimate = estimate / (estimate.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = estimate @ estimate.mT
        step = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        estimate = torch.baddbmm(estimate, step, estimate, beta=3.4445)
    return (estimate.mT if is_tall else estimate).to(matrices.dtype)


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

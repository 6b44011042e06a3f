"""One trained model of a run: its optimizer, the average of its weights, and how a step changes or leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from vidtok.run.optimizer import WeightAverage
from vidtok.run_options import RunOptions


class TrainedPart:
    """Hold one model with its optimizer and, where ema_decay is not 0, the average of its weights."""

    def __init__(self, name: str, model: nn.Module, optimizer: Optimizer, lr: float, ema_decay: float = 0.0) -> None:
        """lr: the run's rate, of which the optimizer's groups keep their share."""
        self.name, self.model, self.optimizer = name, model, optimizer
        self.average = WeightAverage(model, ema_decay) if ema_decay > 0 else None
        self._rate_shares = [group["lr"] / lr for group in optimizer.param_groups]
        self._buffers: dict[str, Tensor] = {}

    def save(self, folder: Path) -> None:
        """Write weights, optimizer state and averages; safetensors wherever the content is tensors only."""
        save_model(self.model, str(folder / f"{self.name}.safetensors"))
        torch.save(self.optimizer.state_dict(), folder / f"{self.name}_optimizer.pt")
        if self.average is not None:
            # safetensors wants contiguous tensors, a channels_last model gives others.
            weights = {name: value.contiguous() for name, value in self.average.weights.items()}
            save_file(weights, folder / f"{self.name}_average.safetensors")

    def load(self, folder: Path) -> None:
        """Read back what save wrote; through the CPU, or a GPU would hold everything twice."""
        load_model(self.model, folder / f"{self.name}.safetensors", device="cpu")
        state = torch.load(folder / f"{self.name}_optimizer.pt", weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(state)
        if self.average is not None:
            self.average.load(load_file(folder / f"{self.name}_average.safetensors", device="cpu"))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model in eval mode, with averaged weights where averaging is on; all is as before afterwards."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with nullcontext() if self.average is None else self.average.applied_to(self.model):
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def keep_buffers(self) -> None:
        """Remember what a forward pass in training mode moves, such as an averaged codebook, for `restore_buffers`."""
        saved = self.model.state_dict(keep_vars=True).keys()
        self._buffers = {name: value.clone() for name, value in self.model.named_buffers() if name in saved}

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Undo what forward passes have moved since `keep_buffers`."""
        now = dict(self.model.named_buffers())
        for name, value in self._buffers.items():
            now[name].copy_(value)

    def gradient_norm(self) -> Tensor:
        """Give the norm of the whole gradient, a scalar."""
        return get_total_norm([value.grad for value in self.model.parameters() if value.grad is not None]).detach()

    def non_finite_gradients(self) -> list[str]:
        """Give the names of parameters whose gradient holds a value that is not finite."""
        gradients = ((name, value.grad) for name, value in self.model.named_parameters())
        return [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]

    def clip_gradient(self, norm: Tensor, clip_norm: float) -> None:
        """Scale a gradient of that norm down to clip_norm at most."""
        clip_grads_with_norm_(self.model.parameters(), clip_norm, norm)

    def rate(self, rate: float) -> float:
        """Give the part's own rate where the run's is `rate`: that of its first group."""
        return rate * self._rate_shares[0]

    def step(self, number: int, rate: float) -> None:
        """Make optimizer step `number` (from 1) at the run's rate, with the gradient that lies in the parameters."""
        for group, share in zip(self.optimizer.param_groups, self._rate_shares, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, number)


@contextmanager
def evaluating(parts: Iterable[TrainedPart]) -> Iterator[None]:
    """Put every part in the state that `TrainedPart.evaluating` describes."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.evaluating())
        yield


def ready_to_train(model: nn.Module, options: RunOptions) -> None:
    """Recompute activations and compile, where the options say so. Raises ValueError for a model that cannot recompute."""
    if options.gradient_checkpointing:
        # Every PreTrainedModel has the method; without this flag it raises an error that is not ours.
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(model).__name__} cannot recompute activations: set gradient_checkpointing=false.")
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    if options.compile:
        model.compile()  # in place, so that no key of the state dict is renamed

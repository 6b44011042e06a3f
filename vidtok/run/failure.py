"""Why training cannot go on: the first value of a step that is not finite, and the clips that it came with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from vidtok.run.checkpoints import describe_newest, write_text
from vidtok.run.parts import TrainedPart

FAILURE_FILE = "failure.json"
_SOME = 4


class TrainingError(ValueError):
    """Say that training cannot go on (a loss, gradient or evaluation is not finite); the last checkpoint is untouched."""


@dataclass(frozen=True)
class Failure:
    """One step that cannot be made, as one process sees it."""

    model: str  # "model", or the name of another trained part
    step: int
    lr: float
    values: dict[str, float]  # loss terms in the order of their computation, then loss and gradient_norm
    gradients: list[str]  # parameters whose gradient is not finite
    clips: list[str]

    def culprit(self) -> str:
        """Name the first loss term that is not finite, else the gradients."""
        wrong = next((f"{name} is {value}" for name, value in self.values.items() if not math.isfinite(value)), "")
        if self.gradients and wrong.startswith("gradient_norm"):
            return f"the gradient of {_some(self.gradients)} is not finite"
        return wrong


def describe_step(part: TrainedPart, step: int, lr: float, logs: Mapping[str, Tensor], clips: list[str]) -> Failure:
    """Note what this process knows of a step whose loss or gradient is not finite; logs end with loss and gradient_norm."""
    values = {name: float(value) for name, value in logs.items()}
    return Failure(part.name, step, lr, values, part.non_finite_gradients(), clips)


def write_failure(folder: Path, failures: Sequence[Failure]) -> None:
    """Write all of it, of every process, into failure.json; what JSON has no number for becomes the text nan, inf or -inf."""
    found = [asdict(failure) for failure in failures]
    for values in (failure["values"] for failure in found):
        values.update({name: value if math.isfinite(value) else str(value) for name, value in values.items()})
    write_text(folder / FAILURE_FILE, json.dumps(found, indent=1) + "\n")


def explain(failures: Sequence[Failure], folder: Path) -> str:
    """Say it in one sentence; folder: the run's, with its checkpoints."""
    # A process whose own loss is fine has the others' gradients: the cause lies with one whose loss is not.
    failure = min(failures, key=lambda failure: math.isfinite(failure.values["loss"]))
    of = "" if failure.model == "model" else f" (of the {failure.model})"
    loss, norm = failure.values["loss"], failure.values["gradient_norm"]
    return (
        f"Training stopped at step {failure.step}: {failure.culprit()}{of}, loss {loss:.4g}, gradient norm {norm:.4g}, "
        f"lr {failure.lr:.2e}, with {_some(failure.clips)} (all of it in {folder / FAILURE_FILE}); "
        f"{describe_newest(folder / 'checkpoints')}. "
        "Try a lower lr, a longer warmup_steps or precision=fp32, in a new run_dir."
    )


def deciding_value(values: Mapping[str, float], key: str, step: int, folder: Path) -> float:
    """Give the figure of an evaluation that picks the best model; raises ValueError where it is missing or not a number."""
    if key not in values:
        raise ValueError(f"evaluate gave {sorted(values)}, without {key!r}, which picks the best model.")
    if math.isnan(values[key]):
        raise TrainingError(f"Training stopped at step {step}: {key} is not a number; {describe_newest(folder / 'checkpoints')}.")
    return values[key]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SOME
    return ", ".join(names[:_SOME]) + (f" and {rest} more" if rest > 0 else "")

"""Options every training command shares: the only home of their defaults. Light to import, so that `--help` stays fast."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any

from omegaconf import MISSING

OPTIMIZERS = ("adamw", "muon")
TRACKERS = ("tensorboard", "wandb")  # each the name of its package


@dataclass(frozen=True)
class RunOptions:
    """State where a run lives, how long it lasts and how it steps.

    One optimizer step sees batch_size * gradient_accumulation * processes clips. ema_decay 0 switches averaging off.
    max_steps and max_minutes together: the schedule is planned for whichever ends first, at step 25 at the latest; another max_minutes
    in a resumed run plans it anew.
    optimizer: adamw, or muon for the inner matrices and adamw for the rest.
    precision: auto (bf16 where the device computes it fast, else fp32), fp32 or bf16. num_workers null: 0 on CPU, else 2.
    trackers: what shows curves and pictures during training, any of tensorboard and wandb; null: tensorboard where it is installed.
    """

    run_dir: str = MISSING
    seed: int = 0
    max_steps: int | None = None
    max_minutes: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-4
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    precision: str = "auto"
    num_workers: int | None = None
    checkpoint_every: int = 500
    evaluate_every: int = 500
    log_every: int = 10
    keep_checkpoints: int = 2
    trackers: list[str] | None = None


def options_from(config: Mapping[str, Any]) -> RunOptions:
    """Pick the run's options out of a command's plain configuration, where they lie at the top."""
    return RunOptions(**{option.name: config[option.name] for option in fields(RunOptions) if option.name in config})


def default_values(options: type, groups: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Give what the keys of a command mean where nobody gives them, nested as the keys are.

    groups: the dataclass whose fields the keys of a group are. A key that must be given has no place here.
    """
    found = {name: default_values(group) for name, group in (groups or {}).items()}
    for option in fields(options):
        value = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        if option.name not in found and value not in (dataclasses.MISSING, MISSING):
            is_group = dataclasses.is_dataclass(value) and not isinstance(value, type)
            found[option.name] = dataclasses.asdict(value) if is_group else value
    return found


def check_options(options: RunOptions) -> None:
    """Raise ValueError for the first option that no run can have."""
    if options.max_steps is None and options.max_minutes is None:
        raise ValueError("Neither max_steps nor max_minutes is given: say how long to train, for example max_steps=1000.")
    counts = ("max_steps", "batch_size", "gradient_accumulation", "checkpoint_every", "evaluate_every", "log_every")
    for name in (*counts, "keep_checkpoints"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not allowed: give a whole number of at least 1.")
    if options.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={options.optimizer!r} is not one of {', '.join(OPTIMIZERS)}: choose one of these.")
    for name in ("lr", "max_minutes", "clip_norm"):
        value = getattr(options, name)
        # clip_norm=.inf is how clipping is switched off.
        if value is not None and not (value > 0 and (math.isfinite(value) or name == "clip_norm")):
            raise ValueError(f"{name}={value} is not allowed: give a number above 0.")
    for name in ("warmup_steps", "weight_decay", "seed", "num_workers"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} is not allowed: give 0 or more.")
    if not 0 <= options.min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={options.min_lr_ratio} is not allowed: give the last lr as a share of lr, 0 to 1.")
    if not 0 <= options.ema_decay < 1:
        raise ValueError(f"ema_decay={options.ema_decay} is not allowed: give 0 (off) or a number below 1, for example 0.999.")
    if len(options.betas) != 2 or not all(0 <= beta < 1 for beta in options.betas):
        raise ValueError(f"betas={list(options.betas)} is not allowed: give AdamW's two decay rates, for example [0.9,0.95].")
    if options.precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision={options.precision} is not known: give auto, fp32 or bf16.")
    check_trackers(options.trackers)


def check_trackers(names: Sequence[str] | None) -> None:
    """Raise ValueError for the first tracker that is unknown or not installed; null passes."""
    for name in names or ():
        if name not in TRACKERS:
            raise ValueError(
                f"trackers=[{','.join(map(str, names or ()))}] names {name}, which is not known: give any of {', '.join(TRACKERS)}, "
                "or [] for none."
            )
        if not is_installed(name):
            raise ValueError(f"trackers names {name}, which is not installed: `pip install {name}`, or leave it out.")


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported; a folder that only bears its name, as both trackers leave one, is none."""
    found = find_spec(package)
    return found is not None and found.origin is not None

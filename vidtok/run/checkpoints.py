"""Folders that are either whole or absent, and the checkpoints made of them."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vidtok.run.parts import TrainedPart

STATE_FILE = "state.json"
CHECKPOINT_FORMAT = 1
_STEP_NAME = re.compile(r"step_(\d{6,})")


@dataclass
class TrainState:
    """Hold the numbers of a run that are no tensors.

    evaluation_seconds, saving_seconds: what the last ones took. minutes_used_up: the max_minutes that ended the run, 0 for none.
    plan: the fields of a schedule.Plan, or None.
    """

    step: int = 0
    elapsed_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    saving_seconds: float = 0.0
    minutes_used_up: float = 0.0
    best: float | None = None
    best_step: int = 0
    plan: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    format_version: int = CHECKPOINT_FORMAT


def write_text(path: Path, text: str) -> None:
    """Replace a text file: a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make or replace a folder with the files that `fill` writes, by way of a temporary name beside it."""
    temporary, old = _temporary(target), _old(target)
    clean(target)
    temporary.mkdir(parents=True)
    fill(temporary)
    for path in sorted(temporary.rglob("*")):
        sync(path)
    sync(temporary)
    if target.exists():
        # A folder cannot be renamed over another: between these two renames `clean` brings the old one back.
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean(target: Path) -> None:
    """Remove what a dead process left beside the folder `target`, and undo a replacement cut in half."""
    old = _old(target)
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(_temporary(target), ignore_errors=True)


def remove_folder(target: Path) -> None:
    """Delete a folder so that no moment shows a part of it under its name."""
    temporary = _temporary(target)
    target.rename(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def clean_checkpoints(folder: Path) -> None:
    """Remove every leftover of dead processes in a checkpoints folder."""
    for path in sorted(folder.glob(".old-*")) + sorted(folder.glob(".tmp-*")):
        clean(folder / path.name.split("-", 1)[1])


def newest_checkpoint(folder: Path) -> Path | None:
    """Give the whole checkpoint of the highest step, or None."""
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _STEP_NAME.fullmatch(path.name))]
    return max(((step, path) for step, path in found if (path / STATE_FILE).is_file()), default=(0, None))[1]


def describe_newest(folder: Path) -> str:
    """Say, inside a sentence, where the newest checkpoint is."""
    newest = newest_checkpoint(folder)
    return f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"


def save_checkpoint(folder: Path, state: TrainState, parts: Mapping[str, TrainedPart], keep: int) -> Path:
    """Write checkpoints/step_000100, point `latest` beside the checkpoints folder at it, and delete all but the newest `keep`."""
    target = folder / f"step_{state.step:06d}"

    def fill(temporary: Path) -> None:
        for part in parts.values():
            part.save(temporary)
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")

    write_folder(target, fill)
    write_text(folder.parent / "latest", f"{folder.name}/{target.name}\n")
    steps = sorted((int(match[1]), path) for path in folder.iterdir() if (match := _STEP_NAME.fullmatch(path.name)))
    for _, path in steps[:-keep]:
        remove_folder(path)
    return target


def load_parts(checkpoint: Path, parts: Mapping[str, TrainedPart]) -> None:
    """Read every part back from a checkpoint. Raises ValueError for damaged files."""
    with _naming_damage(checkpoint):
        for part in parts.values():
            part.load(checkpoint)


def read_state(checkpoint: Path) -> TrainState:
    """Read the numbers of a checkpoint. Raises ValueError for damaged ones and for a format this version does not know."""
    with _naming_damage(checkpoint):
        values = {**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))}
    version = values.get("format_version")
    if version != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{checkpoint} has checkpoint format {version}, this version reads {CHECKPOINT_FORMAT}: "
            "resume with the version that wrote it."
        )
    with _naming_damage(checkpoint):
        state = TrainState(**values)
    return state


@contextmanager
def _naming_damage(checkpoint: Path) -> Iterator[None]:
    """Turn whatever the readers of damaged files raise into one sentence that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        # Readers explain themselves at length, and some of them not at all.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): delete that folder, and the run goes on from the checkpoint before it."
        ) from error


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def _old(target: Path) -> Path:
    return target.with_name(f".old-{target.name}")


def sync(path: Path) -> None:
    """Bring a file or folder to the disk, so that a rename never outlives its content after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

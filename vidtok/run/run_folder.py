"""A run's folder: who may write in it, which configuration it belongs to, and its small files."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vidtok.run.checkpoints import TrainState, clean, clean_checkpoints, newest_checkpoint, read_state, write_text

# These say how long and how loudly to train, not what: a resumed run may change them. run_dir may be spelled in other ways.
FREE_KEYS = {"run_dir", "max_steps", "max_minutes", "checkpoint_every", "evaluate_every", "log_every", "keep_checkpoints"}
FREE_KEYS |= {"num_workers", "trackers", "debug"}
_ABSENT = "(absent)"
MARKER_FILE = "run.json"
RUN_FORMAT = 1
# All that a start killed before its marker can have left.
_BEFORE_MARKER = {".lock", f".tmp-{MARKER_FILE}"}
# All that a start can have left that was refused before its first step.
_BEFORE_STEP = {*_BEFORE_MARKER, MARKER_FILE, "config.yaml", "plan.json", "first_values.json", "rejects.csv"}
_FOLDERS_BEFORE_STEP = {"checkpoints", "samples", "tensorboard", "wandb"}

Value = TypeVar("Value", str, int)


class RunFolder:
    """Own the folder of one run for as long as this object is open.

    defaults: what keys mean where the record of an older version, which did not know them, lacks them.
    Raises ValueError, with nothing touched, when it holds anything that no run of this command has made; and when another process
    owns it or it holds checkpoints of another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], command: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        _check_owner(path, command)
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        self._is_new = not (path / MARKER_FILE).exists()
        try:
            if self._is_new:
                write_text(path / MARKER_FILE, json.dumps({"command": command, "format_version": RUN_FORMAT}) + "\n")
            for folder in (self.checkpoints, path / "samples"):
                folder.mkdir(exist_ok=True)
            clean_checkpoints(self.checkpoints)
            clean(path / "model")
            if newest_checkpoint(self.checkpoints) is None:
                # Nothing was trained here that a new configuration could spoil: a first try may have failed on a wrong option.
                for name in ("config.yaml", "plan.json", "first_values.json"):
                    (path / name).unlink(missing_ok=True)
            self.config = _keep_config(path, config, defaults or {})
        except BaseException:
            self.close()
            raise

    def close(self, is_refused: bool = False) -> None:
        """Let other processes in. is_refused: an error ended this start, so that a folder it made and trained nothing in goes too."""
        if is_refused and self._is_new and self._is_untrained():
            for child in self.path.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            for folder in self._made:
                # Another command may have made something beside it.
                with suppress(OSError):
                    folder.rmdir()
        self._lock.close()

    def _is_untrained(self) -> bool:
        """Tell whether nothing lies here but what every start writes before its first step, and no list of files that were rejected."""
        if not self.path.is_dir():
            return False
        names = {child.name for child in self.path.iterdir()}
        rejects = self.path / "rejects.csv"
        return (
            names <= _BEFORE_STEP | _FOLDERS_BEFORE_STEP
            and not any(child for name in ("checkpoints", "samples") for child in (self.path / name).glob("*"))
            and not (rejects.exists() and len(rejects.read_text(encoding="utf-8").splitlines()) > 1)
        )

    def append_metrics(self, values: Mapping[str, float]) -> None:
        """Add one line to metrics.jsonl; a value that is no number in JSON becomes null."""
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Give (step, value) of every line of metrics.jsonl that has a number under this name."""
        if not self.metrics.exists():
            return []
        lines = (json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines())
        return [(line["step"], line[name]) for line in lines if line.get(name) is not None]

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of steps that will run again, and a last line that was cut."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    def read_plan(self) -> dict[str, Any] | None:
        """Give the plan of an earlier start of this run (the fields of a schedule.Plan), or None."""
        path = self.path / "plan.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write_plan(self, plan: Mapping[str, Any] | None) -> None:
        """Keep the plan for every later start."""
        write_text(self.path / "plan.json", json.dumps(plan, indent=1) + "\n")

    def first_value(self, name: str, value: Value) -> Value:
        """Give what the first call under this name gave, in this start or an earlier one."""
        values = self.first_values()
        if name not in values:
            values[name] = value
            write_text(self.path / "first_values.json", json.dumps(values, indent=1) + "\n")
        return values[name]

    def first_values(self) -> dict[str, Any]:
        """Give what was kept by first_value so far."""
        path = self.path / "first_values.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def check_data(self, name: str, fingerprint: str) -> None:
        """Keep the fingerprint of the data called `name`; raises ValueError when an earlier start trained on other data."""
        kept = self.first_value(f"data {name}", fingerprint)
        if kept != fingerprint:
            raise ValueError(
                f"{self.path} was trained on {name} with fingerprint {kept}, but now they have {fingerprint}: "
                "give back the old ones, or another run_dir."
            )


def open_run(
    path: Path, config: Mapping[str, Any], command: str, defaults: Mapping[str, Any] | None = None
) -> tuple[RunFolder, TrainState, Path | None]:
    """Own a run's folder; gives it with the numbers of its newest checkpoint (of a new run: fresh ones), and that checkpoint.

    Arguments as of RunFolder. Lines of metrics.jsonl after the checkpoint are dropped. Raises ValueError as RunFolder does, and for a
    damaged checkpoint.
    """
    folder = RunFolder(path, config, command, defaults)
    checkpoint = newest_checkpoint(folder.checkpoints)
    try:
        state = TrainState() if checkpoint is None else read_state(checkpoint)
    except ValueError:
        folder.close()
        raise
    folder.drop_metrics_after(state.step)
    return folder, replace(state, config=folder.config, plan=folder.read_plan() or state.plan), checkpoint


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> tuple[str, Any, Any] | None:
    """Give the first dotted key whose values differ, with both values; keys that a resumed run may change do not count.

    defaults: what keys that are absent in `old` meant there.
    """
    before, now = _leaves(old), _leaves(new)
    before |= {key: value for key, value in _leaves(defaults or {}).items() if key in now and key not in before}
    for key in [*now, *(key for key in before if key not in now)]:
        if key.split(".")[0] not in FREE_KEYS and before.get(key, _ABSENT) != now.get(key, _ABSENT):
            return key, before.get(key, _ABSENT), now.get(key, _ABSENT)
    return None


def trained_size(path: str | Path) -> tuple[int, int] | None:
    """Give the (height, width) of the frames that a run folder, or its model/, was trained on; None where nothing there says it."""
    path = Path(path).expanduser().absolute()
    file = (path.parent if path.name == "model" else path) / "config.yaml"
    try:
        size = OmegaConf.select(OmegaConf.load(file), "data.size") if file.is_file() else None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        return None
    # Digits move on a square.
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, ListConfig) else []
    return (sides[0], sides[1]) if len(sides) == 2 and all(isinstance(side, int) for side in sides) else None


def _check_owner(path: Path, command: str) -> None:
    """Refuse a folder that holds anything without the marker of a run of this command."""
    found = {child.name for child in path.iterdir()} if path.is_dir() else set()
    marker = path / MARKER_FILE
    # Listed before the marker is looked for: another process may be making the folder, and writes the marker first.
    if not marker.is_file():
        if found <= _BEFORE_MARKER:
            return
        raise ValueError(f"{path} is not empty and no run has made it ({_some(found)}): give a new or empty folder.")
    try:
        values = json.loads(marker.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        values = None
    owner, version = (values.get("command"), values.get("format_version")) if isinstance(values, dict) else (None, None)
    if owner is None or version is None:
        raise ValueError(f"{path} holds a {MARKER_FILE} that no run has written ({_some(found)}): give a new or empty folder.")
    if owner != command:
        raise ValueError(f"{path} holds a run of {owner}, but this command is {command}: give another run_dir.")
    if version != RUN_FORMAT:
        raise ValueError(
            f"{path} has run format {version}, this version reads {RUN_FORMAT}: continue with the version that made it."
        )


def _some(names: set[str]) -> str:
    return f"it holds {', '.join(sorted(names)[:5])}{' and more' if len(names) > 5 else ''}"


def _keep_config(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Compare with the folder's config.yaml and write the new one; gives it as plain values."""
    file = path / "config.yaml"
    text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    # Compared after the same round trip through YAML, so that a tuple equals its list and 1 equals 1.0.
    plain = _plain(text)
    if file.exists():
        difference = first_difference(_plain(file.read_text(encoding="utf-8")), plain, defaults)
        if difference is not None:
            key, old, new = difference
            raise ValueError(
                f"{path} holds a run with {key}={old}, but this command has {key}={new}: "
                f"give another run_dir, or {key}={old} to continue that run."
            )
    write_text(file, text)
    return plain


def _plain(text: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.create(text))
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(_leaves(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:
        return math.inf


def lock_folder(path: Path) -> IO[str]:
    """Take the folder's lock, until the file is closed or the process ends, however it does.

    Raises ValueError, with the other's process id, when it is taken.
    """
    import fcntl  # absent on Windows, where only training is impossible

    file = (path / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ValueError(
            f"Another process (pid {owner}) is writing to {path}: wait for it to end, or give another folder."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file

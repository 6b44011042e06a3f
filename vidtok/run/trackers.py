"""Where figures and pictures of a run are looked at while it trains: TensorBoard and W&B, through Accelerate's trackers."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker

from vidtok.run.checkpoints import write_text
from vidtok.run_options import is_installed

WANDB_RECORD = "wandb.json"
_NO_TENSORBOARD = "No TensorBoard curves: `pip install tensorboard` adds them (metrics.jsonl is written in any case)."


class Tracker(Protocol):
    """Takes figures, and pictures (H, W, 3) in uint8, of a step; those of a step that has run before do not appear twice."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None: ...

    def finish(self, is_failed: bool) -> None: ...


class Trackers:
    """Tell every chosen tracker what happens in a run; silent in a process that does not call `start`, as only the main one does.

    names: of run_options.TRACKERS; None takes TensorBoard where it is installed. command, config: what W&B shows beside the curves.
    """

    def __init__(self, names: Sequence[str] | None, path: Path, command: str, config: Mapping[str, Any]) -> None:
        self._names, self._path, self._command, self._config = names, path, command, config
        self._started: list[Tracker] = []

    def start(self, step: int, say: Callable[[str], None]) -> None:
        """Open the trackers of a run that goes on after `step`. Raises ValueError where W&B refuses."""
        names = self._names
        if names is None:
            names = ["tensorboard"] if is_installed("tensorboard") else []
            if not names:
                say(_NO_TENSORBOARD)
        if "tensorboard" in names:
            self._started.append(_TensorBoard(self._path, step))
        if "wandb" in names:
            self._started.append(_WandB(self._path, step, self._command, self._config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add figures of a step."""
        for tracker in self._started:
            tracker.log(values, step)

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a picture (H, W, 3), uint8, of a step."""
        for tracker in self._started:
            tracker.log_picture(name, picture, step)

    def finish(self, is_failed: bool = False) -> None:
        """Write and send what is left, and close. is_failed: an error or a signal ended the run, which W&B then says too."""
        while self._started:
            self._started.pop().finish(is_failed)


class _TensorBoard:
    """Event files in the run folder's tensorboard/."""

    def __init__(self, path: Path, step: int) -> None:
        # Files are read in the order of their names: the second of the start, then the process. A later start must come later.
        while any(f".{os.getpid()}." not in file.name for file in path.glob(f"tensorboard/*.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        # Events of steps that will run again are hidden, as they are dropped from metrics.jsonl.
        self._tracker = TensorBoardTracker("tensorboard", path, purge_step=step + 1)
        self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        self._tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")

    def finish(self, is_failed: bool) -> None:
        self._tracker.finish()


class _WandB:
    """A run of W&B that goes on as ours does; wandb.json keeps its id, and up to which step it was given each figure.

    W&B takes nothing back. So a step that runs again, which gives the same bits unless the schedule was changed, sends only what W&B
    was not given before, and steps are a figure of their own, since W&B's own counter refuses to go back.
    """

    def __init__(self, path: Path, step: int, command: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._record = path / WANDB_RECORD
        # From step 0 nothing goes on: another configuration may have begun the other one.
        known = json.loads(self._record.read_text(encoding="utf-8")) if step and self._record.exists() else {}
        # Not from `random`, which the run's seed decides: two runs of one seed are two runs.
        self._id, self._sent = known.get("id") or secrets.token_hex(8), dict(known.get("sent", {}))
        self._tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT") or command,
            name=os.environ.get("WANDB_NAME") or path.absolute().name,
            id=self._id,
            resume="allow",
            dir=str(path),
        )
        try:
            self._tracker.start()
            self._tracker.store_init_configuration(dict(config))
            self._tracker.run.define_metric("*", step_metric="step")
        except wandb.Error as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"W&B does not start ({reason}): log in with `wandb login`, set WANDB_MODE=offline, or leave wandb out of trackers."
            ) from error
        run = self._tracker.run
        if run.resumed and (last := run.summary.get("step")) is not None:
            # What a kill kept from its server; offline there is nobody to ask, and a kill costs what W&B had not yet written.
            self._sent = {name: min(sent, int(last)) for name, sent in self._sent.items()}

    def log(self, values: Mapping[str, float], step: int) -> None:
        new = self._take([*values], step)
        if new:
            self._tracker.log({"step": step, **{key: values[key] for key in new}})

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        if self._take([name], step):
            # Uncommitted, so that the picture comes into the same row.
            self._tracker.log({"step": step}, commit=False)
            self._tracker.log_images({name: [picture]})

    def finish(self, is_failed: bool) -> None:
        self._tracker.run.finish(exit_code=int(is_failed))

    def _take(self, names: Sequence[str], step: int) -> list[str]:
        """Give which of the names W&B has not had at this step, and note that it has."""
        new = [name for name in names if step > self._sent.get(name, 0)]
        if new:
            self._sent |= dict.fromkeys(new, step)
            write_text(self._record, json.dumps({"id": self._id, "sent": self._sent}, indent=1) + "\n")
        return new

"""What a run says of its steps: on the terminal, in metrics.jsonl and samples/, and to the trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vidtok.run.clock import RunClock
from vidtok.run.progress import TrainingProgress
from vidtok.run.run_folder import RunFolder
from vidtok.run.trackers import Trackers
from vidtok.video import write_png


class RunLog:
    """Log the steps of a run; all but the terminal in the process that has its folder, the main one.

    clips: of a step, over all processes. trackers: started by whoever made them.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        progress: TrainingProgress,
        clock: RunClock,
        trackers: Trackers,
        clips: int,
        log_every: int,
    ) -> None:
        self._folder, self._progress, self._clock, self._trackers = folder, progress, clock, trackers
        self._clips, self._log_every = clips, log_every

    def end_step(self, step: int, logs: Mapping[str, Any]) -> None:
        """Show a finished step, whose loss is in logs, and write its figures where they are due."""
        seconds = self._clock.step_seconds
        rate = self._clips / max(seconds, 1e-9)
        self._progress.show(step, self._clock.horizon, float(logs["loss"]), rate, seconds)
        if step == 1 or step % self._log_every == 0:
            self.write(step, {key: float(value) for key, value in logs.items()} | {"clips_per_second": rate})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write figures of a step."""
        if self._folder is not None:
            self._folder.append_metrics({"step": step, **values, "elapsed_seconds": self._clock.elapsed_seconds})
            self._trackers.log(values, step)

    def show(self, step: int, name: str, draw: Callable[[], np.ndarray]) -> None:
        """Keep the picture of a step, uint8 (H, W, 3); only the main process draws it."""
        if self._folder is not None:
            picture = draw()
            write_png(self._folder.path / "samples" / f"step_{step:06d}.png", picture)
            self._trackers.log_picture(name, picture, step)

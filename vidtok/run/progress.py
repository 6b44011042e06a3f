"""What a person sees while a run trains: a bar in a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0


class TrainingProgress:
    """Show step, loss, clips per second and time left. Silent when is_shown is false (every process but the main one)."""

    def __init__(self, name: str, is_shown: bool) -> None:
        self._name = name
        self._is_shown = is_shown
        self._console = Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._is_shown:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, step: int, total: int | None, loss: float, rate: float, seconds_per_step: float) -> None:
        """Report one finished step; total None while the horizon is not planned yet. rate: clips per second."""
        if not self._is_shown:
            return
        if self._console.is_terminal:
            self._show_bar(step, total, loss, rate)
            return
        now = time.monotonic()
        if step == total or now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            left = "" if total is None else f" of {total}, {_duration((total - step) * seconds_per_step)} left"
            self.say(f"{self._name}: step {step}{left}, loss {loss:.4g}, {rate:.3g} clips/s")

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, step: int, total: int | None, loss: float, rate: float) -> None:
        if self._bar is None:
            figures = TextColumn("loss {task.fields[loss]:.4g}  {task.fields[rate]:.3g} clips/s")
            columns = (TextColumn(self._name), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(self._name, total=total, completed=step - 1, loss=loss, rate=rate)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=step, total=total, loss=loss, rate=rate)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"

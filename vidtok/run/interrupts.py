"""Ctrl-C and SIGTERM as a wish that the training loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Remember the first signal; a second Ctrl-C stops at once. exit_status: 0, or 128 + the number of the signal."""

    def __init__(self) -> None:
        self.exit_status = 0
        self._former: dict[int, Any] = {}

    def catch(self) -> None:
        """Take over SIGINT and SIGTERM until `restore`."""
        # Python lets only the main thread set handlers; elsewhere the host program decides what a signal does.
        if threading.current_thread() is threading.main_thread() and not self._former:
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.exit_status and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.exit_status = self.exit_status or 128 + number


def ignore_interrupt(worker: int) -> None:
    """Let a loader worker live through a Ctrl-C, which reaches the whole process group, until the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

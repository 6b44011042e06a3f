"""Signals become a wish, and go back to their former owner."""

from __future__ import annotations

import signal

import pytest

from vidtok.run.interrupts import Interrupts


def test_a_second_ctrl_c_stops_at_once() -> None:
    interrupts = Interrupts()
    interrupts.catch()
    try:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.exit_status == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupts.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

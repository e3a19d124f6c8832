"""Signals while the cluster is started."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import pytest

from learner.driver.cluster import _kept_sigterm


def test_a_signal_that_ray_takes_for_itself_interrupts() -> None:
    """Ray answers it by sys.exit(15), which would end the process without a line."""

    def as_ray_does(number: int, _frame: FrameType | None) -> None:
        sys.exit(number)

    before = signal.getsignal(signal.SIGTERM)

    def start() -> None:
        with _kept_sigterm():
            signal.signal(signal.SIGTERM, as_ray_does)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert signal.getsignal(signal.SIGTERM) is before

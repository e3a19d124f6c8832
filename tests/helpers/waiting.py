"""Waiting for what another process or thread does, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE = 180.0


def wait_until(
    condition: Callable[[], bool], what: str = "the condition", seconds: float = DEADLINE, *, every: float = 0.01
) -> None:
    """`every`: seconds between two looks at the condition, more where one is costly."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(every)

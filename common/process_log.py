"""Log of a process that a run has started: its warnings become single lines that the driver recognises.

    worker, learner or reward server: report_to_driver() ──stderr──► driver: reported(line), shown once by `Repeats`

Tracebacks follow on lines of their own, which stay in the files.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable

PACKAGES = ("rtdmd", "common", "learner", "rollout_workers", "reward_servers", "zoo")
LINE = re.compile(r"rtdmd (WARNING|ERROR|CRITICAL): (.+)")
NUMBER = re.compile(r"\d+(\.\d+)?")
REPEAT_S = 60.0
MOST_TEXTS = 1000


class _OneLine(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"rtdmd {record.levelname}: {' '.join(record.message.split())}"


class _Stderr(logging.Handler):
    """Writes to what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def report_to_driver() -> None:
    """Write the warnings and errors of our packages to standard error, in this process, from now on."""
    handler = _Stderr(logging.WARNING)
    handler.setFormatter(_OneLine())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Stderr) for known in logger.handlers):
            logger.addHandler(handler)


def reported(line: str) -> tuple[int, str] | None:
    """The level and the text of a line that `report_to_driver` has written; None for any other line."""
    found = LINE.fullmatch(line.rstrip())
    return None if found is None else (logging.getLevelNamesMapping()[found[1]], found[2])


class Repeats:
    """Tells texts that were shown a moment ago: 256 workers say the same about one reward. Numbers do not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown: dict[str, float] = {}

    def is_new(self, text: str) -> bool:
        """Whether no such text was shown within `REPEAT_S`; it is remembered as shown then."""
        key, now = NUMBER.sub("#", text), self._clock()
        if now - self._shown.get(key, -REPEAT_S) < REPEAT_S:
            return False
        if len(self._shown) >= MOST_TEXTS:
            self._shown.clear()
        self._shown[key] = now
        return True

"""Output of Ray's processes: their warnings reach the console as one line each, all their lines `logs/ray.log`.

Ray sends the lines that workers and learner print, on any machine, to a function of the driver that prints them. It has
no public way to give another function. The one used here is of the Ray that pyproject.toml pins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NotRequired, TypedDict

from ray._private.ray_logging import global_worker_stdstream_dispatcher

from common.console_stream import LOG
from common.process_log import Repeats, reported

RAY_LOG = logging.getLogger("ray.processes")
OF_RAY, OURS = "ray_print_logs", "rtdmd"
"""Names of the functions that get the lines."""
NAMES = {"RolloutWorker": "worker", "Learner": "learner", "LearnerRank": "learner rank"}


class Lines(TypedDict):
    """Lines of one process, as Ray sends them."""

    ip: str
    pid: int | str
    lines: list[str]
    actor_name: NotRequired[str | None]


class ProcessOutput:
    """Logs the lines of Ray's processes."""

    def __init__(self) -> None:
        self._repeats = Repeats()

    def take(self, lines: Lines) -> None:
        name = lines.get("actor_name") or ""
        who = f"{NAMES.get(name, name or 'process')} ({lines['ip']}:{lines['pid']})"
        for line in lines["lines"]:
            RAY_LOG.info("%s: %s", who, line)
            found = reported(line)
            if found is not None and self._repeats.is_new(found[1]):
                LOG.log(found[0], "%s: %s", who, found[1])


@contextmanager
def logged_processes() -> Iterator[None]:
    """Log the lines of Ray's processes, in place of Ray's own function that prints them. Enter it after `ray.init`."""
    global_worker_stdstream_dispatcher.remove_handler(OF_RAY)
    global_worker_stdstream_dispatcher.add_handler(OURS, ProcessOutput().take)
    try:
        yield
    finally:
        global_worker_stdstream_dispatcher.remove_handler(OURS)

"""Output of Ray's processes: their warnings reach the console as one line each, all their lines `logs/ray.log`.

    worker, learner on any machine ──stderr, stdout──► Ray ──► ProcessOutput.take ──► ray.log; ours also the console

Ray gives the lines that its processes print, and its own errors, to a function of the driver that prints them. It has
no public way to name another function. The one replaced here is that of the Ray which pyproject.toml pins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NotRequired, TypedDict

from ray._private import worker as ray_driver

from common.console_stream import LOG
from common.process_log import Repeats, reported

RAY_LOG = logging.getLogger("ray.processes")
NAMES = {"RolloutWorker": "worker", "Learner": "learner", "LearnerRank": "learner rank"}
AUTOSCALER = "autoscaler"
"""Prints its status every few seconds."""


class Lines(TypedDict):
    """Lines of one process, as Ray gives them. `pid` may be a name; errors of Ray itself have no `ip`."""

    pid: int | str
    lines: list[str]
    ip: NotRequired[str]
    actor_name: NotRequired[str | None]


class ProcessOutput:
    """Logs the lines of Ray's processes. Used by two threads of Ray, which only share what `Repeats` remembers."""

    def __init__(self) -> None:
        self._repeats = Repeats()

    def take(self, data: Lines, ignore_prefix: bool = False) -> None:  # noqa: ARG002 - Ray's signature
        if data["pid"] == AUTOSCALER:
            return
        name = data.get("actor_name") or ""
        who = f"{NAMES.get(name, name or 'process')} ({data.get('ip', 'this machine')}:{data['pid']})"
        for line in data["lines"]:
            RAY_LOG.info("%s: %s", who, line)
            found = reported(line)
            if found is not None and self._repeats.is_new(found[1]):
                LOG.log(found[0], "%s: %s", who, found[1])


@contextmanager
def logged_processes() -> Iterator[None]:
    """Log the lines of Ray's processes, instead of printing them. Enter it before `ray.init`."""
    before = ray_driver.print_to_stdstream
    ray_driver.print_to_stdstream = ProcessOutput().take
    try:
        yield
    finally:
        ray_driver.print_to_stdstream = before

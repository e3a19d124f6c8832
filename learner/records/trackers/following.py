"""Sends a running run to its trackers, from threads of their own: training never waits for a tracker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread

from common.errors import one_line
from learner.records.trackers.feed import Feed

POLL_S = 5.0
RETRY_S = 60.0
"""Seconds between two attempts, and between two after a failure."""
END_S = 40.0
"""Seconds that the end of a run waits for all trackers together."""
MESSAGE_CHARACTERS = 300


@contextmanager
def followed(
    feeds: Sequence[Feed], say: Callable[[str], None], *, poll_s: float = POLL_S, retry_s: float = RETRY_S
) -> Iterator[None]:
    """Send the run to its trackers inside the block, and what is left at its end.

    Args:
        say: gets one line when a tracker cannot be used, one when it can be again, and one about what was not sent.
    """
    followers = [_Follower(feed, say, poll_s, retry_s) for feed in feeds]
    for follower in followers:
        follower.start()
    try:
        yield
    finally:
        for follower in followers:
            follower.stop.set()
        deadline = time.monotonic() + END_S
        for follower in followers:
            follower.join(max(0.0, deadline - time.monotonic()))
            if not follower.complete:
                say(f"tracker {follower.kind}: not everything was sent: `{follower.command}` sends the rest")


class _Follower(Thread):
    """Sends to one tracker until it is stopped. A daemon: a package that hangs does not hold the process."""

    def __init__(self, feed: Feed, say: Callable[[str], None], poll_s: float, retry_s: float) -> None:
        super().__init__(name=f"tracker-{feed.kind}", daemon=True)
        self.kind = feed.kind
        self.command = f"rtdmd track {feed.run_dir} {feed.kind}"
        self.stop = Event()
        self.complete = False
        self._feed = feed
        self._say = say
        self._poll_s, self._retry_s = poll_s, retry_s
        self._failing = False

    def run(self) -> None:
        while not self.stop.wait(self._retry_s if self._failing else self._poll_s):
            self._send()
        self._send()
        if not self._failing:
            self.complete = self._closed()

    def _send(self) -> None:
        try:
            count = self._feed.send()
        except Exception as error:  # of any package: none of them may end a run
            self._fail(error)
            return
        if self._failing:
            self._failing = False
            self._say(f"tracker {self.kind}: reached again, and what it missed is sent ({count} lines)")

    def _closed(self) -> bool:
        try:
            self._feed.close()
        except Exception as error:
            self._fail(error)
        return not self._failing

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            reason = one_line(error, MESSAGE_CHARACTERS).rstrip(".")
            self._say(f"tracker {self.kind}: {reason}; the run goes on, and what is missing is sent later")

"""Runs events one after another in a thread of its own, and lets another thread wait for what they change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Condition, Thread
from typing import Protocol, TypeVar

Found = TypeVar("Found")


class Events(Protocol):
    """Runs events and a check at intervals, one at a time. `put` may be called from any thread."""

    def start(self, check: Callable[[], None], every_s: float) -> None:
        """Run events from now on, and `check` at intervals."""

    def stop(self) -> None:
        """Run no further event."""

    def put(self, event: Callable[[], None]) -> None:
        """Run an event after those that were put before."""

    def changing(self) -> AbstractContextManager[None]:
        """A context in which an event changes what `until` looks at."""

    def raise_error(self) -> None:
        """Raise the error of an event or of a check: after it, none runs."""

    def until(self, look: Callable[[], Found | None], seconds: float | None = None) -> Found | None:
        """Wait until `look` finds something, and return it; None after so many seconds. Errors are raised here."""


class EventThread:
    """`Events` in real time."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._changed = Condition()
        self._error: BaseException | None = None
        self._open = True

    def start(self, check: Callable[[], None], every_s: float) -> None:
        self._thread = Thread(target=self._serve, args=(check, every_s), name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._open = False
        self._events.put(lambda: None)
        self._thread.join()

    def put(self, event: Callable[[], None]) -> None:
        self._events.put(event)

    @contextmanager
    def changing(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def until(self, look: Callable[[], Found | None], seconds: float | None = None) -> Found | None:
        end = None if seconds is None else self._clock() + seconds
        with self._changed:
            while (found := look()) is None:
                left = None if end is None else end - self._clock()
                if left is not None and left <= 0:
                    return None
                self.raise_error()
                self._changed.wait(left)
        return found

    def _serve(self, check: Callable[[], None], every_s: float) -> None:
        try:
            next_check = self._clock()
            while self._open:
                with suppress(Empty):
                    self._events.get(timeout=max(0.0, next_check - self._clock()))()
                if self._clock() >= next_check:
                    next_check = self._clock() + every_s
                    check()
        except BaseException as error:  # raised where another thread waits
            with self.changing():
                self._error = error

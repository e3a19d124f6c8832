"""Draws noise in a thread before it is needed. A draw is a function of its key alone, so only the time changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class NoiseAhead:
    """Draws that have begun, by their name; each is taken once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._begun: dict[Hashable, Future[Tensor]] = {}

    def begin(self, name: Hashable, draw: Callable[[], Tensor]) -> None:
        """Begin a draw, after those that have begun before."""
        self._begun[name] = self._thread.submit(draw)

    def take(self, name: Hashable) -> Tensor | None:
        """The noise, once it is drawn; None if nobody has begun this draw."""
        begun = self._begun.pop(name, None)
        return None if begun is None else begun.result()

    def clear(self) -> None:
        """Forget the draws that an update which failed has left."""
        for begun in self._begun.values():
            begun.cancel()
        self._begun.clear()

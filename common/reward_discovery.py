"""Keeps a client's servers up to date with the registry, in a thread, so that no question ever waits for Redis."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from common.errors import StoreError
from common.reward_client import RewardClient
from common.store import RENEW_S, ServerRegistry

STOP_S = 5.0
"""A look under way is waited for, so that it does not find its client closed."""


class Discovery:
    """Context manager: looks once on entry, then every `RENEW_S` seconds. While Redis is away nothing changes."""

    def __init__(self, client: RewardClient, registry: ServerRegistry, names: Sequence[str]) -> None:
        self._client = client
        self._registry = registry
        self._names = tuple(names)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="reward-discovery", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(STOP_S)

    def _follow(self) -> None:
        while not self._stop.wait(RENEW_S):
            self._look()

    def _look(self) -> None:
        for name in self._names:
            try:
                urls = self._registry.urls(name)
            except StoreError:
                return
            self._client.offer(name, urls)

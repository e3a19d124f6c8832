"""Keeps a client's servers up to date with the registry, in a thread, so that no question ever waits for Redis."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from common.errors import StoreError
from common.redis_link import RENEW_S, ServerRegistry
from common.rewards.client import RewardClient

STOP_S = 5.0
"""A look under way is waited for, so that it does not find its client closed."""

logger = logging.getLogger(__name__)


class Discovery:
    """Context manager: looks once on entry, then every `RENEW_S` seconds. While Redis is away nothing changes."""

    def __init__(self, client: RewardClient, registry: ServerRegistry, names: Sequence[str]) -> None:
        self._client = client
        self._registry = registry
        self._names = tuple(names)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="reward-discovery", daemon=True)
        self._complaint = ""

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(STOP_S)

    def look(self) -> None:
        """Offer what is registered now, all rewards at once. Whatever goes wrong is said once; the next look is due."""
        try:
            with ThreadPoolExecutor(max(1, len(self._names)), thread_name_prefix="reward-discovery") as threads:
                list(threads.map(self._look_for, self._names))
        except StoreError:
            # Told by the link.
            return
        except Exception as error:
            # Others write to this registry: nothing that is found there may end the thread.
            if repr(error) != self._complaint:
                logger.exception("registered reward servers cannot be looked up: going on with the known ones")
            self._complaint = repr(error)
        else:
            self._complaint = ""

    def _look_for(self, name: str) -> None:
        self._client.offer(name, self._registry.urls(name))

    def _follow(self) -> None:
        while not self._stop.wait(RENEW_S):
            self.look()

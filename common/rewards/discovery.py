"""Updates a client's servers from the registry in a background thread, so that no request waits for Redis."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from common.errors import StoreError
from common.rewards.client import RewardClient
from common.rewards.registry import RENEW_S, ServerRegistry

STOP_S = 5.0
"""On exit, a lookup in flight gets this long to finish, so that it does not use a closed client."""

logger = logging.getLogger(__name__)


class Discovery:
    """Context manager: looks up the registry on entry, then every `RENEW_S` seconds. Without Redis nothing changes."""

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
        """Offer the registered servers of all rewards to the client. An error is logged once and does not end it."""
        try:
            with ThreadPoolExecutor(max(1, len(self._names)), thread_name_prefix="reward-discovery") as threads:
                list(threads.map(self._look_for, self._names))
        except StoreError:
            # The link has logged it.
            return
        except Exception as error:
            # Other programs write to this registry: no entry in it may end the thread.
            if repr(error) != self._complaint:
                logger.exception("cannot look up registered reward servers: continuing with the known ones")
            self._complaint = repr(error)
        else:
            self._complaint = ""

    def _look_for(self, name: str) -> None:
        self._client.offer(name, self._registry.urls(name), signed=self._registry.signs)

    def _follow(self) -> None:
        while not self._stop.wait(RENEW_S):
            self.look()

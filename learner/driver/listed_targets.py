"""Keeps the list of a run's endpoints for Prometheus current: reward servers that register in Redis are added to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from common.console_stream import LOG
from common.errors import ConfigError, StoreError
from common.redis_link import RedisLink
from common.rewards.access import RewardAccess
from common.rewards.registry import RENEW_S, ServerRegistry
from learner.records.metrics_server import Targets

STOP_S = 5.0
"""Seconds that a lookup in flight gets to finish at the end."""

Urls = Mapping[str, tuple[str, ...]]
"""The URLs of each reward's servers."""


@contextmanager
def listed_targets(targets: Targets, driver: str, access: RewardAccess) -> Iterator[None]:
    """List the driver's endpoint (HOST:PORT) and the reward servers while the block runs.

    Raises:
        ConfigError: the file cannot be written at the start. Later that is a warning.
    """
    known = {name: tuple(one.url for one in access.endpoints if one.name == name) for name in access.outages}
    targets.write(driver, known)
    with ExitStack() as stack:
        stack.callback(targets.remove)
        if access.redis is not None:
            link = RedisLink(access.redis)
            stack.callback(link.close)
            stack.enter_context(_Registered(targets, driver, known, ServerRegistry(link, access.token)))
        yield


class _Registered:
    """Looks for registered servers every `RENEW_S` seconds, in a thread."""

    def __init__(self, targets: Targets, driver: str, known: Urls, registry: ServerRegistry) -> None:
        self._targets, self._driver, self._known, self._registry = targets, driver, known, registry
        self._listed = known
        self._complaint = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="registered-targets", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(STOP_S)

    def _follow(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(RENEW_S)

    def _look(self) -> None:
        """Write the list if it has changed. Without Redis it stays; what else goes wrong is logged, once."""
        try:
            found = {
                name: tuple(dict.fromkeys([*urls, *self._registry.urls(name)])) for name, urls in self._known.items()
            }
            if found != self._listed:
                self._targets.write(self._driver, found)
                self._listed = found
        except StoreError:
            return  # the link has logged it
        except ConfigError as error:
            if str(error) != self._complaint:
                LOG.warning(f"{error}; registered servers are missing there until it can be written")
            self._complaint = str(error)

"""A server is listed as long as it takes requests, and never after."""

from __future__ import annotations

import asyncio
import threading

import pytest

from common.errors import StoreError
from reward_servers import registration
from reward_servers.registration import registered

TIMEOUT = 10.0
URLS = {"hps": "http://here:8000/hps"}


class Registry:
    """In place of Redis; a registration waits at a gate, as on a slow network."""

    def __init__(self, link: object, token: str | None) -> None:
        self.listed: set[str] = set()
        self.entered = threading.Event()
        self.gate = threading.Event()

    def register(self, reward: str, url: str) -> None:
        self.entered.set()
        assert self.gate.wait(TIMEOUT)
        self.listed.add(url)

    def deregister(self, reward: str, url: str) -> None:
        self.listed.remove(url)


def test_a_renewal_on_its_way_does_not_list_a_server_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(None, None)
    monkeypatch.setattr(registration, "ServerRegistry", lambda link, token: registry)

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT):
            async with registered("redis://127.0.0.1:1/0", URLS):
                await asyncio.to_thread(registry.entered.wait, TIMEOUT)
                asyncio.get_running_loop().call_soon(registry.gate.set)

    asyncio.run(run())
    assert registry.listed == set()


def test_redis_lost_is_not_the_servers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Lost(Registry):
        def register(self, reward: str, url: str) -> None:
            asked.append(reward)
            raise StoreError("lost")

        deregister = register

    monkeypatch.setattr(registration, "ServerRegistry", Lost)

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT), registered("redis://127.0.0.1:1/0", URLS):
            served.append(True)

    served: list[bool] = []
    asyncio.run(run())
    assert served == [True]
    assert asked[-1] == "hps"

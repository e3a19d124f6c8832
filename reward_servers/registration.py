"""Registers a server in Redis under the names of its rewards, so that new and running runs find it.

The server renews its lease while it takes requests and gives it up when its drain begins. The lease of a killed server
expires. The server keeps running without Redis and registers again when Redis is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from common.errors import StoreError
from common.redis_link import RedisAddress, RedisLink
from common.rewards.registry import RENEW_S, ServerRegistry

logger = logging.getLogger(__name__)


@asynccontextmanager
async def registered(redis_url: str | None, urls: Mapping[str, str], token: str | None = None) -> AsyncIterator[None]:
    """Keep each reward in `urls` registered with its base URL inside the block; without a `redis_url`, do nothing.

    The registrations are signed with the server's bearer token, if it has one.
    """
    if redis_url is None:
        yield
        return
    link = RedisLink(RedisAddress.from_environment(redis_url))
    registry = ServerRegistry(link, token)
    closing = asyncio.Event()
    keeping = asyncio.create_task(_keep_listed(registry, urls, closing))
    try:
        yield
    finally:
        closing.set()
        # The task is asked to end, not cancelled: a renewal in flight in its thread would register the server again.
        await keeping
        await asyncio.to_thread(_each, registry.deregister, urls)
        link.close()


async def _keep_listed(registry: ServerRegistry, urls: Mapping[str, str], closing: asyncio.Event) -> None:
    while not closing.is_set():
        await asyncio.to_thread(_each, registry.register, urls)
        with suppress(TimeoutError):
            async with asyncio.timeout(RENEW_S):
                await closing.wait()


def _each(action: Callable[[str, str], None], urls: Mapping[str, str]) -> None:
    try:
        for reward, url in urls.items():
            action(reward, url)
    except StoreError as error:
        # The link logs once that Redis is lost, and once that it is back.
        logger.debug("not listed: %s", error)

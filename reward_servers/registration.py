"""Lists a server in Redis under the names of its rewards, so that runs find it, also those that run already.

A lease that is renewed as long as the server takes requests, and given up when it begins to drain; a server that was
killed is forgotten when its lease runs out. Redis lost is not the server's end: it is listed again when Redis is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

from common.errors import StoreError
from common.redis_link import RENEW_S, RedisAddress, RedisLink, ServerRegistry

logger = logging.getLogger(__name__)


@asynccontextmanager
async def registered(redis_url: str | None, urls: Mapping[str, str]) -> AsyncIterator[None]:
    """Inside the block each reward of `urls` is listed with its base URL; a `redis_url` of None lists nothing."""
    if redis_url is None:
        yield
        return
    link = RedisLink(RedisAddress.from_environment(redis_url))
    registry = ServerRegistry(link)
    closing = asyncio.Event()
    keeping = asyncio.create_task(_keep_listed(registry, urls, closing))
    try:
        yield
    finally:
        closing.set()
        # Asked to end, not cancelled: a renewal on its way in its thread would otherwise list the server again.
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
        # The link says once that Redis is away, and once that it is back.
        logger.debug("not listed: %s", error)

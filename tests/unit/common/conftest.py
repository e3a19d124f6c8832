"""A real Redis, for the tests of what is kept in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from common.redis_link import RedisAddress, RedisLink
from learner.driver.embedded_redis import embedded_redis


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisAddress]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / "redis.log") as started:
        yield started


@pytest.fixture
def client(address: RedisAddress) -> Iterator[redis.Redis]:
    with address.connect() as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def link(address: RedisAddress, client: redis.Redis) -> Iterator[RedisLink]:
    opened = RedisLink(address)
    yield opened
    opened.close()

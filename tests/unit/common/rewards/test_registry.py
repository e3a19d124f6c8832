"""The registry in a real Redis that others write to: what is no server of ours is never read as one."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import redis

from common.redis_link import RedisLink
from common.rewards.cache import LARGEST_REQUEST, ScoreCache
from common.rewards.registry import LARGEST_SAMPLE, LEASE_S, MOST_SERVERS, ServerRegistry
from common.signed_values import CLOCK_TOLERANCE_S
from tests.helpers.hand_clock import HandClock

TOKEN = "0123456789abcdef"
EPOCH_S = 1_700_000_000.5


def plant(client: redis.Redis, url: str, lease: bytes = b"", reward: str = "hps") -> None:
    """Write what a stranger can write: a URL and a lease that does not end."""
    client.sadd(f"rtdmd:servers:{reward}", url)
    client.set(f"rtdmd:lease:{reward}:{url}", lease)


def test_with_a_token_only_signed_servers_are_listed(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    ours, others = ServerRegistry(link, TOKEN), ServerRegistry(link, TOKEN + "x")
    ours.register("hps", "http://a:1")
    others.register("hps", "http://liar:2")
    ServerRegistry(link).register("hps", "http://liar:3")
    plant(client, "http://liar:4", bytes(32) + b"1700000000")
    signed = client.get("rtdmd:lease:hps:http://a:1")
    plant(client, "http://liar:5", signed)
    plant(client, "http://a:1", signed, reward="another")
    for _ in range(2):
        assert ours.urls("hps") == ("http://a:1",)
        assert ours.urls("another") == ()
    assert (ours.signs, ServerRegistry(link).signs) == (True, False)
    assert ["is not signed with this" in record.getMessage() for record in caplog.records] == [True]
    # Without a token every server is listed, as it always was.
    assert ServerRegistry(link).urls("hps") == ("http://a:1", *(f"http://liar:{port}" for port in (2, 3, 4, 5)))


@pytest.mark.parametrize("late", [True, False])
def test_an_old_registration_is_not_repeated(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    clock = HandClock(EPOCH_S)
    registry = ServerRegistry(link, TOKEN, clock)
    registry.register("hps", "http://a:1")
    captured = client.get("rtdmd:lease:hps:http://a:1")
    registry.deregister("hps", "http://a:1")
    plant(client, "http://a:1", captured)
    clock.now += (1 if late else -1) * (LEASE_S + CLOCK_TOLERANCE_S)
    assert registry.urls("hps") == ("http://a:1",)
    clock.now += 1 if late else -1
    for _ in range(2):
        assert registry.urls("hps") == ()
    age = "136" if late else "-136"
    assert [f"registration is {age} s old" in record.getMessage() for record in caplog.records] == [True]
    registry.register("hps", "http://a:1")
    assert registry.urls("hps") == ("http://a:1",)


def test_only_places_are_servers(link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    for url in ("http://a:1/admin/delete?id=1&x=", "http://me:secret@a:1", "gopher://x", "http://a:1/#", "nonsense"):
        plant(client, url)
    plant(client, "http://a:1/hps")
    for _ in range(2):
        assert ServerRegistry(link).urls("hps") == ("http://a:1/hps",)
    registry = ServerRegistry(link)
    caplog.clear()
    for _ in range(2):
        registry.urls("hps")
    (record,) = caplog.records
    assert "rtdmd:servers:hps has " in record.getMessage()
    assert "a registered URL is http(s)://HOST:PORT" in record.getMessage()
    assert "secret" not in caplog.text


def test_a_flood_is_looked_at_in_part_and_does_not_displace_servers(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A thousand dead members and more: those that were used before stay."""
    caplog.set_level(logging.WARNING)
    registry = ServerRegistry(link)
    registry.register("hps", "http://z:1")
    assert registry.urls("hps") == ("http://z:1",)
    flood = [f"http://a:{port}" for port in range(1, 3001)]
    client.sadd("rtdmd:servers:hps", *flood)
    client.mset({f"rtdmd:lease:hps:{url}": b"" for url in flood})
    for _ in range(3):
        found = registry.urls("hps")
        assert "http://z:1" in found
        assert len(found) == MOST_SERVERS
    assert [record.getMessage() for record in caplog.records] == [
        f"Redis: rtdmd:servers:hps has 3001 entries, of which {LARGEST_SAMPLE} are looked at: delete it",
        next(record.getMessage() for record in caplog.records if f"of which {MOST_SERVERS} are used" in record.message),
    ]


def test_with_a_token_a_small_flood_hides_no_server(link: RedisLink, client: redis.Redis) -> None:
    registry = ServerRegistry(link, TOKEN)
    registry.register("hps", "http://z:1")
    flood = [f"http://a:{port}" for port in range(1, LARGEST_SAMPLE)]
    client.sadd("rtdmd:servers:hps", *flood)
    client.mset({f"rtdmd:lease:hps:{url}": b"" for url in flood})
    assert registry.urls("hps") == ("http://z:1",)


def test_a_planted_score_is_not_believed(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ScoreCache(link, 100, TOKEN)
    score = np.array([0.25], np.float32)
    cache.put(["a", "b"], np.array([0.25, 0.75], np.float32))
    np.testing.assert_array_equal(cache.get(["a"]), score)
    stranger = ScoreCache(link, 100, TOKEN + "x")
    for planted in (np.float32(0.97).tobytes(), bytes(36), client.get("rtdmd:score:b"), b""):
        client.set("rtdmd:score:a", planted)
        assert cache.get(["a"]) is None
    stranger.put(["a"], score)
    assert cache.get(["a"]) is None
    assert ["cached score that is not signed" in record.getMessage() for record in caplog.records] == [True]
    cache.put(["a"], score)
    np.testing.assert_array_equal(cache.get(["a"]), score)


def test_planted_keys_of_scores_end_no_request(link: RedisLink, client: redis.Redis) -> None:
    """They are taken out a part at a time, before ours because they are older."""
    client.zadd("rtdmd:scores", {b"\xff" + str(number).encode(): 0 for number in range(2 * LARGEST_REQUEST + 10)})
    cache = ScoreCache(link, 4)
    cache.put(["a"], np.array([0.5], np.float32))
    assert client.zcard("rtdmd:scores") == 11
    cache.put(["b"], np.array([0.5], np.float32))
    assert client.zcard("rtdmd:scores") == 4
    assert cache.get(["a", "b"]) is not None

"""Another client of a run's Redis: it registers servers, plants scores and repeats what it has seen.

With a token it reaches nothing. Without one, a server that answers falsely gets no request, and only places are asked.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import redis

from common.config.rewards import RewardClientConfig
from common.redis_link import RedisAddress, RedisLink
from common.rewards.access import RewardAccess
from common.rewards.api import ScoreRequest, ScoreResponse
from common.rewards.client import RewardEndpoint, ScoreQuestion
from common.rewards.control_request import ControlRequest, Reference, random_pictures_BHWC
from common.rewards.guard import Outage
from common.rewards.registry import ServerRegistry
from common.types import OutagePolicy
from learner.driver.embedded_redis import embedded_redis
from tests.helpers.fake_reward_server import (
    IMAGES,
    INFO,
    PROMPTS,
    SCORES,
    FakeServer,
    closed_url,
    fake_server,
    introduction,
)
from tests.helpers.waiting import wait_until

TOKEN = "0123456789abcdef"
LIE = np.full(2, 0.999, np.float32)
QUESTIONS = 20


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisAddress]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / "redis.log") as started:
        yield started


@pytest.fixture
def stranger(address: RedisAddress) -> Iterator[redis.Redis]:
    """The other client."""
    with address.connect() as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(fake_server()) for _ in range(2)]


@pytest.fixture
def honest(servers: list[FakeServer]) -> FakeServer:
    return servers[0]


@pytest.fixture
def liar(servers: list[FakeServer]) -> FakeServer:
    """Declares the reward's identity, which anybody can copy, and answers random pictures as the honest one does."""
    servers[1].replies = [(200, ScoreResponse("fake", "hash", LIE).to_bytes())]
    return servers[1]


@pytest.fixture
def access(address: RedisAddress, honest: FakeServer) -> RewardAccess:
    """The rewards of a run that names the honest server and has a token."""
    endpoints = (RewardEndpoint("fake", honest.url),)
    outages = {"fake": Outage(OutagePolicy.PAUSE, 30.0)}
    return RewardAccess(endpoints, outages, RewardClientConfig(timeout_s=20.0), TOKEN, address, 1000)


def plant(stranger: redis.Redis, *urls: str, lease: bytes = b"") -> None:
    """Registrations that never end."""
    stranger.sadd("rtdmd:servers:fake", *urls)
    stranger.mset({f"rtdmd:lease:fake:{url}": lease for url in urls})


def lies(access: RewardAccess) -> int:
    """How many of twenty requests a run's client gets a lie for."""
    with access.client() as client:
        # No question twice, or the cache answers.
        answers = [client.score(IMAGES + number, PROMPTS)["fake"] for number in range(QUESTIONS)]
    return sum(bool((answer != SCORES).any()) for answer in answers)


def test_a_liar_that_is_not_signed_is_never_spoken_to(
    access: RewardAccess,
    stranger: redis.Redis,
    honest: FakeServer,
    liar: FakeServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="common")
    plant(stranger, liar.url)
    plant(stranger, f"{liar.url}/name", lease=bytes(32) + repr(time.time()).encode())
    assert lies(access) == 0
    first, last = (record.getMessage() for record in caplog.records)
    assert f"'rtdmd:lease:fake:{liar.url}" in first
    assert re.fullmatch(r"Redis: \d+ registrations and 0 scores without a valid signature were ignored", last)
    assert liar.paths == []
    assert len(honest.bodies) == QUESTIONS


def test_a_registration_of_another_server_is_of_no_use_to_a_liar(
    access: RewardAccess, stranger: redis.Redis, honest: FakeServer, liar: FakeServer, address: RedisAddress
) -> None:
    ServerRegistry(RedisLink(address), TOKEN).register("fake", honest.url)
    plant(stranger, liar.url, lease=stranger.get(f"rtdmd:lease:fake:{honest.url}"))
    assert lies(access) == 0
    assert liar.paths == []


def test_an_old_registration_cannot_be_repeated(
    access: RewardAccess, stranger: redis.Redis, liar: FakeServer, address: RedisAddress
) -> None:
    """The liar has taken the place of a server that was registered once."""
    ServerRegistry(RedisLink(address), TOKEN, lambda: time.time() - 200.0).register("fake", liar.url)
    stranger.persist(f"rtdmd:lease:fake:{liar.url}")
    assert lies(access) == 0
    assert liar.paths == []


def test_a_signed_server_is_used_and_gets_the_token(
    access: RewardAccess, stranger: redis.Redis, servers: list[FakeServer], address: RedisAddress
) -> None:
    ServerRegistry(RedisLink(address), TOKEN).register("fake", servers[1].url)
    assert lies(access) == 0
    assert servers[1].bodies
    assert servers[1].authorizations == {f"Bearer {TOKEN}"}


def test_a_planted_score_is_not_believed(access: RewardAccess, stranger: redis.Redis, honest: FakeServer) -> None:
    with access.client() as client:
        client.score(IMAGES, PROMPTS)
        planted = stranger.keys("rtdmd:score:*")
        assert len(planted) == 2
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        assert len(honest.bodies) == 1
        for lie in (np.float32(0.97).tobytes(), bytes(32) + np.float32(0.97).tobytes()):
            stranger.mset(dict.fromkeys(planted, lie))
            asked = len(honest.bodies)
            np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
            assert len(honest.bodies) == asked + 1
        # Another entry of ours is no entry here.
        first, second = map(stranger.get, planted)
        stranger.mset({planted[0]: second, planted[1]: first})
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        assert len(honest.bodies) == asked + 2


@pytest.mark.parametrize("token", [TOKEN, None])
def test_a_run_sends_requests_to_places_alone(
    access: RewardAccess, stranger: redis.Redis, liar: FakeServer, token: str | None
) -> None:
    secret = liar.url.replace("http://", "http://user:secret@")
    plant(stranger, f"{liar.url}/admin/delete?id=1&x=", f"{liar.url}/#", f"{liar.url}/a/b", secret, "gopher://x:1")
    assert lies(replace(access, token=token)) == 0
    assert liar.paths == []


def test_the_token_is_sent_to_nobody_who_was_only_heard_of(
    access: RewardAccess, stranger: redis.Redis, honest: FakeServer, liar: FakeServer
) -> None:
    """Neither by a run with a token that reads strangers' registrations nor to another port of a configured host."""
    plant(stranger, liar.url)
    with access.client() as client:
        client.offer("fake", [liar.url])
        client.score(IMAGES, PROMPTS)
    assert liar.authorizations == {None}
    assert honest.authorizations == {f"Bearer {TOKEN}"}


def test_a_flood_of_dead_servers_neither_ends_nor_hides_anything(
    access: RewardAccess, stranger: redis.Redis, servers: list[FakeServer], address: RedisAddress
) -> None:
    with closed_url() as dead:
        plant(stranger, *(f"{dead}/{number}" for number in range(900)))
        ServerRegistry(RedisLink(address), TOKEN).register("fake", servers[1].url)
        with access.client() as client:
            assert set(client.states("fake")) == {server.url for server in servers}
        plant(stranger, *(f"{dead}/{number}" for number in range(3000)))
        assert lies(replace(access, token=None)) == 0


def test_without_a_token_a_liar_is_found_by_its_answers(
    access: RewardAccess, stranger: redis.Redis, liar: FakeServer
) -> None:
    """This is all that is possible then: see docs/decisions/redis_is_optional.md."""
    liar.introduction = lambda: (200, introduction(INFO, *LIE.tolist()))
    plant(stranger, liar.url)
    assert lies(replace(access, token=None)) == 0
    assert (liar.bodies, len(liar.introductions)) == ([], 1)


def test_a_joining_server_is_compared_with_what_the_run_knows_from_its_start(
    access: RewardAccess, stranger: redis.Redis, servers: list[FakeServer], address: RedisAddress
) -> None:
    """Also while the server that gave the answers is down."""
    servers[0].introduction = lambda: (500, b"")
    control = ControlRequest("a red cat", {})
    known = replace(access, infos={"fake": INFO}, controls={"fake": control})
    registry = ServerRegistry(RedisLink(address), TOKEN)
    registry.register("fake", servers[1].url)
    for scores, joined in (((0.5, 0.5), 2), ((0.5, 0.9), 1)):
        with replace(known, references={"fake": Reference(5, scores)}).client() as client:
            assert len(client.states("fake")) == joined
    asked = [ScoreRequest.from_bytes(body) for body in servers[1].introductions]
    assert [list(request.prompts) for request in asked] == [["a red cat"] * 2] * 2
    np.testing.assert_array_equal(asked[0].images_BHWC, random_pictures_BHWC(5))
    assert servers[0].introductions == []


def test_a_server_that_joins_a_run_answers_random_pictures_first(
    access: RewardAccess, stranger: redis.Redis, servers: list[FakeServer], address: RedisAddress
) -> None:
    question = ScoreQuestion.of(IMAGES, PROMPTS, None)
    with replace(access, cached_scores=1).client() as client:
        client.score_one("fake", question)
        ServerRegistry(RedisLink(address), TOKEN).register("fake", servers[1].url)
        wait_until(lambda: len(client.states("fake")) == 2)
    assert [len(server.introductions) for server in servers] == [1, 1]
    assert servers[1].bodies == []

"""Servers that were only heard of: each answers random pictures as the known ones do, or gets no request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from common.errors import RewardInvalid, RewardUnavailable
from common.rewards import newcomers
from common.rewards.api import ScoreRequest, ServerInfo
from common.rewards.client import RewardClient
from common.rewards.control_request import SIDE, ControlRequest, Reference, random_pictures_BHWC
from common.rewards.http import Exchange
from common.rewards.identity import RewardIdentities
from common.rewards.newcomers import REFUSED_FOR_S
from tests.helpers.fake_reward_server import (
    IMAGES,
    INFO,
    PROMPTS,
    SCORES,
    FakeServer,
    Time,
    client_at,
    closed_url,
    error_body,
    fake_server,
    introduction,
)
from tests.helpers.waiting import wait_until


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(fake_server()) for _ in range(3)]


def answers(server: FakeServer, *scores: float) -> None:
    server.introduction = lambda: (200, introduction(server.info, *scores))


def fails(server: FakeServer) -> None:
    server.introduction = lambda: (500, error_body("scorer"))


def is_answered(client: RewardClient, times: int = 10) -> None:
    for _ in range(times):
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)


def test_pictures_are_random_blocks_that_the_seed_alone_decides() -> None:
    pictures_BHWC = random_pictures_BHWC(7)
    assert (pictures_BHWC.shape, pictures_BHWC.dtype) == ((2, SIDE, SIDE, 3), np.uint8)
    np.testing.assert_array_equal(pictures_BHWC, random_pictures_BHWC(7))
    assert (pictures_BHWC != random_pictures_BHWC(8)).mean() > 0.9
    for picture_HWC, block in zip(pictures_BHWC, (4, 16), strict=True):
        blocks = picture_HWC.reshape(SIDE // block, block, SIDE // block, block, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        assert len(np.unique(blocks[:, 0, :, 0].reshape(-1, 3), axis=0)) > 0.9 * (SIDE // block) ** 2


def test_a_liar_gets_no_request(servers: list[FakeServer], caplog: pytest.LogCaptureFixture) -> None:
    server, liar, twin = servers
    answers(liar, 0.999, 0.999)
    with client_at(server.url) as client:
        for _ in range(3):
            client.offer("fake", [liar.url, twin.url])
        assert set(client.states("fake")) == {server.url, twin.url}
        is_answered(client)
    assert liar.bodies == []
    (record,) = caplog.records
    expected = f"reward fake at {liar.url}: it scores random picture 1 as 0.999, the known servers as 0.5"
    assert expected in record.getMessage()


def test_every_client_asks_other_pictures_with_a_prompt_of_the_run(servers: list[FakeServer]) -> None:
    server, newcomer, other = servers
    control = ControlRequest("a red cat", {"count": 1})
    for _ in range(2):
        with client_at(server.url, controls={"fake": control}) as client:
            client.offer("fake", [newcomer.url, other.url])
    requests = [ScoreRequest.from_bytes(body) for body in newcomer.introductions]
    assert newcomer.introductions == other.introductions == server.introductions
    assert [list(request.prompts) for request in requests] == [["a red cat"] * 2] * 2
    assert list(requests[0].metadata) == [{"count": 1}] * 2
    assert not np.array_equal(requests[0].images_BHWC, requests[1].images_BHWC)


@pytest.mark.parametrize(
    ("ends", "known", "found", "joins"),
    [
        ((0.0, 1.0), 0.5, 0.509, True),
        ((0.0, 1.0), 0.5, 0.511, False),
        ((-100.0, 100.0), 0.5, 2.4, True),
        ((-100.0, 100.0), 0.5, 2.6, False),
        ((-math.inf, math.inf), 0.5, 0.509, True),
        ((-math.inf, math.inf), 0.5, 0.511, False),
        ((-math.inf, math.inf), 500.0, 504.0, True),
        ((-math.inf, math.inf), 500.0, 506.0, False),
    ],
)
def test_answers_agree_within_a_hundredth_of_the_range(
    servers: list[FakeServer], ends: tuple[float, float], known: float, found: float, joins: bool
) -> None:
    server, newcomer, _ = servers
    server.info = newcomer.info = ServerInfo(**(vars(INFO) | {"low": ends[0], "high": ends[1]}))
    answers(server, known, known)
    answers(newcomer, known, found)
    with client_at(server.url) as client:
        client.offer("fake", [newcomer.url])
        assert (newcomer.url in client.states("fake")) == joins


def test_without_a_known_server_an_answer_has_to_be_in_range(servers: list[FakeServer]) -> None:
    one, other, _ = servers
    answers(one, 1.5, 0.5)
    answers(other, 0.25, 0.75)
    with client_at(discovered=["fake"], attempts=1) as client:
        client.offer("fake", [one.url])
        with pytest.raises(RewardUnavailable, match="no usable server is registered"):
            client.verify("fake")
        client.offer("fake", [one.url, other.url])
        assert list(client.states("fake")) == [other.url]
        client.verify("fake")
        assert client.reference("fake").scores == (0.25, 0.75)
    assert one.bodies == []


def test_of_two_registered_servers_that_answer_differently_none_is_taken_for_the_reward(
    servers: list[FakeServer],
) -> None:
    one, other, _ = servers
    answers(other, 0.9, 0.9)
    with client_at(discovered=["fake"]) as client:
        client.offer("fake", [one.url, other.url])
        with pytest.raises(RewardInvalid, match=r"it scores random picture 1 as 0\.[59], the known servers as"):
            client.verify("fake")


def test_a_newcomer_waits_until_a_known_server_can_be_compared_with(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    server, newcomer, _ = servers
    fails(server)
    with client_at(server.url) as client:
        for _ in range(3):
            client.offer("fake", [newcomer.url])
            assert list(client.states("fake")) == [server.url]
        assert ["no known server answers to compare" in record.getMessage() for record in caplog.records] == [True]
        answers(server, 0.5, 0.5)
        client.offer("fake", [newcomer.url])
        assert list(client.states("fake")) == [server.url, newcomer.url]
    assert len(newcomer.introductions) == 1


def test_answers_of_the_runs_start_stand_for_a_server_that_is_gone(servers: list[FakeServer]) -> None:
    _, liar, newcomer = servers
    answers(liar, 0.6, 0.5)
    with closed_url() as gone:
        references = {"fake": Reference(3, (0.5, 0.5))}
        with client_at(gone, infos={"fake": INFO}, references=references) as client:
            client.offer("fake", [liar.url, newcomer.url])
            assert list(client.states("fake")) == [gone, newcomer.url]
            is_answered(client)
    asked = ScoreRequest.from_bytes(newcomer.introductions[0]).images_BHWC
    np.testing.assert_array_equal(asked, random_pictures_BHWC(3))


def test_the_answers_of_a_run_are_asked_of_a_known_server(
    servers: list[FakeServer], caplog: pytest.LogCaptureFixture
) -> None:
    server, twin, _ = servers
    fails(server)
    answers(twin, 0.25, 0.75)
    with client_at(server.url, twin.url) as client:
        assert client.reference("fake").scores == (0.25, 0.75)
        assert client.reference("fake") is client.reference("fake")
        assert len(twin.introductions) == 1
    with client_at(server.url) as client:
        assert client.reference("fake") is None
    assert "registered servers cannot be compared with this one" in caplog.text


def test_a_newcomer_without_an_answer_is_asked_again_after_a_while(servers: list[FakeServer]) -> None:
    server, newcomer, _ = servers
    fails(newcomer)
    time = Time()
    with client_at(server.url, timing=time.timing()) as client:
        for count in (1, 2):
            for _ in range(3):
                client.offer("fake", [newcomer.url])
            assert (len(newcomer.introductions), list(client.states("fake"))) == (count, [server.url])
            time.now += REFUSED_FOR_S
        answers(newcomer, 0.5, 0.5)
        client.offer("fake", [newcomer.url])
        assert list(client.states("fake")) == [server.url, newcomer.url]


def test_a_server_that_cannot_even_be_asked_hides_no_other(
    servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, odd, newcomer = servers
    original = RewardIdentities.declared

    def declared(self: RewardIdentities, exchange: Exchange) -> ServerInfo:
        if exchange.url == odd.url:
            raise UnicodeError("odd host")
        return original(self, exchange)

    monkeypatch.setattr(RewardIdentities, "declared", declared)
    with client_at(server.url) as client:
        for _ in range(2):
            client.offer("fake", sorted([odd.url, newcomer.url]))
        assert set(client.states("fake")) == {server.url, newcomer.url}
    assert [f"{odd.url}: it cannot be asked: odd host" in record.getMessage() for record in caplog.records] == [True]


def test_a_newcomer_that_hangs_delays_no_other(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it waited for, its check would fail after its timeout, and it would not join below."""
    server, newcomer, hung = servers
    monkeypatch.setattr(newcomers, "LOOK_S", 0.1)
    hung.answering.clear()
    with client_at(server.url, timeout_s=60.0) as client:

        def joined(*urls: str) -> bool:
            client.offer("fake", [hung.url, newcomer.url])
            return set(client.states("fake")) == set(urls)

        wait_until(lambda: joined(server.url, newcomer.url))
        is_answered(client, 1)
        hung.answering.set()
        wait_until(lambda: joined(server.url, newcomer.url, hung.url))
    assert hung.looks == 1


def test_a_first_server_is_waited_for(servers: list[FakeServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the usual wait: a run without any server cannot start."""
    server, hung, _ = servers
    monkeypatch.setattr(newcomers, "LOOK_S", 0.0)
    hung.answering.clear()
    with client_at(discovered=["fake"], timeout_s=60.0) as client:
        client.offer("fake", [hung.url, server.url])
        assert list(client.states("fake")) == [server.url]


def test_the_token_goes_to_no_server_that_was_only_heard_of(servers: list[FakeServer]) -> None:
    server, stranger, signed = servers
    with client_at(server.url, token="0123456789abcdef") as client:
        client.offer("fake", [stranger.url])
        client.offer("fake", [stranger.url, signed.url], signed=False)
        assert stranger.authorizations == signed.authorizations == {None}
        client.offer("fake", [])
    with client_at(server.url, token="0123456789abcdef") as client:
        client.offer("fake", [signed.url], signed=True)
        is_answered(client)
    assert stranger.authorizations == {None}
    assert server.authorizations == {"Bearer 0123456789abcdef"}
    assert signed.authorizations == {None, "Bearer 0123456789abcdef"}

"""The client and several servers of one reward: who is asked, who is left alone, who may join."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from common.errors import RewardError, RewardInvalid, RewardUnavailable
from common.rewards import client as reward_client
from common.rewards.answers import check_answer
from common.rewards.api import ServerInfo
from common.rewards.breaker import FAILURES_TO_OPEN, BreakerState
from common.rewards.client import RewardClient
from common.rewards.newcomers import REFUSED_FOR_S
from tests.helpers.fake_reward_server import (
    GOOD,
    IMAGES,
    INFO,
    PROMPTS,
    SCORES,
    STRANGER,
    FakeServer,
    Reply,
    Time,
    client_at,
    closed_url,
    error_body,
    fake_server,
)

BROKEN = (500, error_body("scorer"))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


@pytest.fixture
def twin() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


@pytest.fixture
def stranger() -> Iterator[FakeServer]:
    with fake_server(STRANGER) as fake:
        yield fake


def is_answered(client: RewardClient) -> None:
    np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)


def test_a_request_goes_to_the_server_with_fewest_under_way(
    server: FakeServer, twin: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once: the second must go to the other server, whichever the draw prefers."""
    both = threading.Barrier(2)

    def meet(*arguments: object) -> None:
        both.wait(timeout=30)
        check_answer(*arguments)

    monkeypatch.setattr(reward_client, "check_answer", meet)
    with client_at(server.url, twin.url, timing=Time().timing(draw=lambda: 0.0)) as client:
        client.info("fake")
        asking = [threading.Thread(target=client.score, args=(IMAGES, PROMPTS)) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert (len(server.bodies), len(twin.bodies)) == (1, 1)


@pytest.mark.parametrize("reply", [BROKEN, (200, b"junk"), (401, b""), None])
def test_another_server_answers_for_one_that_fails(server: FakeServer, twin: FakeServer, reply: Reply) -> None:
    """Whichever of the two is asked first, every question is answered."""
    server.replies = [reply]
    with client_at(server.url, twin.url, timing=Time().timing(draw=random.Random(0).random)) as client:
        for _ in range(6):
            is_answered(client)
    assert 1 <= len(server.bodies) <= FAILURES_TO_OPEN
    assert len(twin.bodies) == 6


def test_a_server_that_keeps_failing_is_not_asked_for_a_while(server: FakeServer) -> None:
    server.replies = [(200, b"junk")]
    time = Time()
    with client_at(server.url, attempts=1, timing=time.timing()) as client:
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(RewardInvalid):
                client.score(IMAGES, PROMPTS)
        with pytest.raises(RewardUnavailable, match="every server failed a moment ago") as caught:
            client.score(IMAGES, PROMPTS)
        assert caught.value.cause == "circuit_open"
        assert len(server.bodies) == FAILURES_TO_OPEN
        assert client.states("fake") == {server.url: BreakerState.OPEN}
        server.replies = [(200, GOOD)]
        time.now += client.seconds_to_probe("fake")
        is_answered(client)
        assert client.states("fake") == {server.url: BreakerState.CLOSED}


def test_a_rejection_opens_no_breaker(server: FakeServer) -> None:
    server.replies = [(422, error_body("request"))]
    with client_at(server.url, attempts=1) as client:
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(RewardError):
                client.score(IMAGES, PROMPTS)
    assert len(server.bodies) == 2 * FAILURES_TO_OPEN


# ── one of two is dead ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dead_twin_costs_no_question_and_no_repetition_however_long(server: FakeServer) -> None:
    """A client has no repetitions to spare for a replica that stays away: its questions would be lost with them."""
    time = Time()
    timing = time.timing(draw=random.Random(0).random)
    with closed_url() as dead, client_at(server.url, dead, attempts=1, timing=timing) as client:
        for _ in range(100):
            is_answered(client)
            time.now += 3.0
        assert client.states("fake")[server.url] is BreakerState.CLOSED
        assert client.states("fake")[dead] is not BreakerState.CLOSED
    assert len(server.bodies) == 100
    assert time.pauses == []


def test_a_trial_that_fails_costs_no_repetition(server: FakeServer, twin: FakeServer) -> None:
    """The twin says who it is and then fails: each of its trials is a question, which the other server answers."""
    time = Time()
    with client_at(server.url, twin.url, attempts=1, timing=time.timing()) as client:
        client.verify("fake")
        twin.replies = [BROKEN]
        breaker = client._replicas["fake"].of_url(twin.url).breaker
        breaker.failed(certain=True)
        for _ in range(20):
            time.now += 10.0
            assert breaker.begin_check()
            breaker.checked(True)
            is_answered(client)
            assert breaker.state is BreakerState.OPEN
    assert (len(server.bodies), len(twin.bodies)) == (20, 20)
    assert time.pauses == []


def test_a_server_is_checked_before_a_question_is_risked_on_it(server: FakeServer) -> None:
    time = Time()
    with client_at(server.url, attempts=1, timing=time.timing()) as client:
        is_answered(client)
        client._replicas["fake"].of_url(server.url).breaker.failed(certain=True)
        server.info = STRANGER  # started again with other weights
        for _ in range(3):
            time.now += 10.0
            with pytest.raises(RewardUnavailable, match="every server failed"):
                client.score(IMAGES, PROMPTS)
        server.info = INFO
        time.now += 10.0
        is_answered(client)
    assert len(server.bodies) == 2


# ── who belongs to a reward ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_of_other_weights_is_never_believed(server: FakeServer, stranger: FakeServer) -> None:
    expected = rf"{stranger.url}: weights_hash is 'other', in this run it is 'hash' \(declared by {server.url}\)"
    with client_at(server.url, stranger.url) as client, pytest.raises(RewardInvalid, match=expected):
        client.verify("fake")
    with client_at(stranger.url, attempts=1, infos={"fake": INFO}) as client, pytest.raises(RewardInvalid) as caught:
        client.score(IMAGES, PROMPTS)
    assert caught.value.cause == "weights_changed"
    assert stranger.bodies == []


@pytest.mark.parametrize("change", [{"implementation": "geneval:Parts"}, {"low": -1.0}, {"reproducible": True}])
def test_the_recipe_the_range_and_the_manner_belong_to_the_identity(
    server: FakeServer, twin: FakeServer, change: dict[str, object]
) -> None:
    twin.info = ServerInfo(**(vars(INFO) | change))
    (field,) = change
    with client_at(server.url, twin.url) as client, pytest.raises(RewardInvalid, match=f"{field} is .*, in this run"):
        client.verify("fake")


def test_one_answering_server_is_enough_to_start(server: FakeServer) -> None:
    with closed_url() as dead:
        with client_at(dead, server.url) as client:
            assert client.verify("fake") == INFO
        with client_at(dead) as client, pytest.raises(RewardUnavailable, match="is the server running"):
            client.verify("fake")


def test_registered_servers_join_and_leave_but_never_all(
    server: FakeServer, twin: FakeServer, stranger: FakeServer
) -> None:
    with client_at(attempts=1, discovered=["fake"]) as client:
        with pytest.raises(RewardUnavailable, match="no usable server is registered under that name") as caught:
            client.score(IMAGES, PROMPTS)
        assert caught.value.cause == "no_server"
        client.offer("fake", [server.url + "/"])
        is_answered(client)
        client.offer("fake", [server.url, twin.url, stranger.url, "nonsense", "http://host:port/"])
        assert list(client.states("fake")) == [server.url, twin.url]
        client.offer("fake", [twin.url])
        assert list(client.states("fake")) == [twin.url]
        client.offer("fake", [])
        assert list(client.states("fake")) == [twin.url]


def test_of_two_registered_servers_that_differ_none_is_taken_for_the_reward(
    server: FakeServer, stranger: FakeServer
) -> None:
    with client_at(discovered=["fake"]) as client:
        client.offer("fake", [server.url, stranger.url])
        with pytest.raises(RewardInvalid, match=r"weights_hash is '(hash|other)', in this run it is") as caught:
            client.verify("fake")
    assert server.url in str(caught.value)
    assert stranger.url in str(caught.value)


def test_servers_of_another_precision_are_no_replicas(server: FakeServer) -> None:
    with fake_server(replace(INFO, precision="bfloat16")) as half, client_at(server.url) as client:
        client.verify("fake")
        client.offer("fake", [half.url])
        assert list(client.states("fake")) == [server.url]
    with (
        fake_server(replace(INFO, precision="bfloat16")) as half,
        client_at(server.url, half.url) as client,
        pytest.raises(RewardInvalid, match="precision is 'bfloat16', in this run it is 'float32'"),
    ):
        client.verify("fake")


def test_a_registered_server_does_not_say_what_a_reward_of_the_run_file_is(
    server: FakeServer, stranger: FakeServer
) -> None:
    with client_at(server.url) as client:
        client.offer("fake", [stranger.url])
        assert list(client.states("fake")) == [server.url]
        assert client.verify("fake") == INFO


def test_a_refusal_is_remembered_for_a_while_and_said_once(
    server: FakeServer, stranger: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    with client_at(server.url, timing=time.timing()) as client:
        for looks in (1, 2, 3):
            for _ in range(5):
                client.offer("fake", [stranger.url])
            assert stranger.looks == looks
            time.now += REFUSED_FOR_S
        assert len(caplog.records) == 1
        stranger.info = INFO
        client.offer("fake", [stranger.url])
        assert list(client.states("fake")) == [server.url, stranger.url]

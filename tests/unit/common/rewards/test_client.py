"""The client against one server that answers anything but what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from common.errors import (
    ConfigError,
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
)
from common.rewards.answers import outside_range
from common.rewards.api import INFO_PATH, GradientResponse, ScoreRequest, ScoreResponse, ServerInfo
from common.rewards.breaker import FAILURES_TO_OPEN, BreakerState
from common.rewards.client import RewardClient, RewardEndpoint, ScoreQuestion
from common.rewards.control_request import ControlRequest
from common.rewards.retry_budget import RETRY_RESERVE, RETRY_SHARE
from tests.helpers.fake_reward_server import (
    GOOD,
    IMAGES,
    INFO,
    PIXELS,
    PROMPTS,
    SCORES,
    FakeServer,
    Reply,
    Time,
    client_at,
    closed_url,
    error_body,
    fake_server,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


def score_fails(client: RewardClient, kind: type[RewardError], cause: str) -> RewardError:
    with client, pytest.raises(kind) as caught:
        client.score(IMAGES, PROMPTS)
    assert (caught.value.reward, caught.value.cause) == ("fake", cause)
    return caught.value


def test_scores_come_back_by_name(server: FakeServer) -> None:
    with client_at(server.url, token="secret") as client:
        scores = client.score(IMAGES, PROMPTS, [{"n": 1}, {"n": 2}])
    np.testing.assert_array_equal(scores["fake"], SCORES)
    assert ScoreRequest.from_bytes(server.bodies[0]).metadata == [{"n": 1}, {"n": 2}]
    assert server.authorization == "Bearer secret"


def test_all_rewards_are_asked_or_only_those_named(server: FakeServer) -> None:
    endpoints = [RewardEndpoint(name, server.url + "/") for name in ("one", "two")]
    with RewardClient(endpoints, 5.0, 1) as client:
        assert sorted(client.score(IMAGES, PROMPTS)) == ["one", "two"]
        assert list(client.score(IMAGES, PROMPTS, names=["two"])) == ["two"]
        with pytest.raises(RewardRejected, match="no server for the reward 'three'"):
            client.score(IMAGES, PROMPTS, names=["three"])


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"junk", "wire"),
        (GOOD[:-1], "wire"),
        (b"\x80", "answer"),
        (ScoreResponse("fake", "hash", SCORES[:1]).to_bytes(), "count"),
        (ScoreResponse("fake", "hash", SCORES + 1).to_bytes(), "range"),
        (ScoreResponse("fake", "other", SCORES).to_bytes(), "weights_changed"),
        (GOOD.replace(SCORES.tobytes(), np.array([0.25, np.nan], np.float32).tobytes()), "nan"),
    ],
)
def test_a_wrong_answer_is_an_error_and_not_asked_for_again(server: FakeServer, body: bytes, cause: str) -> None:
    server.replies = [(200, body)]
    error = score_fails(client_at(server.url), RewardInvalid, cause)
    assert len(server.bodies) == 1
    assert server.url in str(error)
    assert error.url == server.url


def test_rounding_may_touch_the_declared_range(server: FakeServer) -> None:
    server.replies = [(200, ScoreResponse("fake", "hash", np.array([1.00001, 0], np.float32)).to_bytes())]
    with client_at(server.url) as client:
        assert client.score(IMAGES, PROMPTS)["fake"][0] > 1


@pytest.mark.parametrize(
    ("low", "high", "score", "inside"),
    [
        (0.0, np.inf, 1e9, True),
        (0.0, np.inf, -0.01, False),
        (-np.inf, 5.0, -1e9, True),
        (-np.inf, 5.0, 5.01, False),
        (-np.inf, 5.0, 5.0001, True),
        (-np.inf, np.inf, 1e30, True),
        (0.0, 1.0, 1.001, False),
    ],
)
def test_of_a_half_open_range_the_finite_end_holds(low: float, high: float, score: float, inside: bool) -> None:
    info = ServerInfo("fake", "1", "hash", True, low, high, "1")
    assert (outside_range(np.array([score], np.float32), info) is None) == inside


@pytest.mark.parametrize(
    ("status", "body", "kind", "cause"),
    [
        (400, error_body("wire"), RewardRejected, "wire"),
        (422, error_body("request"), RewardRejected, "request"),
        (413, error_body("too_large"), RewardRejected, "too_large"),
        (415, error_body("encoding"), RewardRejected, "encoding"),
        (500, error_body("nan"), RewardInvalid, "nan"),
    ],
)
def test_what_another_try_cannot_cure_is_not_tried_again(
    server: FakeServer, status: int, body: bytes, kind: type[RewardError], cause: str
) -> None:
    server.replies = [(status, body)]
    score_fails(client_at(server.url), kind, cause)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ((500, error_body("scorer")), "scorer"),
        ((502, b"<html>"), "answer"),
        (None, "disconnected"),
        ((301, b""), "answer"),
        ((401, error_body("unauthorized")), "unauthorized"),
        ((403, b"<html>"), "answer"),
        ((404, b"<html>"), "not_found"),
        ((408, b""), "answer"),
        ((400, error_body("made up")), "answer"),
        ((413, b"<html> nginx"), "answer"),
        ((422, error_body("nan")), "nan"),
    ],
)
def test_anything_else_is_the_servers_failure_and_tried_again_within_bounds(
    server: FakeServer, reply: Reply, cause: str
) -> None:
    time = Time()
    server.replies = [reply]
    with client_at(server.url, timing=time.timing()) as client:
        with pytest.raises(RewardUnavailable) as caught:
            client.score(IMAGES, PROMPTS)
        assert client.states("fake") == {server.url: BreakerState.OPEN}
    assert caught.value.cause == cause
    assert len(server.bodies) == FAILURES_TO_OPEN
    assert len(time.pauses) == 2
    server.replies = [reply, (200, GOOD)]
    with client_at(server.url) as client:
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)


def test_a_token_that_is_not_taken_names_the_remedy(server: FakeServer) -> None:
    server.replies = [(401, error_body("unauthorized"))]
    error = score_fails(client_at(server.url), RewardUnavailable, "unauthorized")
    assert "set REWARD_SERVER_TOKEN" in str(error)


def test_a_dead_server_is_refused_and_left_alone_at_once() -> None:
    time = Time()
    with closed_url() as url, client_at(url, timing=time.timing()) as client:
        with pytest.raises(RewardUnavailable, match="is the server running") as caught:
            client.score(IMAGES, PROMPTS)
        assert client.states("fake") == {url: BreakerState.OPEN}
    assert caught.value.cause == "refused"
    assert time.pauses == []


# ── a full queue ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_is_waited_out_as_long_as_it_says(server: FakeServer) -> None:
    time = Time()
    server.headers = {"retry-after": "3"}
    server.replies = [(429, error_body("overloaded"))] * 6 + [(200, GOOD)]
    with client_at(server.url, attempts=2, timeout_s=60.0, timing=time.timing()) as client:
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        assert client.states("fake") == {server.url: BreakerState.CLOSED}
    assert len(time.pauses) == 6
    assert min(time.pauses) >= 3.0
    # Beyond the budget of repetitions at the slowest pace.
    assert time.pauses[-1] == 8.0


def test_a_queue_that_stays_full_is_given_up_at_the_deadline(server: FakeServer) -> None:
    time = Time()
    server.headers = {"retry-after": "1e9"}
    server.replies = [(429, error_body("overloaded"))]
    score_fails(client_at(server.url, attempts=2, timeout_s=60.0, timing=time.timing()), RewardOverloaded, "overloaded")
    assert 60.0 < time.now < 120.0
    assert all(30.0 <= pause <= 35.0 for pause in time.pauses)


def test_repetitions_stay_within_the_budget_of_the_client(server: FakeServer) -> None:
    questions = 60
    server.replies = [reply for _ in range(questions) for reply in ((500, error_body("scorer")), (200, GOOD))]
    answered = 0
    with client_at(server.url, attempts=2) as client:
        for _ in range(questions):
            with suppress(RewardUnavailable):
                client.score(IMAGES, PROMPTS)
                answered += 1
    assert answered > 0
    assert len(server.bodies) <= questions * (1 + RETRY_SHARE) + RETRY_RESERVE


def test_asking_again_earns_nothing(server: FakeServer) -> None:
    """A question that is held and asked a hundred times is still one question."""
    questions = 40
    server.replies = [(500, error_body("scorer")), (200, GOOD)] * questions
    question = ScoreQuestion.of(IMAGES, PROMPTS, None)
    with client_at(server.url, attempts=2) as client:
        for _ in range(questions):
            with suppress(RewardUnavailable):
                client.score_one("fake", question, again=True)
    assert len(server.bodies) == questions + RETRY_RESERVE


def test_a_question_ends_at_its_deadline_however_long_a_sleep_lasted(server: FakeServer) -> None:
    server.replies = [(500, error_body("scorer"))]

    class Sleepy(Time):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds + 100)

    time = Sleepy()
    score_fails(client_at(server.url, timing=time.timing()), RewardUnavailable, "scorer")
    assert len(server.bodies) == 1


# ── what is refused before it is asked ───────────────────────────────────────────────────────────────────────────────


def test_the_first_failure_wins_and_nothing_partial_is_returned(server: FakeServer) -> None:
    with fake_server() as broken:
        broken.replies = [(500, error_body("nan"))]
        endpoints = [RewardEndpoint("good", server.url), RewardEndpoint("bad", broken.url)]
        with RewardClient(endpoints, 5.0, 1) as client, pytest.raises(RewardInvalid) as caught:
            client.score(IMAGES, PROMPTS)
    assert caught.value.reward == "bad"


def test_info_is_asked_once(server: FakeServer) -> None:
    with client_at(server.url) as client:
        assert client.info("fake") == INFO
        server.info = ServerInfo("fake", "2", "other", True, 0.0, 1.0, "1")
        assert client.info("fake") == INFO


@pytest.mark.parametrize(
    ("gradients", "scores", "cause"),
    [(PIXELS[..., :2], SCORES, "shape"), (PIXELS[:1], SCORES[:1], "count")],
)
def test_wrong_gradients_are_invalid(server: FakeServer, gradients: np.ndarray, scores: np.ndarray, cause: str) -> None:
    server.replies = [(200, GradientResponse("fake", "hash", scores, np.ascontiguousarray(gradients)).to_bytes())]
    with client_at(server.url) as client, pytest.raises(RewardInvalid) as caught:
        client.gradient("fake", PIXELS, PROMPTS)
    assert caught.value.cause == cause


def test_only_a_differentiable_reward_has_a_gradient(server: FakeServer) -> None:
    server.info = ServerInfo("fake", "1", "hash", False, 0.0, 1.0, "1")
    with client_at(server.url) as client, pytest.raises(RewardRejected) as caught:
        client.gradient("fake", PIXELS, PROMPTS)
    assert caught.value.cause == "not_differentiable"
    assert server.bodies == []


def test_a_bad_request_never_leaves(server: FakeServer) -> None:
    calls: list[Callable[[RewardClient], object]] = [
        lambda client: client.score(IMAGES, ["only one"]),
        lambda client: client.score(IMAGES, PROMPTS, [{"x": object()}, {}]),
        lambda client: client.gradient("fake", PIXELS + 2, PROMPTS),
    ]
    with client_at(server.url) as client:
        for call in calls:
            with pytest.raises(RewardRejected):
                call(client)
    assert server.bodies == []


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/", "http://", "http://host:port/", INFO_PATH])
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=r"URL|its port"):
        RewardClient([RewardEndpoint("fake", url)], 1.0, 1)


# ── a control request, sent to one server ─────────────────────────────────────────────────────────────────────────────


def test_an_answered_control_request_makes_its_server_healthy(server: FakeServer) -> None:
    """Failures opened its breaker, but the requests were at fault."""
    control = ControlRequest("a dot", {"count": 1})
    server.replies = [(500, error_body("scorer"))]
    with client_at(server.url) as client:
        with pytest.raises(RewardUnavailable):
            client.score(IMAGES, PROMPTS)
        assert client.states("fake") == {server.url: BreakerState.OPEN}
        server.replies = [(200, ScoreResponse("fake", "hash", SCORES[:1]).to_bytes())]
        client.send_control("fake", control, url=server.url)
        assert client.states("fake") == {server.url: BreakerState.CLOSED}
        with pytest.raises(RewardUnavailable, match="is no longer registered"):
            client.send_control("fake", control, url="http://elsewhere")
    sent = ScoreRequest.from_bytes(server.bodies[-1])
    assert (sent.prompts, sent.metadata, sent.images_BHWC.shape) == (["a dot"], [{"count": 1}], (1, 64, 64, 3))

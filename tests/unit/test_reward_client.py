"""The client against servers that answer anything but what they should."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from common.circuit_breaker import FAILURES_TO_OPEN, BreakerState
from common.errors import (
    ConfigError,
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
    StoreError,
)
from common.retry_budget import RETRY_RESERVE, RETRY_SHARE, Timing
from common.reward_api import INFO_PATH, GradientResponse, ScoreRequest, ScoreResponse, ServerInfo
from common.reward_client import RewardClient, RewardEndpoint
from common.reward_http import Exchange
from common.store import ScoreCache

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
PIXELS = np.zeros((2, 3, 4, 4), np.float32)
PROMPTS = ["a", "b"]
SCORES = np.array([0.25, 0.5], np.float32)
INFO = ServerInfo("fake", "1", "hash", True, 0.0, 1.0, "1")
GOOD = ScoreResponse("fake", "hash", SCORES).to_bytes()

Reply = tuple[int, bytes] | None


class FakeServer:
    """Answers /v1/info truthfully and everything else with `replies`, in turn, the last one for ever."""

    def __init__(self, info: ServerInfo = INFO) -> None:
        self.info = info
        self.replies: list[Reply] = [(200, GOOD)]
        self.bodies: list[bytes] = []
        self.authorization: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, outer.info.to_json())

            def do_POST(self) -> None:
                outer.authorization = self.headers.get("authorization")
                outer.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                if reply is None:
                    self.close_connection = True
                else:
                    self.reply(*reply)

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def pauses() -> list[float]:
    """Back-off, recorded instead of slept."""
    return []


@pytest.fixture
def timing(pauses: list[float]) -> Timing:
    return Timing(sleep=pauses.append)


def client_of(server: FakeServer, attempts: int = 3, timeout_s: float = 5.0, token: str | None = None) -> RewardClient:
    return RewardClient(
        [RewardEndpoint("fake", server.url)], timeout_s, attempts, token, timing=Timing(sleep=lambda _: None)
    )


def error_body(cause: str) -> bytes:
    return json.dumps({"error": cause, "message": "details"}).encode()


def score_fails(client: RewardClient, kind: type[RewardError], cause: str) -> RewardError:
    with client, pytest.raises(kind) as caught:
        client.score(IMAGES, PROMPTS)
    assert (caught.value.reward, caught.value.cause) == ("fake", cause)
    return caught.value


def test_scores_come_back_by_name(server: FakeServer) -> None:
    with client_of(server, token="secret") as client:
        scores = client.score(IMAGES, PROMPTS, [{"n": 1}, {"n": 2}])
    np.testing.assert_array_equal(scores["fake"], SCORES)
    assert ScoreRequest.from_bytes(server.bodies[0]).metadata == [{"n": 1}, {"n": 2}]
    assert server.authorization == "Bearer secret"


def test_all_rewards_are_asked_or_only_those_named(server: FakeServer) -> None:
    endpoints = [RewardEndpoint(name, server.url + "/") for name in ("one", "two")]
    with RewardClient(endpoints, 5.0, 1) as client:
        assert sorted(client.score(IMAGES, PROMPTS)) == ["one", "two"]
        assert list(client.score(IMAGES, PROMPTS, names=["two"])) == ["two"]
        with pytest.raises(RewardRejected, match="nobody serves a reward 'three'"):
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
    error = score_fails(client_of(server), RewardInvalid, cause)
    assert len(server.bodies) == 1
    assert server.url in str(error)


def test_rounding_may_touch_the_declared_range(server: FakeServer) -> None:
    server.replies = [(200, ScoreResponse("fake", "hash", np.array([1.00001, 0], np.float32)).to_bytes())]
    with client_of(server) as client:
        assert client.score(IMAGES, PROMPTS)["fake"][0] > 1


@pytest.mark.parametrize(
    ("status", "body", "kind", "cause"),
    [
        (422, error_body("request"), RewardRejected, "request"),
        (413, error_body("too_large"), RewardRejected, "too_large"),
        (401, error_body("unauthorized"), RewardRejected, "unauthorized"),
        (404, b"<html>", RewardRejected, "not_found"),
        (400, error_body("made up"), RewardRejected, "answer"),
        (500, error_body("nan"), RewardInvalid, "nan"),
    ],
)
def test_what_another_try_cannot_cure_is_not_tried_again(
    server: FakeServer, status: int, body: bytes, kind: type[RewardError], cause: str
) -> None:
    server.replies = [(status, body)]
    score_fails(client_of(server), kind, cause)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "cause"),
    [
        ((500, error_body("scorer")), RewardUnavailable, "scorer"),
        ((502, b"<html>"), RewardUnavailable, "answer"),
        ((429, error_body("overloaded")), RewardOverloaded, "overloaded"),
        (None, RewardUnavailable, "disconnected"),
    ],
)
def test_what_another_try_may_cure_is_tried_within_bounds(
    server: FakeServer, pauses: list[float], timing: Timing, reply: Reply, kind: type[RewardError], cause: str
) -> None:
    server.replies = [reply]
    score_fails(RewardClient([RewardEndpoint("fake", server.url)], 5.0, 3, timing=timing), kind, cause)
    assert len(server.bodies) == 3
    assert len(pauses) == 2
    server.replies = [reply, (200, GOOD)]
    with client_of(server) as client:
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)


def test_a_dead_server_is_refused(pauses: list[float], timing: Timing) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        client = RewardClient(
            [RewardEndpoint("fake", f"http://127.0.0.1:{held.getsockname()[1]}")], 5.0, 3, timing=timing
        )
        error = score_fails(client, RewardUnavailable, "refused")
    assert "is the server running" in str(error)
    assert len(pauses) == 2


def test_a_silent_server_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = RewardClient([RewardEndpoint("fake", url)], timeout_s=0.2, attempts=1)
        score_fails(client, RewardUnavailable, "timeout")


def test_a_server_that_drips_times_out() -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as dripping:

        def drip() -> None:
            connection, _ = dripping.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
                try:
                    while not stop.wait(0.01):
                        connection.sendall(b"x")
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        client = RewardClient(
            [RewardEndpoint("fake", f"http://127.0.0.1:{dripping.getsockname()[1]}")], timeout_s=0.3, attempts=1
        )
        score_fails(client, RewardUnavailable, "timeout")
        stop.set()
        thread.join()


def test_the_first_failure_wins_and_nothing_partial_is_returned(server: FakeServer) -> None:
    broken = FakeServer()
    broken.replies = [(500, error_body("nan"))]
    endpoints = [RewardEndpoint("good", server.url), RewardEndpoint("bad", broken.url)]
    with RewardClient(endpoints, 5.0, 1) as client, pytest.raises(RewardInvalid) as caught:
        client.score(IMAGES, PROMPTS)
    broken.close()
    assert caught.value.reward == "bad"


def test_info_is_asked_once(server: FakeServer) -> None:
    with client_of(server) as client:
        assert client.info("fake") == INFO
        server.info = ServerInfo("fake", "2", "other", True, 0.0, 1.0, "1")
        assert client.info("fake") == INFO


@pytest.mark.parametrize(
    ("gradients", "scores", "cause"),
    [(PIXELS[..., :2], SCORES, "shape"), (PIXELS[:1], SCORES[:1], "count")],
)
def test_wrong_gradients_are_invalid(server: FakeServer, gradients: np.ndarray, scores: np.ndarray, cause: str) -> None:
    server.replies = [(200, GradientResponse("fake", "hash", scores, np.ascontiguousarray(gradients)).to_bytes())]
    with client_of(server) as client, pytest.raises(RewardInvalid) as caught:
        client.gradient("fake", PIXELS, PROMPTS)
    assert caught.value.cause == cause


def test_only_a_differentiable_reward_has_a_gradient(server: FakeServer) -> None:
    server.info = ServerInfo("fake", "1", "hash", False, 0.0, 1.0, "1")
    with client_of(server) as client, pytest.raises(RewardRejected) as caught:
        client.gradient("fake", PIXELS, PROMPTS)
    assert caught.value.cause == "not_differentiable"
    assert server.bodies == []


def test_a_bad_request_never_leaves(server: FakeServer) -> None:
    calls: list[Callable[[RewardClient], object]] = [
        lambda client: client.score(IMAGES, ["only one"]),
        lambda client: client.score(IMAGES, PROMPTS, [{"x": object()}, {}]),
        lambda client: client.gradient("fake", PIXELS + 2, PROMPTS),
    ]
    with client_of(server) as client:
        for call in calls:
            with pytest.raises(RewardRejected):
                call(client)
    assert server.bodies == []


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/", "http://", "http://host:port/", INFO_PATH])
def test_a_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        RewardClient([RewardEndpoint("fake", url)], 1.0, 1)


# ── several servers of one reward ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def twin() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def pair_of(
    first: FakeServer, second: FakeServer, attempts: int = 2, draw: Callable[[], float] = lambda: 0.0
) -> RewardClient:
    endpoints = [RewardEndpoint("fake", first.url), RewardEndpoint("fake", second.url)]
    return RewardClient(endpoints, 5.0, attempts, timing=Timing(sleep=lambda _: None, draw=draw))


def test_a_request_goes_to_the_server_with_fewest_under_way(server: FakeServer, twin: FakeServer) -> None:
    """Two at once: the second must go to the other server, whichever the draw prefers."""
    both = threading.Barrier(2)

    class Meeting(RewardClient):
        def _check(self, exchange: Exchange, answer: ScoreResponse, count: int) -> None:
            both.wait(timeout=30)
            super()._check(exchange, answer, count)

    endpoints = [RewardEndpoint("fake", server.url), RewardEndpoint("fake", twin.url)]
    with Meeting(endpoints, 5.0, 1, timing=Timing(draw=lambda: 0.0)) as client:
        client.info("fake")
        asking = [threading.Thread(target=client.score, args=(IMAGES, PROMPTS)) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert (len(server.bodies), len(twin.bodies)) == (1, 1)


@pytest.mark.parametrize("reply", [(500, error_body("scorer")), (200, b"junk"), None])
def test_another_server_answers_for_one_that_fails(server: FakeServer, twin: FakeServer, reply: Reply) -> None:
    """Whichever of the two is asked first, every question is answered."""
    server.replies = [reply]
    with pair_of(server, twin, attempts=3, draw=random.Random(0).random) as client:
        for _ in range(6):
            np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
    assert 1 <= len(server.bodies) <= FAILURES_TO_OPEN
    assert len(twin.bodies) == 6


def test_a_server_that_keeps_failing_is_not_asked_for_a_while(server: FakeServer) -> None:
    server.replies = [(200, b"junk")]
    now = [0.0]
    timing = Timing(clock=lambda: now[0], sleep=lambda _: None, draw=lambda: 1.0)
    with RewardClient([RewardEndpoint("fake", server.url)], 5.0, 1, timing=timing) as client:
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(RewardInvalid):
                client.score(IMAGES, PROMPTS)
        with pytest.raises(RewardUnavailable, match="every server failed a moment ago") as caught:
            client.score(IMAGES, PROMPTS)
        assert caught.value.cause == "circuit_open"
        assert len(server.bodies) == FAILURES_TO_OPEN
        assert client.states("fake") == {server.url: BreakerState.OPEN}
        server.replies = [(200, GOOD)]
        now[0] += client.seconds_to_probe("fake")
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        assert client.states("fake") == {server.url: BreakerState.CLOSED}


@pytest.mark.parametrize("reply", [(422, error_body("request")), (429, error_body("overloaded"))])
def test_an_answer_that_refuses_a_request_opens_no_breaker(server: FakeServer, reply: Reply) -> None:
    server.replies = [reply]
    with client_of(server, attempts=1) as client:
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(RewardError):
                client.score(IMAGES, PROMPTS)
        assert len(server.bodies) == 2 * FAILURES_TO_OPEN


def test_repetitions_stay_within_the_budget_of_the_client(server: FakeServer) -> None:
    questions = 60
    server.replies = [reply for _ in range(questions) for reply in ((429, error_body("overloaded")), (200, GOOD))]
    answered = 0
    with client_of(server, attempts=2) as client:
        for _ in range(questions):
            with suppress(RewardOverloaded):
                client.score(IMAGES, PROMPTS)
                answered += 1
    assert answered > 0
    assert len(server.bodies) <= questions * (1 + RETRY_SHARE) + RETRY_RESERVE


def test_a_question_ends_at_its_deadline_however_long_a_sleep_lasted(server: FakeServer) -> None:
    server.replies = [(429, error_body("overloaded"))]
    now = [0.0]

    def oversleep(seconds: float) -> None:
        now[0] += seconds + 100

    timing = Timing(clock=lambda: now[0], sleep=oversleep)
    client = RewardClient([RewardEndpoint("fake", server.url)], 5.0, 3, timing=timing)
    with client, pytest.raises(RewardOverloaded):
        client.score(IMAGES, PROMPTS)
    assert len(server.bodies) == 1


def test_a_server_of_other_weights_is_never_believed(server: FakeServer, twin: FakeServer) -> None:
    twin.info = ServerInfo("fake", "1", "other", True, 0.0, 1.0, "1")
    twin.replies = [(200, ScoreResponse("fake", "other", SCORES).to_bytes())]
    with pair_of(server, twin) as client, pytest.raises(RewardInvalid, match="weights_hash is 'other', in this run"):
        client.verify("fake")
    standard = {"fake": INFO}
    with (
        RewardClient([RewardEndpoint("fake", twin.url)], 5.0, 1, infos=standard) as client,
        pytest.raises(RewardInvalid) as caught,
    ):
        client.score(IMAGES, PROMPTS)
    assert caught.value.cause == "weights_changed"
    assert twin.bodies == []


def test_registered_servers_join_and_leave_but_never_all(server: FakeServer, twin: FakeServer) -> None:
    stranger = FakeServer(ServerInfo("fake", "1", "other", True, 0.0, 1.0, "1"))
    with RewardClient([], 5.0, 1, discovered=["fake"]) as client:
        with pytest.raises(RewardUnavailable, match="no server of that name is registered") as caught:
            client.score(IMAGES, PROMPTS)
        assert caught.value.cause == "no_server"
        client.offer("fake", [server.url + "/"])
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        client.offer("fake", [server.url, twin.url, stranger.url, "nonsense"])
        assert list(client.states("fake")) == [server.url, twin.url]
        client.offer("fake", [twin.url])
        assert list(client.states("fake")) == [twin.url]
        client.offer("fake", [])
        assert list(client.states("fake")) == [twin.url]
    stranger.close()


def test_a_registered_server_does_not_say_what_a_reward_of_the_run_file_is(server: FakeServer) -> None:
    stranger = FakeServer(ServerInfo("fake", "1", "other", True, 0.0, 1.0, "1"))
    with client_of(server) as client:
        client.offer("fake", [stranger.url])
        assert list(client.states("fake")) == [server.url]
        assert client.info("fake") == INFO
    stranger.close()


class Cache(ScoreCache):
    """In memory; `broken` stands for a Redis that is away."""

    def __init__(self) -> None:
        self.entries: dict[str, np.ndarray] = {}
        self.broken = False

    def get(self, key: str) -> np.ndarray | None:
        if self.broken:
            raise StoreError("away")
        return self.entries.get(key)

    def put(self, key: str, scores_B: np.ndarray) -> None:
        if self.broken:
            raise StoreError("away")
        self.entries[key] = scores_B


def test_the_very_same_request_is_asked_once(server: FakeServer) -> None:
    cache = Cache()
    with RewardClient([RewardEndpoint("fake", server.url)], 5.0, 1, cache=cache) as client:
        for _ in range(2):
            np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        assert len(server.bodies) == 1
        client.score(IMAGES, ["a", "c"])
        client.score(IMAGES, PROMPTS, [{"x": 1}, {}])
        client.score(IMAGES + 1, PROMPTS)
        assert len(server.bodies) == len(cache.entries) == 4
        cache.broken = True
        client.score(IMAGES, PROMPTS)
        assert len(server.bodies) == 5


@pytest.mark.parametrize("damaged", [SCORES[:1], SCORES + 1, np.array([0.1, np.nan], np.float32)])
def test_a_damaged_entry_is_no_score(server: FakeServer, damaged: np.ndarray) -> None:
    cache = Cache()
    with RewardClient([RewardEndpoint("fake", server.url)], 5.0, 1, cache=cache) as client:
        client.score(IMAGES, PROMPTS)
        cache.entries = dict.fromkeys(cache.entries, damaged)
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
    assert len(server.bodies) == 2

"""The client against servers that answer anything but what they should."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
from common.retry_budget import Timing
from common.reward_api import INFO_PATH, GradientResponse, ScoreRequest, ScoreResponse, ServerInfo
from common.reward_client import RewardClient, RewardEndpoint

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

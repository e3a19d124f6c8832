"""The one deadline of an exchange, and what becomes of requests that take unusually long."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from common.errors import RewardUnavailable
from common.rewards import http as reward_http
from common.rewards import replicas as reward_replicas
from common.rewards.api import DEADLINE_HEADER, RUN_HEADER, SCORE_PATH
from common.rewards.breaker import FAILURES_TO_OPEN, BreakerState, CircuitBreaker
from common.rewards.client import ScoreQuestion
from common.rewards.http import Exchange, RewardHttp
from common.rewards.replicas import FEWEST, SLOW_FACTOR, SLOW_FLOOR_S, Replica, Request
from tests.helpers.fake_reward_server import GOOD, IMAGES, PROMPTS, SCORES, FakeServer, Time, client_at, fake_server

PATIENCE_S = 0.05


@contextmanager
def raw_server(behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[tuple[str, threading.Event]]:
    """A server that does with each connection what it is told; the event is set when a client has hung up."""
    stop, hung_up = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    behave(connection, stop)
                except OSError:
                    hung_up.set()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", hung_up
        finally:
            stop.set()
            with suppress(OSError):  # if no client came, the thread still waits for one
                socket.create_connection(listener.getsockname()).close()
            thread.join()


def drip(start: bytes, more: bytes) -> Callable[[socket.socket, threading.Event], None]:
    def behave(connection: socket.socket, stop: threading.Event) -> None:
        connection.sendall(start)
        while not stop.wait(0.01):
            connection.sendall(more)

    return behave


def swallow_slowly(connection: socket.socket, stop: threading.Event) -> None:
    """Takes a few bytes now and then, so that no single write ever waits for long; looks for the end after a while."""
    for _ in range(100):
        connection.recv(16)
        stop.wait(0.01)
    say_nothing(connection, stop)


def say_nothing(connection: socket.socket, stop: threading.Event) -> None:
    while not stop.is_set():
        if not connection.recv(65536):
            raise OSError("hung up")


@pytest.mark.parametrize(
    "behave",
    [
        say_nothing,
        drip(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\n", b"x-more: 1\r\n"),
        drip(b"HTTP", b"/"),
        swallow_slowly,
    ],
    ids=["silent", "dripping body", "dripping heads", "dripping status", "slow intake"],
)
def test_whatever_a_server_does_the_deadline_ends_it_and_closes_the_connection(
    behave: Callable[[socket.socket, threading.Event], None],
) -> None:
    http = RewardHttp(None)
    # More than the buffers between us hold, where that matters.
    body = bytes(2**25 if behave is swallow_slowly else 1)
    with raw_server(behave) as (url, hung_up):
        with pytest.raises(RewardUnavailable) as caught:
            http.post(Exchange("fake", url, timeout_s=1.0), SCORE_PATH, body, bytes)
        # A status line of slashes is no HTTP: refused before it is late.
        assert caught.value.cause in ("timeout", "disconnected")
        assert hung_up.wait(30)
    http.close()


MOVED = "HTTP/1.1 301 Moved Permanently\r\nlocation: https://name:secret@there/v1/score\r\n"
LARGE = "HTTP/1.1 413 Request Entity Too Large\r\n"
LONG = "HTTP/1.1 502 Bad Gateway\r\n"


@pytest.mark.parametrize(
    ("head", "page", "shown"),
    [
        (
            MOVED,
            "<html>\r\n<h1>301 Moved</h1>\r\n",
            "301 Moved: it redirects to https://there/v1/score: give the server's URL there",
        ),
        (LARGE, "<h1>Too Large</h1>", "Too Large: raise the proxy's limit for a request"),
        (LONG, "no upstream <a>\n\x1b[31m\u2028" + 9000 * "x", "no upstream <a> [31m " + 179 * "x"),
    ],
)
def test_a_page_of_a_proxy_is_told_in_one_line(head: str, page: str, shown: str) -> None:
    content = page.encode()

    def answer(connection: socket.socket, stop: threading.Event) -> None:
        connection.recv(65536)
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        stop.wait()

    http = RewardHttp(None)
    with raw_server(answer) as (url, _), pytest.raises(RewardUnavailable) as caught:
        http.post(Exchange("fake", url, timeout_s=30.0), SCORE_PATH, b"x", bytes)
    http.close()
    assert str(caught.value).endswith(f"(answer): {shown}")


def test_the_server_is_told_less_than_our_deadline() -> None:
    """So the server times out first, and its response shows that it is alive."""
    http = RewardHttp(None)
    assert http._headers(Exchange("fake", "http://host", timeout_s=60.0), None)[DEADLINE_HEADER] == "57"
    http.close()


@pytest.mark.parametrize("run", [None, "0123456789abcdef"])
def test_every_request_names_the_run(run: str | None) -> None:
    http = RewardHttp(None, run=run)
    assert http._headers(Exchange("fake", "http://host", timeout_s=60.0), b"").get(RUN_HEADER) == run
    http.close()


def test_closing_ends_what_is_under_way() -> None:
    with fake_server() as server, ThreadPoolExecutor() as threads:
        client = client_at(server.url, attempts=1, timeout_s=600.0)
        client.info("fake")
        server.answering.clear()
        question = ScoreQuestion.of(IMAGES, PROMPTS, None)
        asking = threads.submit(client.score_one, "fake", question)
        while not server.bodies:
            threading.Event().wait(0.001)
        client.close()
        assert isinstance(asking.exception(timeout=30), RewardUnavailable)


# ── unusually long ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """With little patience."""
    monkeypatch.setattr(reward_replicas, "SLOW_FLOOR_S", PATIENCE_S)
    with fake_server() as fake:
        yield fake


def test_a_server_that_hangs_opens_its_breaker_long_before_the_time_out(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nobody else asking, and a time-out that the test would not survive."""
    monkeypatch.setattr(reward_http, "IDENTITY_TIMEOUT_S", PATIENCE_S)
    with client_at(server.url, attempts=1, timeout_s=600.0) as client:
        client.info("fake")
        server.answering.clear()
        with pytest.raises(RewardUnavailable, match="it hangs") as caught:
            client.score(IMAGES, PROMPTS)
        assert caught.value.cause == "hung"
        assert client.states("fake") == {server.url: BreakerState.OPEN}


def test_another_server_answers_for_one_that_hangs(server: FakeServer) -> None:
    with fake_server() as twin, client_at(server.url, twin.url, attempts=2, timeout_s=600.0) as client:
        client.verify("fake")
        server.answering.clear()
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)


def test_a_slow_server_that_is_there_is_waited_for(server: FakeServer) -> None:
    """It says who it is while it computes; the answer comes late, and is taken."""

    class AfterThreeLooks(list):
        def __getitem__(self, index: int) -> object:
            while server.looks < 4:
                threading.Event().wait(0.001)
            return (200, GOOD)

    server.replies = AfterThreeLooks([(200, GOOD)])
    with client_at(server.url, attempts=1, timeout_s=600.0) as client:
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        assert client.states("fake") == {server.url: BreakerState.CLOSED}
    assert len(server.bodies) == 1


def ended(replica: Replica, time: Time, seconds: float, images: int = 2) -> None:
    with replica.use(images) as request:
        time.now += seconds
        if seconds > request.patience_s:
            request.overdue()


def test_what_is_unusual_depends_on_the_server_and_on_the_number_of_images() -> None:
    time = Time()
    replica = Replica("http://a", time.timing())
    with replica.use(16) as request:
        assert request.patience_s == SLOW_FLOOR_S
    for _ in range(FEWEST):
        ended(replica, time, seconds=4.0)
    with replica.use(2) as request:
        assert request.patience_s == SLOW_FACTOR * 4.0
    with replica.use(16) as request:
        assert request.patience_s == SLOW_FACTOR * 32.0


def test_a_server_ten_times_as_slow_as_usual_opens_its_breaker_until_that_is_usual() -> None:
    time = Time()
    replica = Replica("http://a", time.timing())
    for _ in range(20):
        ended(replica, time, seconds=0.5)
    for _ in range(FAILURES_TO_OPEN):
        assert replica.breaker.state is BreakerState.CLOSED
        ended(replica, time, seconds=5.0)
    assert replica.breaker.state is BreakerState.OPEN
    for _ in range(8):
        ended(replica, time, seconds=5.0)
    assert replica.breaker.state is BreakerState.CLOSED


def test_a_new_server_has_no_usual_time_to_exceed() -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_TO_OPEN):
        Request(breaker, usual_s=None).overdue()
    assert breaker.state is BreakerState.CLOSED


def test_the_end_of_an_overdue_request_is_not_counted_twice() -> None:
    breaker = CircuitBreaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        request = Request(breaker, usual_s=0.1)
        request.overdue()
        request.overdue()
        request.ended(RewardUnavailable("fake", "timeout", "late"))
    assert breaker.state is BreakerState.CLOSED


def test_encoding_tells_images_apart() -> None:
    same = ScoreQuestion.of(IMAGES, ["a", "a"], None).digests
    assert same[0] == same[1]
    assert len({*same, *ScoreQuestion.of(IMAGES, PROMPTS, [{"n": 1}, {}]).digests}) == 3

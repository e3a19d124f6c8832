"""A reward server that answers anything but what it should, and the client's time, made by hand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from common.errors import RewardError, WireError
from common.rewards.api import ScoreRequest, ScoreResponse, ServerInfo
from common.rewards.client import RewardClient, RewardEndpoint
from common.rewards.control_request import BLOCKS, SIDE
from common.rewards.retry_budget import Timing

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)
PIXELS = np.zeros((2, 3, 4, 4), np.float32)
PROMPTS = ["a", "b"]
SCORES = np.array([0.25, 0.5], np.float32)
INFO = ServerInfo("fake", "1", "hash", True, 0.0, 1.0, "1")
STRANGER = ServerInfo("fake", "1", "other", True, 0.0, 1.0, "1")
GOOD = ScoreResponse("fake", "hash", SCORES).to_bytes()

Reply = tuple[int, bytes] | None


def introduction(info: ServerInfo, *scores: float) -> bytes:
    """An answer to random pictures: the same from every server that says nothing else."""
    answer = np.array(scores or (0.5,) * len(BLOCKS), np.float32)
    return ScoreResponse(info.scorer, info.weights_hash, answer).to_bytes()


def is_introduction(body: bytes) -> bool:
    """Whether a body asks for random pictures."""
    try:
        return ScoreRequest.from_bytes(body).images_BHWC.shape == (len(BLOCKS), SIDE, SIDE, 3)
    except (RewardError, WireError):
        return False


class FakeServer:
    """Answers /v1/info truthfully and everything else with `replies`, in turn, the last one for ever.

    Random pictures of a client that does not know it yet are answered with `introduction`, and kept apart.
    Nothing at all is answered while `hangs` is set.
    """

    def __init__(self, info: ServerInfo = INFO) -> None:
        self.info = info
        self.replies: list[Reply] = [(200, GOOD)]
        self.headers: dict[str, str] = {}
        self.bodies: list[bytes] = []
        self.introduction: Callable[[], Reply] = lambda: (200, introduction(self.info))
        self.introductions: list[bytes] = []
        self.looks = 0
        self.paths: list[str] = []
        self.authorization: str | None = None
        self.authorizations: set[str | None] = set()
        self.answering = threading.Event()
        self.answering.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                outer.answering.wait()
                outer.looks += 1
                self.note()
                self.reply(200, outer.info.to_json())

            def do_POST(self) -> None:
                self.note()
                body = self.rfile.read(int(self.headers["content-length"]))
                if is_introduction(body):
                    outer.introductions.append(body)
                    reply = outer.introduction()
                else:
                    outer.bodies.append(body)
                    outer.answering.wait()
                    reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                if reply is None:
                    self.close_connection = True
                else:
                    self.reply(*reply)

            def note(self) -> None:
                outer.paths.append(self.path)
                outer.authorization = self.headers.get("authorization")
                outer.authorizations.add(outer.authorization)

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *arguments: object) -> None:
                """Clients that hang up are part of the tests."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.answering.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Time:
    """A clock that only sleeping advances; `pauses` are the sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def timing(self, draw: Callable[[], float] = lambda: 0.5) -> Timing:
        return Timing(clock=lambda: self.now, sleep=self.sleep, draw=draw)


@contextmanager
def fake_server(info: ServerInfo = INFO) -> Iterator[FakeServer]:
    server = FakeServer(info)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def closed_url() -> Iterator[str]:
    """A URL that no server listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def client_at(
    *urls: str, attempts: int = 3, timeout_s: float = 5.0, timing: Timing | None = None, **options: object
) -> RewardClient:
    endpoints = [RewardEndpoint("fake", url) for url in urls]
    return RewardClient(endpoints, timeout_s, attempts, timing=timing or Time().timing(), **options)


def error_body(cause: str) -> bytes:
    return json.dumps({"error": cause, "message": "details"}).encode()

"""Attacks on a real server by strangers and by clients: others are answered, and the server ends when it is told to."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from common.rewards.api import METRICS_PATH, PLAIN_SCORE_PATH, READY_PATH, SCORE_PATH, ScoreRequest
from reward_servers.front.connections import MAX_CONNECTIONS
from reward_servers.front.listener import END_SECONDS
from tests.helpers.raw_http import request
from tests.helpers.running_service import descendants
from tests.helpers.waiting import wait_until
from tests.integration.test_reward_servers import BRIGHTNESS, MISCHIEF, TOKEN, Waiting, launch, running

AUTHORISED = {"authorization": f"Bearer {TOKEN}"}
SMALL = ScoreRequest(np.zeros((1, 8, 8, 3), np.uint8), ["a"]).to_bytes()
IN_A_THREAD = ScoreRequest(np.zeros((1, 256, 256, 3), np.uint8), ["a"]).to_bytes()
ANSWER_SECONDS = 60.0


@contextmanager
def attacked(folder: Path, *options: str) -> Iterator[tuple[int, httpx.Client]]:
    """The port of a server with a token, and an honest client that is connected before the attack begins."""
    with (
        running(folder, "--scorer", BRIGHTNESS, *options, REWARD_SERVER_TOKEN=TOKEN) as (url, _),
        httpx.Client(base_url=url, timeout=ANSWER_SECONDS, headers=AUTHORISED, trust_env=False) as honest,
    ):
        assert honest.post(SCORE_PATH, content=SMALL).status_code == 200
        yield int(url.rsplit(":", 1)[1]), honest


def strangers(stack: ExitStack, port: int, count: int, sends: bytes = b"") -> list[socket.socket]:
    opened = []
    for _ in range(count):
        opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)))
        if sends:
            opened[-1].sendall(sends)
    return opened


def closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection, by now or within a moment."""
    connection.settimeout(ANSWER_SECONDS)
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "sends",
    [
        b"",
        request("/healthz", method="GET"),
        b"GET / HTT",
        request(length=2**28),
        request(length=2**28, fields=[f"authorization: Bearer {TOKEN}"]),
    ],
    ids=["nothing", "a page each", "half a head", "a body of 256 MiB without a token", "a body of 256 MiB with it"],
)
def test_more_idle_connections_than_there_are_places_hinder_nobody(sends: bytes, tmp_path: Path) -> None:
    with attacked(tmp_path) as (port, honest), ExitStack() as stack:
        opened = strangers(stack, port, MAX_CONNECTIONS + 20, sends)
        assert honest.post(SCORE_PATH, content=SMALL).status_code == 200
        fresh = httpx.post(f"{honest.base_url}{SCORE_PATH}", content=SMALL, headers=AUTHORISED, trust_env=False)
        assert fresh.status_code == 200
        assert httpx.get(f"{honest.base_url}/healthz", trust_env=False).status_code == 200
        assert closed(opened[0])


def test_a_declared_body_that_never_comes_takes_no_room_and_is_given_up(tmp_path: Path) -> None:
    """Four of 256 MiB are all that --queue-mb allows."""
    sends = request(length=2**28, fields=[f"authorization: Bearer {TOKEN}"])
    with attacked(tmp_path) as (port, honest), ExitStack() as stack:
        opened = strangers(stack, port, 8, sends)
        assert honest.post(SCORE_PATH, content=SMALL).status_code == 200
        assert honest.post(SCORE_PATH, content=IN_A_THREAD).status_code == 200
        assert 'reward_server_queue_bytes{scorer="brightness"} 0.0' in honest.get(METRICS_PATH).text
        first = opened[0].recv(2**16)
        assert first.startswith(b"HTTP/1.1 408 ")
        assert all(closed(one) for one in opened)
        assert honest.post(SCORE_PATH, content=SMALL).status_code == 200


def progressive(side: int, passes: int) -> bytes:
    """A JPEG whose passes of 17 bytes each go over all its pixels (ITU-T T.81: DC once, then empty AC scans)."""
    blocks = (side // 8) ** 2
    head = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1] * 64)
    head += b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side, side, 1) + bytes([1, 0x11, 0])
    head += b"\xff\xc4" + struct.pack(">HB", 20, 0x00) + bytes([1] + [0] * 15 + [0])
    head += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15 + [0xE0])

    def scan(begin: int, end: int, bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        data = bytes(int(bits[index : index + 8], 2) for index in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
        return b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, begin, end, 0]) + data

    runs = "".join(
        "0" + format(max(min(blocks - done, 32_767), 16_384) - 16_384, "014b") for done in range(0, blocks, 32_767)
    )
    return head + scan(0, 0, "0" * blocks) + scan(1, 63, runs) * passes + b"\xff\xd9"


def plain(*files: bytes) -> bytes:
    images = [base64.b64encode(file).decode() for file in files]
    return json.dumps({"images": images, "prompts": ["a"] * len(files)}).encode()


def test_a_jpeg_of_many_passes_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = plain(progressive(2048, 25_000))
    with attacked(tmp_path) as (_, honest):
        for _ in range(3):
            refused = honest.post(PLAIN_SCORE_PATH, content=bomb)
            assert (refused.status_code, refused.json()["error"]) == (422, "request")
        assert honest.post(SCORE_PATH, content=IN_A_THREAD).status_code == 200


def test_what_takes_longer_to_decode_than_its_deadline_ends_with_it(tmp_path: Path) -> None:
    """Each picture keeps all limits; together they would take many seconds. The readers are free again at once."""
    heavy = plain(*[progressive(2048, 90)] * 20)
    with attacked(tmp_path, "--max-pixels", str(2**23)) as (_, honest):
        for _ in range(3):
            late = honest.post(PLAIN_SCORE_PATH, content=heavy, headers={"x-deadline-seconds": "0.5"})
            assert (late.status_code, late.json()["error"]) == (504, "deadline")
        # It needs a reader: they must not go on with what nobody waits for.
        small = plain(progressive(64, 1))
        assert honest.post(PLAIN_SCORE_PATH, content=small, headers={"x-deadline-seconds": "3"}).status_code == 200
        assert honest.get(READY_PATH).status_code == 200


def test_a_crowd_beyond_the_queue_gets_answers_of_two_kinds(tmp_path: Path) -> None:
    """Many more clients than the queue takes: each is answered with a score or a 429, none is cut off."""
    answered: Counter[int] = Counter()
    with attacked(tmp_path, "--queue-items", "4", "--max-batch", "2", "--max-wait-ms", "50") as (_, honest):

        def ask() -> None:
            with httpx.Client(base_url=honest.base_url, headers=AUTHORISED, timeout=60, trust_env=False) as client:
                for _ in range(10):
                    answered[client.post(SCORE_PATH, content=SMALL).status_code] += 1

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answered.total() == 240
    assert set(answered) == {200, 429}


def test_aborted_uploads_leave_nothing_behind(tmp_path: Path) -> None:
    head = request(length=2**23, fields=[f"authorization: Bearer {TOKEN}"])
    with attacked(tmp_path) as (port, honest):
        for _ in range(20):
            with ExitStack() as stack:
                strangers(stack, port, 3, head + bytes(2**20))
        gauges = 'reward_server_queue_bytes{scorer="brightness"} 0.0'
        wait_until(lambda: gauges in honest.get(METRICS_PATH).text)
        assert 'reward_server_queue_images{scorer="brightness"} 0.0' in honest.get(METRICS_PATH).text


@pytest.mark.parametrize("stuck", ["a model", "a model in process", "a stopped model", "a reader", "uploads"])
def test_a_stop_signal_ends_the_process_in_time_whatever_runs(stuck: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    where = ("--in-process",) if stuck == "a model in process" else ()
    options = ("--port", "0", "--ready-file", str(ready), "--max-pixels", str(2**23), *where)
    process = launch("--scorer", MISCHIEF, *options)
    try:
        wait_until(ready.exists)
        url = f"http://127.0.0.1:{json.loads(ready.read_text())['port']}"
        with ExitStack() as stack:
            waiting = None
            below = descendants(process.pid)
            assert len(below) == (0 if where else 1)
            if "model" in stuck:
                waiting = Waiting(url, tmp_path)
                if stuck == "a stopped model":
                    os.kill(below[0].pid, signal.SIGSTOP)
            elif stuck == "a reader":
                body = plain(*[progressive(2048, 90)] * 20)
                strangers(stack, int(url.rsplit(":", 1)[1]), 3, request(PLAIN_SCORE_PATH, body))
                gauge = 'reward_server_queue_bytes{scorer="mischief"} 0.0'
                wait_until(lambda: gauge not in httpx.get(url + METRICS_PATH).text)
            else:
                strangers(stack, int(url.rsplit(":", 1)[1]), 3, request(length=2**20) + b"begun")
            started = time.monotonic()
            os.kill(process.pid, signal.SIGTERM)
            process.wait(ANSWER_SECONDS)
            assert time.monotonic() - started < END_SECONDS + 1
            assert process.returncode == 0
            wait_until(lambda: not any(one.alive for one in below))
            if waiting is not None:
                waiting.abandon()
    finally:
        process.kill()
        process.communicate()


def test_sides_that_a_scorer_cannot_take_are_a_bad_request(tmp_path: Path) -> None:
    options = ("--scorer", "zoo.detector:DetectorScorer", "--model", "zoo/weights/detector")
    with running(tmp_path, *options) as (url, _):
        for height, width in ((2, 3), (7, 5), (31, 33), (33, 47), (65, 64), (100, 37), (511, 513), (128, 4096)):
            body = ScoreRequest(np.zeros((1, height, width, 3), np.uint8), ["big red circle on white"]).to_bytes()
            answer = httpx.post(url + SCORE_PATH, content=body, trust_env=False)
            assert (answer.status_code, answer.json()["error"]) == (422, "request"), (height, width)
        body = ScoreRequest(np.zeros((1, 64, 64, 3), np.uint8), ["big red circle on white"]).to_bytes()
        assert httpx.post(url + SCORE_PATH, content=body, trust_env=False).status_code == 200


def test_a_picture_may_be_saved_progressively(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 51, np.uint8)).save(buffer, "JPEG", progressive=True, quality=95)
    with attacked(tmp_path) as (_, honest):
        answer = honest.post(PLAIN_SCORE_PATH, content=plain(buffer.getvalue()))
    np.testing.assert_allclose(answer.json()["scores"], 0.2, atol=0.01)

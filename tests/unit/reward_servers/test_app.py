"""The routes of a reward server, in process: what is answered, and what is refused before it costs anything."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import httpx
import numpy as np
import pytest
from PIL import Image

from common.errors import WireError
from common.rewards.api import (
    DEADLINE_HEADER,
    MAX_PROMPT_BYTES,
    METRICS_PATH,
    OPENAPI_PATH,
    PLAIN_SCORE_PATH,
    READY_PATH,
    RUN_HEADER,
    SCORE_PATH,
    ByteArray,
    GradientRequest,
    ScoreRequest,
    ScoreResponse,
)
from common.wire import pack
from reward_servers.batcher import BatchLimits
from reward_servers.doors import ScoreDoor
from tests.helpers.raw_http import connected, request
from tests.helpers.serving_app import LIMITS, serving_app
from tests.helpers.toy_scorers import BrightnessScorer, RecordingScorer

TIMEOUT = 10.0


def images(count: int = 2, side: int = 8, seed: int = 0) -> ByteArray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def body(count: int = 1, side: int = 8) -> bytes:
    return ScoreRequest(images(count, side), ["a"] * count).to_bytes()


def encode(image_HWC: ByteArray, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def drive(scenario: Callable[[httpx.AsyncClient], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        scorers = settings.pop("scorers", None) or {"brightness": BrightnessScorer()}
        async with asyncio.timeout(TIMEOUT), serving_app(scorers, **settings) as client:
            await scenario(client)

    asyncio.run(run())


def reason(answer: httpx.Response) -> tuple[int, str]:
    assert answer.json()["message"]
    return answer.status_code, answer.json()["error"]


def test_several_scorers_have_routes_of_their_own() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        bright = ScoreResponse.from_bytes((await client.post("/b" + SCORE_PATH, content=body())).content)
        first = ScoreResponse.from_bytes((await client.post("/r" + SCORE_PATH, content=body())).content)
        assert (bright.scorer, first.scorer) == ("b", "r")
        assert bright.scores_B[0] == pytest.approx(images(1).mean() / 255)
        assert first.scores_B[0] == images(1)[0, 0, 0, 0]
        declared = (await client.get("/r/v1/info")).json()
        assert (declared["high"], declared["reproducible"]) == (255, False)
        assert declared["implementation"] == "tests.helpers.toy_scorers:RecordingScorer"
        assert (await client.get(READY_PATH)).json()["probe_scores"] == {"b": 0.5, "r": 0.5}
        lost = await client.post(SCORE_PATH, content=body())
        assert reason(lost) == (404, "not_found")
        assert "the URL of a reward here is http://HOST:PORT/b and http://HOST:PORT/r," in lost.json()["message"]
        metrics = (await client.get(METRICS_PATH)).text
        assert metrics.count("# TYPE reward_server_score histogram") == 1
        assert 'reward_server_score_bucket{le="255.0",scorer="r"} 1.0' in metrics
        assert 'reward_server_score_bucket{le="1.0",scorer="b"} 1.0' in metrics
        assert 'reward_server_queue_bytes{scorer="b"} 0.0' in metrics

    drive(scenario, scorers={"b": BrightnessScorer(), "r": RecordingScorer()})


def test_a_full_queue_refuses_before_a_body_is_read() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()

    async def scenario(client: httpx.AsyncClient) -> None:
        held = asyncio.create_task(client.post(SCORE_PATH, content=body()))
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        waiting = asyncio.create_task(client.post(SCORE_PATH, content=body(2)))
        while 'queue_images{scorer="r"} 2.0' not in (await client.get(METRICS_PATH)).text:
            await asyncio.sleep(0.001)
        async with connected(client.base_url.port) as raw:
            # Its head alone.
            refused = await raw.ask(request(length=100))
            assert (refused.status, refused.json["error"]) == (429, "overloaded")
            assert b"\r\nretry-after: 1\r\n" in refused.head
            # The rest of a refused body is dropped, and the connection is used again.
            assert (await raw.ask(bytes(100), request("/healthz", method="GET"))).status == 200
        scorer.gate.set()
        assert [(await held).status_code, (await waiting).status_code] == [200, 200]

    drive(scenario, scorers={"r": scorer}, batch=BatchLimits(4, 0.0, queue_images=2))


def test_bytes_are_bounded_before_they_are_read_and_given_back_after_the_answer() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()
    size = len(body(4, 32))

    async def scenario(client: httpx.AsyncClient) -> None:
        held = asyncio.create_task(client.post(SCORE_PATH, content=body(4, 32)))
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        assert reason(await client.post(SCORE_PATH, content=body(4, 32))) == (429, "overloaded")
        scorer.gate.set()
        assert (await held).status_code == 200
        assert (await client.post(SCORE_PATH, content=body(4, 32))).status_code == 200
        assert 'queue_bytes{scorer="r"} 0.0' in (await client.get(METRICS_PATH)).text

    drive(scenario, scorers={"r": scorer}, queue_bytes=size + 10)


def test_runs_that_share_a_server_take_turns() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()

    async def scenario(client: httpx.AsyncClient) -> None:
        async def send(count: int, run: str | None) -> int:
            headers = {} if run is None else {RUN_HEADER: run}
            return (await client.post(SCORE_PATH, content=body(count), headers=headers)).status_code

        sent = [asyncio.create_task(send(1, "a"))]
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        waiting = 0
        # The number of images tells the requests apart.
        for count, run in ((2, "a"), (3, "a"), (4, None), (5, "b" * 100)):
            sent.append(asyncio.create_task(send(count, run)))
            waiting += count
            while f'queue_images{{scorer="r"}} {waiting}.0' not in (await client.get(METRICS_PATH)).text:
                await asyncio.sleep(0.001)
        scorer.gate.set()
        assert await asyncio.gather(*sent) == [200] * 5

    drive(scenario, scorers={"r": scorer}, batch=BatchLimits(8, 0.0, queue_images=100, share_calls=False))
    assert [len(call) for call in scorer.calls] == [1, 2, 4, 5, 3]


async def counted(client: httpx.AsyncClient, status: int) -> None:
    """Wait until one scoring request has ended with this status."""
    while f'requests_total{{code="{status}",path="/v1/score"' not in (await client.get(METRICS_PATH)).text:
        await asyncio.sleep(0.001)


def test_work_past_its_deadline_never_runs() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()

    async def scenario(client: httpx.AsyncClient) -> None:
        held = asyncio.create_task(client.post(SCORE_PATH, content=body()))
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        late = await client.post(SCORE_PATH, content=body(2), headers={DEADLINE_HEADER: "0.01"})
        assert reason(late) == (504, "deadline")
        assert "0.01 s" in late.json()["message"]
        scorer.gate.set()
        await held
        assert (await client.post(SCORE_PATH, content=body(3))).status_code == 200

    drive(scenario, scorers={"r": scorer})
    assert [len(call) for call in scorer.calls] == [1, 3]


def test_a_body_that_does_not_come_whole_within_its_deadline_is_late() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        async with connected(client.base_url.port) as raw:
            late = await raw.ask(request(body=body()[:-1], length=len(body()), fields=[f"{DEADLINE_HEADER}: 0.05"]))
            assert (late.status, late.json["error"]) == (504, "deadline")
            # What is missing of it is dropped, and the connection is used again.
            assert (await raw.ask(body()[-1:], request(body=body()))).status == 200
        assert 'queue_bytes{scorer="brightness"} 0.0' in (await client.get(METRICS_PATH)).text

    drive(scenario)


def test_a_client_cannot_ask_for_more_than_the_servers_own_deadline() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()

    async def scenario(client: httpx.AsyncClient) -> None:
        late = await client.post(SCORE_PATH, content=body(), headers={DEADLINE_HEADER: "inf"})
        assert (reason(late), "0.02 s" in late.json()["message"]) == ((504, "deadline"), True)
        scorer.gate.set()

    drive(scenario, scorers={"r": scorer}, limits=replace(LIMITS, deadline_s=0.02))


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", ""])
def test_a_deadline_that_is_none_is_refused(value: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.post(SCORE_PATH, content=body(), headers={DEADLINE_HEADER: value})
        assert reason(answer) == (422, "request")

    drive(scenario)


def test_base64_may_have_lines() -> None:
    lines = [base64.encodebytes(base64.b64decode(encode(image))).decode() for image in images(2, 32)]
    assert all(len(text.splitlines()) > 1 for text in lines)

    async def scenario(client: httpx.AsyncClient) -> None:
        whole = await client.post(
            PLAIN_SCORE_PATH, json={"images": [encode(one) for one in images(2, 32)], "prompts": ["a"] * 2}
        )
        for sent in (lines, [text.replace("\n", "\r\n") for text in lines]):
            answer = await client.post(PLAIN_SCORE_PATH, json={"images": sent, "prompts": ["a"] * 2})
            assert (answer.status_code, answer.json()) == (200, whole.json())
        url = {"image_base64": "data:image/png;base64," + encode(images(1)[0]), "prompt": "a"}
        refused = await client.post(PLAIN_SCORE_PATH, json=url)
        assert (reason(refused), "send what follows its comma" in refused.text) == ((422, "request"), True)

    drive(scenario)


def test_a_compressed_body_is_refused_by_its_encoding() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        plain = json.dumps({"image_base64": encode(images(1)[0]), "prompt": "a"}).encode()
        for path, content in ((PLAIN_SCORE_PATH, plain), (SCORE_PATH, body())):
            answer = await client.post(path, content=gzip.compress(content), headers={"content-encoding": "gzip"})
            assert (reason(answer), "'gzip' is not supported" in answer.text) == ((415, "encoding"), True)
            answer = await client.post(path, content=content, headers={"content-encoding": "identity"})
            assert answer.status_code == 200

    drive(scenario)


def test_pixels_and_bytes_are_limited() -> None:
    declared = pack({"images_BHWC": images(1, 65), "prompts": ["a"], "metadata": []})
    pixels = pack({"images_BCHW": np.zeros((1, 3, 65, 65), np.float32), "prompts": ["a"], "metadata": []})
    plain = {"image_base64": encode(images(1, 65)[0]), "prompt": "a"}

    async def scenario(client: httpx.AsyncClient) -> None:
        for answer in (
            await client.post(SCORE_PATH, content=declared),
            await client.post("/v1/gradient", content=pixels),
            await client.post(PLAIN_SCORE_PATH, json=plain),
            await client.post(SCORE_PATH, content=b"x" * (2**20 + 1)),
            await client.post(
                PLAIN_SCORE_PATH, json={"images": [encode(images(1, 64)[0])] * 86, "prompts": ["a"] * 86}
            ),
        ):
            assert reason(answer) == (413, "too_large")

    drive(scenario)


def test_one_image_alone_has_the_limit_of_decoded_bytes_too() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        black = np.zeros((64, 64, 3), np.uint8)
        alone = await client.post(PLAIN_SCORE_PATH, json={"image_base64": encode(black), "prompt": "a"})
        assert reason(alone) == (413, "too_large")
        assert "12288 bytes once decoded" in alone.json()["message"]

    drive(scenario, limits=replace(LIMITS, max_body_bytes=12_000))


def test_slivers_and_endless_texts_are_refused_on_both_routes() -> None:
    sliver, endless = np.zeros((1, 1, 33, 3), np.uint8), "x" * (MAX_PROMPT_BYTES + 1)
    fields = {"images_BHWC": images(1), "prompts": ["a"], "metadata": []}
    file = encode(images(1)[0])

    async def scenario(client: httpx.AsyncClient) -> None:
        for answer in (
            await client.post(SCORE_PATH, content=pack(fields | {"images_BHWC": sliver})),
            await client.post(SCORE_PATH, content=pack(fields | {"prompts": [endless]})),
            await client.post(SCORE_PATH, content=pack(fields | {"metadata": [{"text": endless}]})),
            await client.post(PLAIN_SCORE_PATH, json={"image_base64": encode(sliver[0]), "prompt": "a"}),
            await client.post(PLAIN_SCORE_PATH, json={"image_base64": file, "prompt": endless}),
            await client.post(PLAIN_SCORE_PATH, json={"images": [file], "prompts": ["a"], "metadata": {"a": endless}}),
        ):
            assert reason(answer) == (422, "request")
            assert len(answer.text) < 300

    drive(scenario)


def test_the_token_is_asked_for_everywhere_a_scorer_answers() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        for path in (SCORE_PATH, "/v1/gradient", PLAIN_SCORE_PATH):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
                refused = await client.post(path, content=b"", headers=headers)
                assert reason(refused) == (401, "unauthorized")
                assert refused.headers["www-authenticate"] == "Bearer"
        assert (await client.get("/v1/info")).status_code == 401
        assert (await client.get("/v1/info", headers={"authorization": "Bearer sesame"})).status_code == 200
        assert (await client.get(OPENAPI_PATH)).json()["components"]["securitySchemes"]

    drive(scenario, limits=replace(LIMITS, token="sesame"))


@pytest.mark.parametrize("value", ["bearer sesame", "BEARER  sesame", "Bearer sesame"])
def test_the_scheme_of_a_token_has_no_case(value: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/info", headers={"authorization": value})).status_code == 200
        assert (await client.get("/v1/info", headers={"authorization": f"{value}s"})).status_code == 401
        assert (await client.get("/v1/info", headers={"authorization": "Basic sesame"})).status_code == 401

    drive(scenario, limits=replace(LIMITS, token="sesame"))


def test_what_can_never_be_taken_is_413_and_not_429() -> None:
    """Else its sender would come back for ever."""
    gradient = GradientRequest(np.zeros((1, 3, 8, 8), np.float32), ["a"]).to_bytes()

    async def scenario(client: httpx.AsyncClient) -> None:
        crowd = await client.post(SCORE_PATH, content=body(9, side=2))
        assert (reason(crowd), "--queue-items" in crowd.json()["message"]) == ((413, "too_large"), True)
        # Its body fits, its gradient and answer beside it do not.
        large = await client.post("/v1/gradient", content=gradient)
        assert (reason(large), "--queue-mb" in large.json()["message"]) == ((413, "too_large"), True)

    drive(scenario, queue_bytes=2 * len(gradient), batch=BatchLimits(4, 0.0, queue_images=8))


def test_a_stuck_model_is_not_ready_until_its_call_ends() -> None:
    scorer = RecordingScorer()
    scorer.gate.clear()
    now = [0.0]

    async def scenario(client: httpx.AsyncClient) -> None:
        held = asyncio.create_task(client.post(SCORE_PATH, content=body()))
        await asyncio.to_thread(scorer.entered.wait, TIMEOUT)
        now[0] = LIMITS.deadline_s
        assert (await client.get(READY_PATH)).status_code == 200
        now[0] += 1
        stuck = await client.get(READY_PATH)
        assert reason(stuck) == (503, "deadline")
        assert "running for 31 s, the deadline is 30 s" in stuck.json()["message"]
        scorer.gate.set()
        await held
        assert (await client.get(READY_PATH)).status_code == 200

    drive(scenario, scorers={"r": scorer}, clock=lambda: now[0])


def test_a_stuck_reader_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = threading.Event(), threading.Event()

    def stuck(*arguments: object) -> ScoreRequest:
        entered.set()
        assert gate.wait(TIMEOUT)
        raise WireError("no message")

    monkeypatch.setattr(ScoreRequest, "from_bytes", stuck)
    monkeypatch.setattr(ScoreDoor, "at_once", 0)
    now = [0.0]

    async def scenario(client: httpx.AsyncClient) -> None:
        held = asyncio.create_task(client.post(SCORE_PATH, content=body()))
        await asyncio.to_thread(entered.wait, TIMEOUT)
        now[0] = LIMITS.deadline_s + 1
        answer = await client.get(READY_PATH)
        assert (reason(answer), "a reader has been running for 31 s" in answer.text) == ((503, "deadline"), True)
        gate.set()
        assert reason(await held) == (400, "wire")
        assert (await client.get(READY_PATH)).status_code == 200

    drive(scenario, clock=lambda: now[0])


def test_bytes_are_held_until_the_thread_that_reads_them_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, gate = threading.Event(), threading.Event()
    parse = ScoreRequest.from_bytes

    def slow(*arguments: object) -> ScoreRequest:
        entered.set()
        assert gate.wait(TIMEOUT)
        return parse(*arguments)

    monkeypatch.setattr(ScoreRequest, "from_bytes", slow)
    monkeypatch.setattr(ScoreDoor, "at_once", 0)
    size = len(body())
    scorer = RecordingScorer()

    async def scenario(client: httpx.AsyncClient) -> None:
        late = await client.post(SCORE_PATH, content=body(), headers={DEADLINE_HEADER: "0.5"})
        assert (reason(late), entered.is_set()) == ((504, "deadline"), True)
        assert f'queue_bytes{{scorer="r"}} {size}.0' in (await client.get(METRICS_PATH)).text
        gate.set()
        while 'queue_bytes{scorer="r"} 0.0' not in (await client.get(METRICS_PATH)).text:
            await asyncio.sleep(0.001)

    drive(scenario, scorers={"r": scorer})
    # Nobody was waiting any more when it was read.
    assert scorer.calls == []


def test_a_client_that_hangs_up_while_its_body_is_read_is_never_queued() -> None:
    scorer = RecordingScorer()

    async def scenario(client: httpx.AsyncClient) -> None:
        async with connected(client.base_url.port) as raw:
            await raw.send(request(body=body(), length=len(body()) + 1))
        await counted(client, 499)

    drive(scenario, scorers={"r": scorer})
    assert scorer.calls == []


def test_plain_json_scores_as_the_main_route_does() -> None:
    pixels = images(3)
    files = [encode(image) for image in pixels]

    async def scenario(client: httpx.AsyncClient) -> None:
        request = ScoreRequest(pixels, list("abc"))
        expected = ScoreResponse.from_bytes((await client.post(SCORE_PATH, content=request.to_bytes())).content)
        for metadata in ({}, {"metadata": {}}, {"metadata": None}, {"metadata": {"a": 1}}, {"metadata": [{}] * 3}):
            answer = await client.post(PLAIN_SCORE_PATH, json={"images": files, "prompts": list("abc")} | metadata)
            assert answer.json() == {"scores": expected.scores_B.tolist()}
        one = await client.post(PLAIN_SCORE_PATH, json={"image_base64": files[1], "prompt": "b"})
        assert one.json() == {"score": expected.scores_B[1]}
        photo = await client.post(PLAIN_SCORE_PATH, json={"image_base64": encode(pixels[0], "JPEG"), "prompt": ""})
        assert photo.status_code == 200

    drive(scenario)


def many(image: str, metadata: bytes) -> bytes:
    return b'{"images": ["' + image.encode() + b'"], "prompts": ["a"], "metadata": ' + metadata + b"}"


def test_plain_json_that_is_no_request_says_why() -> None:
    image = encode(images(1)[0])
    cases: list[tuple[bytes | dict[str, object] | list[object], int, str]] = [
        (b"{", 400, "not JSON"),
        (b"[" * 90_000, 400, "not JSON"),
        (b"[" * 100_001, 422, "commas and brackets"),
        ([], 422, "not an object"),
        ({"images": [image]}, 422, "has the fields"),
        ({"images": image, "prompts": ["a"]}, 422, "not a list"),
        ({"images": [], "prompts": []}, 422, "at least one image"),
        ({"images": [1], "prompts": ["a"]}, 422, "not a base64 string"),
        ({"images": ["data:image/png;base64," + image], "prompts": ["a"]}, 422, "send what follows its comma"),
        ({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": ["a"]}, 422, "is no PNG/JPEG"),
        ({"images": [image[: len(image) // 2 // 4 * 4]], "prompts": ["a"]}, 422, "cannot be decoded"),
        ({"images": [image, encode(images(1, 9)[0])], "prompts": ["a", "b"]}, 422, "2 sizes"),
        ({"images": [image], "prompts": ["a", "b"]}, 422, "2 prompts for 1"),
        ({"images": [image], "prompts": [1]}, 422, "not a string"),
        ({"images": [image], "prompts": ["a"], "metadata": "x"}, 422, "not a list"),
        (b'{"image_base64": "' + image.encode() + b'", "prompt": "\\ud800"}', 422, "surrogate"),
        (many(image, rb'{"tag": "\ud83c"}'), 422, "surrogate"),
        (many(image, rb'{"\ud83c": 1}'), 422, "surrogate"),
        (many(image, b'{"share": NaN}'), 400, "NaN is no number of JSON"),
        (many(image, b'{"share": 1e999}'), 400, "too large"),
        (many(image, b'{"id": ' + b"9" * 5000 + b"}"), 400, "64 bits"),
    ]

    async def scenario(client: httpx.AsyncClient) -> None:
        for content, status, message in cases:
            kind = {"content": content} if isinstance(content, bytes) else {"json": content}
            answer = await client.post(PLAIN_SCORE_PATH, **kind)
            assert (answer.status_code, message in answer.json()["message"]) == (status, True), answer.text

    drive(scenario)


def test_what_is_no_route_or_no_method_has_a_reason() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        assert reason(await client.get("/nothing")) == (404, "not_found")
        assert reason(await client.post(SCORE_PATH + "/", content=b"")) == (404, "not_found")
        wrong = await client.get(SCORE_PATH)
        assert (reason(wrong), wrong.headers["allow"]) == ((405, "not_found"), "POST")

    drive(scenario)

"""`POST /`: bodies as the clients of Flow-GRPO, verl-omni and deepgen_rl make them, and the answers they read."""

from __future__ import annotations

import asyncio
import io
import pickle
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from common.errors import RewardRejected, WireError
from common.rewards.api import OPENAPI_PATH, ByteArray, FloatArray, Metadata, ScoreResponse
from reward_servers.doors import DOORS, FlowGrpoDoor
from reward_servers.limits import Patience, RequestLimits
from tests.helpers.hostile_pickles import mutated
from tests.helpers.serving_app import LIMITS, serving_app
from tests.helpers.toy_scorers import BrightnessScorer

TIMEOUT = 10.0
MUTATED = 1_000
TASKS: list[dict[str, Any]] = [
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats", "share": 1.0},
    {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a dog", "share": 0.5},
]


class ShareScorer(BrightnessScorer):
    """The score stands in the metadata, and what was asked is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[str] = []

    def score(self, images_BHWC: ByteArray, prompts: Any, metadata: Any) -> FloatArray:
        self.prompts += prompts
        return np.array([one["share"] for one in metadata], dtype=np.float32)


def jpeg(level: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


def drive(
    scenario: Callable[[httpx.AsyncClient], Awaitable[None]],
    limits: RequestLimits = LIMITS,
    queue_bytes: int = 2**22,
    **scorers: BrightnessScorer,
) -> None:
    async def run() -> None:
        doors = (*DOORS, FlowGrpoDoor())
        served = scorers or {"brightness": BrightnessScorer()}
        async with (
            asyncio.timeout(TIMEOUT),
            serving_app(served, limits, doors=doors, queue_bytes=queue_bytes) as client,
        ):
            await scenario(client)

    asyncio.run(run())


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_request_of_verl_omni_is_scored(protocol: int) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        for metadata in ({}, {"metadata": {}}, {"metadata": {"a": (1, 2)}}, {"metadata": [{}, {}]}, {"metadata": None}):
            sent = {"images": [jpeg(0), jpeg(255)], "prompts": ["a", "b"]} | metadata
            answer = await client.post("/", content=pickle.dumps(sent, protocol))
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/octet-stream")
            assert pickle.loads(answer.content) == {"scores": [0.0, 1.0], "outputs": [0.0, 1.0]}

    drive(scenario)


def test_a_request_of_flow_grpos_geneval_client_is_scored() -> None:
    scorer = ShareScorer()

    async def scenario(client: httpx.AsyncClient) -> None:
        images = [jpeg(9), jpeg(9)]
        plain = {"images": images, "meta_datas": TASKS, "only_strict": True}
        nested = {"images": images, "prompts": [], "metadata": {"meta_datas": TASKS, "only_strict": False}}
        for sent in (plain, nested):
            answer = pickle.loads((await client.post("/", content=pickle.dumps(sent))).content)
            assert answer["scores"] == [1.0, 0.5]
            assert answer["rewards"] == answer["strict_rewards"] == [1.0, 0.0]
            assert answer["group_rewards"] == answer["group_strict_rewards"]
            assert answer["group_rewards"]["counting"] == [1.0, -10.0]
            assert answer["group_rewards"]["colors"] == [-10.0, 0.0]
            assert answer["group_rewards"]["two_object"] == [-10.0, -10.0]
            assert set(answer["group_rewards"]) == {
                *("single_object", "two_object", "counting", "colors", "position", "color_attr")
            }

    drive(scenario, share=scorer)
    assert scorer.prompts == ["two cats", "a dog"] * 2


def test_each_scorer_answers_at_its_own_url() -> None:
    body = pickle.dumps({"images": [jpeg(255)], "prompts": ["a"], "metadata": {"share": 0.25}})

    async def scenario(client: httpx.AsyncClient) -> None:
        for path, score in (("/b", 1.0), ("/b/", 1.0), ("/s", 0.25), ("/s/", 0.25)):
            assert pickle.loads((await client.post(path, content=body)).content)["scores"] == [score]
        assert (await client.post("/", content=body)).status_code == 404
        paths = (await client.get(OPENAPI_PATH)).json()["paths"]
        assert {"/b/", "/s/"} <= set(paths)
        assert (await client.get("/b")).status_code == 405

    drive(scenario, b=BrightnessScorer(), s=ShareScorer())


def test_it_is_off_by_default() -> None:
    async def run() -> None:
        async with asyncio.timeout(TIMEOUT), serving_app({"b": BrightnessScorer()}) as client:
            answer = await client.post("/", content=pickle.dumps({"images": [jpeg(0)], "prompts": ["a"]}))
            assert answer.status_code in (404, 405)
            assert "--accept-flow-grpo" in answer.json()["message"]
            assert "/" not in (await client.get(OPENAPI_PATH)).json()["paths"]

    asyncio.run(run())


def test_what_is_no_request_says_why(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    image = jpeg(0)
    valid: dict[str, Any] = {"images": [image], "prompts": ["a"]}
    cases: list[tuple[object, int, str]] = [
        (b"", 400, "no pickle of protocol 2 to 5"),
        (b"{}", 400, "no pickle of protocol 2 to 5"),
        (pickle.dumps(valid)[:-5], 400, "longer than the body"),
        (valid | {"prompts": np.array(["a"])}, 400, "array.tolist()"),
        (valid | {"metadata": Attack()}, 400, "opcode STACK_GLOBAL"),
        ([image], 422, "the body is a list, not a dict"),
        ({"prompts": ["a"]}, 422, "the body has the fields ['prompts']"),
        (valid | {"image_format": "x"}, 422, "image_format"),
        ({"images": [image]}, 422, "the body has no prompts"),
        (valid | {"images": image}, 422, "images is a bytes, not a list"),
        (valid | {"images": [b"GIF89a"]}, 422, "is no PNG/JPEG"),
        (valid | {"images": [image[:300]]}, 422, "cannot be"),
        (valid | {"images": [1]}, 422, "an image is a int"),
        (valid | {"images": [image, jpeg(0, 16)], "prompts": ["a"] * 2}, 422, "2 sizes"),
        (valid | {"prompts": ["a", "b"]}, 422, "2 prompts for 1"),
        (valid | {"prompts": [1]}, 422, "not a string"),
        (valid | {"prompts": ["\ud83d"]}, 422, "surrogate"),
        (valid | {"prompts": ["x" * 40_000]}, 422, "shorten it"),
        (valid | {"metadata": {"a": b"b"}}, 422, "the metadata has bytes"),
        (valid | {"metadata": [1]}, 422, "metadata is not a list of maps"),
        ({"images": [image], "meta_datas": []}, 422, "0 meta_datas for 1 images"),
        ({"images": [image], "meta_datas": {}}, 422, "meta_datas is a dict"),
        ({"images": [image], "meta_datas": [{}]}, 422, "has no prompt"),
        ({"images": [image], "meta_datas": [1], "prompts": ["a"]}, 422, "not a list of maps"),
        ({"images": [image], "meta_datas": TASKS[:1], "only_strict": 1}, 422, "only_strict is a int"),
        (valid | {"images": [image] * 1025, "prompts": ["a"] * 1025}, 422, "at most 1024 are read"),
        (valid | {"images": [jpeg(0, 65)]}, 413, "exceeds the limit of 4096"),
        (valid | {"images": [jpeg(0, 64)] * 86, "prompts": ["a"] * 86}, 413, "once decoded"),
    ]

    async def scenario(client: httpx.AsyncClient) -> None:
        for sent, status, message in cases:
            content = sent if isinstance(sent, bytes) else pickle.dumps(sent)
            answer = await client.post("/", content=content)
            assert (answer.status_code, message in answer.json()["message"]) == (status, True), (message, answer.text)

    drive(scenario)
    assert list(tmp_path.iterdir()) == []


def test_mutated_bodies_are_requests_or_refused() -> None:
    dice = random.Random(7)
    sent: list[dict[str, Any]] = [
        {"images": [jpeg(0), jpeg(9)], "prompts": ["a", "b"], "metadata": {"a": [1, None]}},
        {"images": [jpeg(0)] * 2, "meta_datas": TASKS, "only_strict": True},
    ]
    bodies = [pickle.dumps(one, protocol) for one in sent for protocol in (3, 4)]
    scored = 0
    for _ in range(MUTATED):
        body = bytearray(mutated(dice.choice(bodies), dice))
        try:
            opened = FlowGrpoDoor().open(body, LIMITS, "b", Patience(60.0))
            request = opened.decode()
        except (WireError, RewardRejected):
            continue
        count = len(request.prompts)
        answer = opened.encode(ScoreResponse("b", "none", np.zeros(count, np.float32)))
        assert len(pickle.loads(answer)["scores"]) == count
        scored += 1
    assert 30 < scored < MUTATED / 2


async def nothing_held(client: httpx.AsyncClient) -> None:
    """Wait until no request holds bytes: what was answered late is still being read for a moment."""
    async with asyncio.timeout(60):
        while 'queue_bytes{scorer="brightness"} 0.0' not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.01)


def test_token_deadline_and_bytes_are_those_of_the_other_routes() -> None:
    body = pickle.dumps({"images": [jpeg(0, 64)] * 4, "prompts": ["a"] * 4})

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.post("/", content=body)).status_code == 401
        right = {"authorization": "Bearer sesame"}
        assert (await client.post("/", content=body, headers=right)).status_code == 200
        late = await client.post("/", content=body, headers=right | {"x-deadline-seconds": "1e-9"})
        assert late.status_code == 504
        compressed = await client.post("/", content=body, headers=right | {"content-encoding": "gzip"})
        assert compressed.status_code == 415
        # The body, the files in it and the pixels are held at once.
        assert (
            await client.post("/", content=bytes(len(body) + 2 * 64 * 64 * 3 + 1), headers=right)
        ).status_code == 413
        await nothing_held(client)

    drive(scenario, replace(LIMITS, token="sesame"), queue_bytes=2 * len(body) + 4 * 64 * 64 * 3)


def test_metadata_of_a_request_is_as_json_has_it() -> None:
    seen: list[Metadata] = []

    class Recorder(BrightnessScorer):
        def score(self, images_BHWC: ByteArray, prompts: Any, metadata: Any) -> FloatArray:
            seen.extend(metadata)
            return super().score(images_BHWC, prompts, metadata)

    async def scenario(client: httpx.AsyncClient) -> None:
        sent = {"images": [jpeg(0)], "prompts": ("a",), "metadata": ({"position": ("left of", 0), "b": {"c": ()}},)}
        assert (await client.post("/", content=pickle.dumps(sent))).status_code == 200

    drive(scenario, recorder=Recorder())
    assert seen == [{"position": ["left of", 0], "b": {"c": []}}]

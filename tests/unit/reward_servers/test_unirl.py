"""`POST /score` and `GET /health` as UniRL's client uses them."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from common.rewards.api import PLAIN_SCORE_PATH, UNIRL_HEALTH_PATH
from reward_servers import unirl
from tests.helpers.serving_app import LIMITS, serving_app
from tests.helpers.toy_scorers import BrightnessScorer

TIMEOUT = 10.0


def image_b64(level: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "JPEG", quality=95)
    return base64.b64encode(buffer.getvalue()).decode()


def item(level: int, **more: Any) -> dict[str, Any]:
    """One request, with every field that UniRL sends."""
    identity = {
        "request_id": f"r{level}",
        "sample_id": f"s{level}",
        "group_id": "g",
        "source_rank": 0,
        "policy_version": 3,
        "scorer_version": None,
        "idempotency_key": "0f" * 32,
    }
    turn = {"text": "a cat", "image_b64": image_b64(level)}
    return {"history": [turn], "required_rewards": ["bright"], "metadata": None} | identity | more


def drive(scenario: Callable[[httpx.AsyncClient], Awaitable[None]], *names: str) -> None:
    async def run() -> None:
        scorers = {name: BrightnessScorer() for name in names or ("bright",)}
        async with asyncio.timeout(TIMEOUT), serving_app(scorers, LIMITS) as client:
            await scenario(client)

    asyncio.run(run())


def test_a_request_of_unirl_is_scored_and_its_identities_come_back() -> None:
    items = [item(0), item(255, metadata={"policy_version": 3})]

    async def scenario(client: httpx.AsyncClient) -> None:
        answer = (await client.post(PLAIN_SCORE_PATH, json={"protocol_version": "1", "requests": items})).json()
        assert (answer["protocol_version"], answer["errors"]) == ("1", [{}, {}])
        assert answer["results"] == [{"bright": {"score": 0.0}}, {"bright": {"score": 1.0}}]
        keys = ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key")
        assert [{key: one[key] for key in keys} for one in answer["identities"]] == [
            {key: one[key] for key in keys} for one in items
        ]
        declared = (await client.get("/v1/info")).json()["weights_hash"]
        assert {one["scorer_version"] for one in answer["identities"]} == {declared}

    drive(scenario)


def test_a_client_without_identities_is_answered() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        short = {key: value for key, value in item(255).items() if key in ("history", "required_rewards")}
        answer = (await client.post(PLAIN_SCORE_PATH, json={"requests": [short]})).json()
        assert answer["results"] == [{"bright": {"score": 1.0}}]
        assert answer["identities"][0]["request_id"] is None

    drive(scenario)


def test_the_client_finds_the_reward_by_its_name() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        for name in ("a", "b"):
            assert (await client.get(f"/{name}{UNIRL_HEALTH_PATH}")).json() == {
                "status": "ok",
                "rewards": {name: [unirl.SUB_METRIC]},
            }
            sent = {"requests": [item(255, required_rewards=[name])]}
            answer = await client.post(f"/{name}{PLAIN_SCORE_PATH}", json=sent)
            assert answer.json()["results"] == [{name: {"score": 1.0}}]

    drive(scenario, "a", "b")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"requests": {}}, "requests is a dict"),
        ({"requests": []}, "at least one image"),
        ({"requests": [1]}, "a request is a int"),
        ({"requests": [item(0)], "images": []}, "the body has the fields"),
        ({"requests": [item(0)], "protocol_version": "2"}, "protocol_version is '2', this server speaks '1'"),
        ({"requests": [item(0, required_rewards=["hps"])]}, "required_rewards is ['hps']: at this URL"),
        ({"requests": [item(0, required_rewards=["bright", "hps"])]}, "the one reward is 'bright'"),
        ({"requests": [item(0, negative="x")]}, "a request has the fields"),
        ({"requests": [item(0, history=[])]}, "history has 0 entries"),
        ({"requests": [item(0, history=item(0)["history"] * 2)]}, "a reward here judges one picture"),
        ({"requests": [item(0, history=["x"])]}, "an entry of history is a str"),
        ({"requests": [item(0, history=[{"text": "a", "video_b64": "eA=="}])]}, "an entry of history has the fields"),
        ({"requests": [item(0, history=[{"text": 1, "image_b64": image_b64(0)}])]}, "not a string"),
        ({"requests": [item(0, history=[{"text": "a", "image_b64": "!"}])]}, "not base64"),
        ({"requests": [item(0, metadata=[1])]}, "not a list of maps"),
        ({"requests": [item(0, sample_id=["x"])]}, "sample_id is a list"),
        ({"requests": [item(0, group_id="x" * 1025)]}, "group_id has 1025 characters"),
    ],
)
def test_what_is_no_request_says_why(sent: dict[str, Any], message: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.post(PLAIN_SCORE_PATH, json=sent)
        assert (answer.status_code, message in answer.json()["message"]) == (422, True), answer.text

    drive(scenario)

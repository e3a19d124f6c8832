"""Thousands of bodies made to hurt: each is answered with a reason, and the server stays healthy."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from common.rewards.api import SCORE_PATH, ScoreRequest, ScoreResponse
from reward_servers.scorers.pickscore import PickScoreScorer
from tests.helpers.hostile_bodies import KINDS, Hostile, hostile_bodies
from tests.helpers.serving_app import LIMITS, serving_app
from tests.helpers.tiny_rewards import write_pickscore
from tests.helpers.toy_scorers import BrightnessScorer
from tests.integration.test_reward_servers import BRIGHTNESS, running

PER_SEED = 1_300
SEEDS = (0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8)))
OVER_SOCKETS = (2_600, pytest.param(10_400, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]))
WITH_MODELS = {"pickscore": 600, "ocr": 300}
LARGE = LIMITS.max_body_bytes + 1
# Of a body that is read whole before it is refused.
LARGE_READ = 2**23
ANSWER_SECONDS = 60.0


def check(hostile: Hostile, answer: httpx.Response) -> None:
    if hostile.may_be_valid and answer.status_code == httpx.codes.OK:
        return
    assert 400 <= answer.status_code < 500, (hostile.kind, hostile.path, answer.status_code, answer.text[:200])
    assert answer.json()["error"], hostile.kind
    assert answer.json()["message"], hostile.kind


@pytest.mark.parametrize("seed", SEEDS)
def test_every_hostile_body_is_answered_with_a_reason(seed: int) -> None:
    answered: Counter[tuple[str, int]] = Counter()

    async def run() -> None:
        async with serving_app({"brightness": BrightnessScorer()}) as client:
            for hostile in hostile_bodies(PER_SEED, seed, large=LARGE):
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await client.post(hostile.path, content=hostile.body)
                check(hostile, answer)
                answered[hostile.kind, answer.status_code] += 1

    asyncio.run(run())
    assert {kind for kind, _ in answered} == set(KINDS)
    assert {400, 413, 422} <= {status for _, status in answered}
    assert answered.total() == PER_SEED


@pytest.mark.parametrize("name", WITH_MODELS)
def test_models_survive_what_comes_through_to_them(name: str, tmp_path: Path) -> None:
    if name == "ocr":
        scorer = pytest.importorskip("reward_servers.scorers.ocr", exc_type=ImportError).OcrScorer.load(None, "cpu")
    else:
        scorer = PickScoreScorer.load(write_pickscore(tmp_path / "pickscore"), "cpu")
    scored = 0

    async def run() -> None:
        nonlocal scored
        async with serving_app({name: scorer}) as client:
            for hostile in hostile_bodies(WITH_MODELS[name], seed=7, large=LARGE):
                answer = await client.post(hostile.path, content=hostile.body)
                check(hostile, answer)
                scored += answer.status_code == httpx.codes.OK

    asyncio.run(run())
    assert scored > 0


@pytest.mark.parametrize("count", OVER_SOCKETS)
def test_a_real_server_survives_them_in_twice_its_memory(count: int, tmp_path: Path) -> None:
    """At its default limits, with all kinds of them but bodies beyond those limits, which are not read."""
    good = ScoreRequest(np.full((2, 4, 4, 3), 51, np.uint8), ["a", "b"]).to_bytes()
    with (
        running(tmp_path, "--scorer", BRIGHTNESS) as (url, process_id),
        httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client,
    ):
        assert client.post(SCORE_PATH, content=good).status_code == httpx.codes.OK
        before = memory(process_id, "VmRSS")
        for hostile in hostile_bodies(count, seed=99, large=LARGE_READ, leave_out="oversized"):
            check(hostile, client.post(hostile.path, content=hostile.body))
        answer = client.post(SCORE_PATH, content=good)
        most = memory(process_id, "VmHWM")
    np.testing.assert_allclose(ScoreResponse.from_bytes(answer.content).scores_B, 0.2)
    assert most <= 2 * before


def memory(process_id: int, field: str) -> int:
    """KiB, as the kernel counts them."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

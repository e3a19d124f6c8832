"""Prompts that a reward refuses are found before a run, with their file and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import PromptError, RewardUnavailable
from common.rewards.api import ScoreRequest, ScoreResponse
from common.rewards.prompt_check import MOST_TRIED, require_scorable, varied
from common.types import Prompt
from tests.helpers.fake_reward_server import SCORES, client_at, error_body, fake_server

FINE = (200, ScoreResponse("fake", "hash", SCORES[:1]).to_bytes())


def prompts(*metadata: dict[str, Any]) -> list[Prompt]:
    return [Prompt(index, f"prompt {index}", about) for index, about in enumerate(metadata)]


def indices(chosen: list[Prompt]) -> list[int]:
    return [prompt.index for prompt in chosen]


def cup(color: str = "red", **more: Any) -> dict[str, Any]:
    return {"tag": "colors", "include": [{"class": "cup", "color": color, **more}]}


def test_without_metadata_the_first_prompt_stands_for_all() -> None:
    assert indices(varied(prompts(*[{}] * 1000))) == [0]


def test_each_shape_of_metadata_is_tried_once() -> None:
    placed = {"tag": "colors", "include": [{"class": "cup", "position": ["left of", 0]}]}
    shapes = [cup(), {"tag": "colors", "include": []}, {}, cup(count=1), cup(count=1.5), placed]
    chosen = varied(prompts(*[cup()] * 50, *shapes * 20))
    assert sorted(indices(chosen)) == [0, 51, 52, 53, 54, 55]


def test_a_rare_value_is_tried_even_if_every_prompt_has_its_own_number() -> None:
    many = [cup("red" if number % 2 else "blue") | {"id": number} for number in range(5000)]
    many[3210] = cup("rde") | {"id": 3210}
    chosen = varied(prompts(*many))
    assert len(chosen) == MOST_TRIED
    assert indices(chosen)[:2] == [0, 3210]


def test_equal_metadata_is_not_tried_twice() -> None:
    assert indices(varied(prompts(cup(), cup(), cup("blue"), cup("blue"), cup()))) == [0, 2]
    assert indices(varied(prompts({"n": 1}, {"n": True}, {"n": 1.0}, {"n": 1}))) == [0, 1, 2]


def test_a_refused_prompt_is_named_with_its_file_and_number() -> None:
    path = Path("data/geneval.jsonl")
    with fake_server() as server, client_at(server.url) as client:
        server.replies = [FINE, (422, error_body("request"))]
        with pytest.raises(PromptError) as caught:
            require_scorable(client, "fake", path, prompts(cup(), cup("rde"), cup("blue")))
        assert [ScoreRequest.from_bytes(body).metadata for body in server.bodies] == [[cup()], [cup("rde")]]
        assert str(caught.value) == (
            f'data/geneval.jsonl: prompt 2 ("prompt 1") cannot be scored: reward fake at {server.url} answered 422 '
            "(request): details; correct it, leave it out, or do without the reward fake"
        )


def test_a_server_that_fails_is_not_blamed_on_a_prompt() -> None:
    with fake_server() as server, client_at(server.url) as client:
        server.replies = [(401, error_body("unauthorized"))]
        with pytest.raises(RewardUnavailable, match="unauthorized"):
            require_scorable(client, "fake", Path("a.txt"), prompts({}))

"""A scorer of a user's own: former names, and what it takes of sizes and texts."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import ModelError, RewardRejected
from common.rewards.api import GradientRequest, ScoreRequest
from reward_servers.scorers.base import ScorerLimits
from tests.helpers.toy_scorers import BrightnessScorer


def test_a_former_name_of_an_attribute_is_refused_with_the_present_one() -> None:
    with pytest.raises(ModelError, match=r"Mine sets probe_prompt: the name is now check_prompt"):
        type("Mine", (BrightnessScorer,), {"probe_prompt": "a dog"})


def test_the_present_name_is_what_the_start_up_check_asks() -> None:
    mine = type("Mine", (BrightnessScorer,), {"check_prompt": "a dog"})
    assert mine.load(None, "cpu").check_request().prompts == ["a dog"]


LIMITS = ScorerLimits(side_multiple=4, max_pixels=64, prompt_bytes=6, metadata_items=4)


def score_request(height: int = 8, width: int = 8, prompt: str = "a", about: object = None) -> ScoreRequest:
    pictures = np.zeros((2, height, width, 3), np.uint8)
    return ScoreRequest(pictures, [prompt] * 2, [{}, about] if about else ())


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (score_request(8, 6), "8 x 6 pixels, this scorer takes multiples of 4"),
        (score_request(8, 12), "8 x 12 pixels, this scorer takes 64"),
        (GradientRequest(np.zeros((1, 3, 6, 8), np.float32), ["a"]), "6 x 8 pixels"),
        (score_request(prompt="\u20ac" * 3), "a prompt has 9 bytes, this scorer takes 6"),
        (score_request(about={"a": [1, 2, 3]}), "more than 4 items"),
        (score_request(about={"a": {"b": 1}, "c": 1}), "more than 4 items"),
    ],
)
def test_what_a_scorer_does_not_take_is_refused(request_: ScoreRequest | GradientRequest, reason: str) -> None:
    with pytest.raises(RewardRejected, match=reason) as caught:
        LIMITS.check(request_)
    assert caught.value.cause == "request"


def test_what_it_takes_passes() -> None:
    for given in (score_request(), score_request(4, 16), score_request(prompt="\u20ac" * 2)):
        LIMITS.check(given)
    LIMITS.check(score_request(about={"a": [1, 2]}))
    ScorerLimits().check(score_request(1, 7, "a" * 32_768, {"a": list(range(200))}))

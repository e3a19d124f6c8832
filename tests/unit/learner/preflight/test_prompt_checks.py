"""Prompts of both files are tried on the rewards before a run begins."""

from __future__ import annotations

import pytest

from common.config.run import Config
from common.errors import PromptError
from common.rewards.access import RewardAccess
from common.rewards.api import ScoreRequest, ScoreResponse
from common.rewards.client import RewardEndpoint
from common.rewards.guard import Outage
from common.types import Prompt, PromptSets
from learner.preflight.prompt_checks import check_prompts
from tests.helpers.fake_reward_server import SCORES, FakeServer, error_body, fake_server

GOOD = (200, ScoreResponse("fake", "hash", SCORES[:1]).to_bytes())
BAD = (422, error_body("request"))
TRAIN = [Prompt(0, "train 0", {"count": 1}), Prompt(1, "train 1", {"count": "two"})]


def run_of(**servers: FakeServer) -> tuple[Config, RewardAccess]:
    """A run that trains on the first reward alone, and its access to the servers."""
    weights = [1, *[0] * len(servers)]
    config = Config.model_validate(
        {
            "run": {"name": "test"},
            "backbone": {"path": "model"},
            "prompts": {"train": "a.txt", "evaluation": "b.jsonl"},
            "alignment": {"reward_gradient_weight": 0},
            "rewards": [
                {"name": name, "url": server.url, "weight": weight}
                for (name, server), weight in zip(servers.items(), weights, strict=False)
            ],
            "reward_client": {"attempts": 1, "timeout_s": 5},
        }
    )
    endpoints = tuple(RewardEndpoint(reward.name, url) for reward in config.rewards for url in reward.urls)
    outages = {reward.name: Outage(reward.outage, reward.outage_limit_s) for reward in config.rewards}
    return config, RewardAccess(endpoints, outages, config.reward_client, None, None, 0)


def test_a_trained_reward_scores_prompts_of_both_files_and_another_one_the_evaluations() -> None:
    with fake_server() as trained, fake_server() as gold:
        trained.replies = gold.replies = [GOOD]
        check_prompts(*run_of(trained=trained, gold=gold), PromptSets(TRAIN, TRAIN, [Prompt(0, "evaluation", {})]))
        sent = [[ScoreRequest.from_bytes(body).prompts for body in server.bodies] for server in (trained, gold)]
    assert sent == [[["train 0"], ["train 1"], ["evaluation"]], [["evaluation"]]]


@pytest.mark.parametrize(
    ("replies", "named"),
    [
        ([BAD], "a.txt: prompt 1"),
        ([GOOD, BAD], "a.txt: prompt 2"),
        ([GOOD, GOOD, BAD], "b.jsonl: prompt 1"),
    ],
)
def test_a_refused_prompt_is_named_with_its_file(replies: list[tuple[int, bytes]], named: str) -> None:
    with fake_server() as server:
        server.replies = list(replies)
        with pytest.raises(PromptError) as caught:
            check_prompts(*run_of(geneval=server), PromptSets([], TRAIN, [Prompt(0, "held out", {})]))
    assert str(caught.value).startswith(f"{named} (")
    assert "cannot be scored: reward geneval at http" in str(caught.value)

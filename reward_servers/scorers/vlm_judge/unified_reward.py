"""UnifiedReward (Wang et al. 2025, arXiv 2503.05236) behind vLLM: point scores that the model writes out.

    image, prompt.json with the caption  ─►  greedy reply  ─►  its scores, each 1 to 5  ─►  mean / 5

The model directory holds judge.yaml (`settings.py`; its rubric and answers are not used) and prompt.json, which
`unified_prompt.py` extracts from a published script. Its text decides between UnifiedReward-2.0's three scores
(alignment, coherence, style) and the one final score of earlier versions. A division by 5 as in Flow-GRPO's reward; the
mean over three scores is a choice of ours.

The published scripts send JPEGs to vLLM, this scorer sends the picture without loss. Flow-GRPO counts a reply without a
score as 0; here it fails its request. Not verified here, because the weights are not available: a published score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import RewardInvalid
from common.rewards.api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.vlm_judge.client import VllmClient, data_url
from reward_servers.scorers.vlm_judge.judge import JudgeScorer
from reward_servers.scorers.vlm_judge.server import VllmProcess
from reward_servers.scorers.vlm_judge.settings import JudgeSettings, ask_about
from reward_servers.scorers.vlm_judge.unified_prompt import labels_of, read_unified_prompt

LOWEST, HIGHEST = 1.0, 5.0
MOST_TOKENS = 1024
"""A reply of more tokens has lost its way: those of the published formats have at most a few hundred."""
PROMPT, LIMIT = "prompt", "most tokens"


class UnifiedRewardScorer(JudgeScorer):
    """score = mean of the scores that the reply states / 5, in [0.2, 1]; no gradient."""

    name = "unified_reward"
    score_range = (LOWEST / HIGHEST, 1.0)
    preprocess_version = "unified_reward-1"

    def __init__(
        self, settings: JudgeSettings, texts: Mapping[str, str], client: VllmClient, process: VllmProcess | None
    ) -> None:
        super().__init__(settings, texts, client, process)
        self._prompt = texts[PROMPT]
        self._labels = labels_of(self._prompt)

    @classmethod
    def texts(cls, settings: JudgeSettings, directory: Path) -> dict[str, str]:  # noqa: ARG003
        return {PROMPT: read_unified_prompt(directory), LIMIT: str(MOST_TOKENS)}

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        """RewardUnavailable or RewardInvalid when an image has no valid reply."""
        asked = [
            (data_url(image), ask_about(self._prompt, prompt))
            for image, prompt in zip(images_BHWC, prompts, strict=True)
        ]
        return np.array(self.ask_all(self._score, asked), dtype=np.float32)

    def _score(self, asked: tuple[str, str], deadline: float) -> float:
        reply = self._client.reply(*asked, MOST_TOKENS, deadline)
        scores = [stated_score(reply, label) for label in self._labels]
        return sum(scores) / len(scores) / HIGHEST


def stated_score(reply: str, label: str) -> float:
    """The number after the last `label:` of a reply; RewardInvalid when there is none from 1 to 5."""
    found = re.findall(rf"{re.escape(label)}:\s*(\d+(?:\.\d+)?)", reply)
    if not found or not LOWEST <= float(found[-1]) <= HIGHEST:
        message = f"the reply states no {label} from {LOWEST:g} to {HIGHEST:g}: {reply[-80:]!r}"
        raise RewardInvalid(UnifiedRewardScorer.name, "answer", message)
    return float(found[-1])

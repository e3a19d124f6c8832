"""Vision-language model as a judge, served by vLLM: Qwen2.5-VL, Qwen3-VL and similar models.

    each image, each question of the rubric  ─►  p = P(yes) / (P(yes) + P(no))  ─►  score = geometric mean of the p's

The probabilities are those of the first word of the reply. They are read directly and not sampled (cf. VQAScore, Lin et
al. 2024, arXiv 2404.01291), so the score is smooth and deterministic. With the geometric mean no question compensates
for another: a beautiful image of the wrong thing scores low.

The model directory (`--model DIR`) holds judge.yaml and a rubric: see `settings.py`. Images are sent inside the
request, and control tokens spelt out in a prompt are escaped.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import RewardInvalid
from common.rewards.api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.vlm_judge.client import IMPOSSIBLE, JUDGE, VllmClient, data_url
from reward_servers.scorers.vlm_judge.judge import JudgeScorer
from reward_servers.scorers.vlm_judge.server import VllmProcess
from reward_servers.scorers.vlm_judge.settings import JudgeSettings, ask_about, read_rubric

QUESTION = "question "
"""Begins the name of a rubric's question among the texts."""


class VlmJudgeScorer(JudgeScorer):
    """Geometric mean of the rubric's P(yes) / (P(yes) + P(no)), in [0, 1]; no gradient."""

    name = JUDGE
    score_range = (0.0, 1.0)

    def __init__(
        self, settings: JudgeSettings, texts: Mapping[str, str], client: VllmClient, process: VllmProcess | None
    ) -> None:
        super().__init__(settings, texts, client, process)
        self._questions = [text for name, text in texts.items() if name.startswith(QUESTION)]
        self._answers = [client.token(settings.positive_answer), client.token(settings.negative_answer)]

    @classmethod
    def texts(cls, settings: JudgeSettings, directory: Path) -> dict[str, str]:  # noqa: ARG003
        questions = {f"{QUESTION}{name}": text for name, text in read_rubric(settings.rubric).items()}
        return questions | {"positive": settings.positive_answer, "negative": settings.negative_answer}

    def direct_question(self) -> tuple[str, Sequence[int]]:
        return ask_about(self._questions[0], self.check_prompt), self._answers

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        """RewardUnavailable or RewardInvalid when any question about any image stays unanswered."""
        urls = [data_url(image) for image in images_BHWC]
        asked = [
            (url, ask_about(question, prompt))
            for (url, prompt), question in itertools.product(zip(urls, prompts, strict=True), self._questions)
        ]
        log_odds = self.ask_all(self._log_odds, asked)
        return geometric_mean(np.reshape(log_odds, (len(urls), len(self._questions))))

    def _log_odds(self, asked: tuple[str, str], deadline: float) -> float:
        positive, negative = self._client.log_probabilities(*asked, self._answers, deadline)
        if max(positive, negative) <= IMPOSSIBLE:
            message = "to the judge neither answer is possible: are positive_answer and negative_answer right?"
            raise RewardInvalid(JUDGE, "answer", f"{self._client.where}: {message}")
        return positive - negative


def geometric_mean(log_odds_BQ: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> FloatArray:
    """Log-odds of yes against no -> (p_1 ... p_Q)^(1 / Q), p = 1 / (1 + exp(-log-odds)): float32 [B]."""
    log_p_BQ = -np.logaddexp(0.0, -log_odds_BQ)
    scores_B: FloatArray = np.exp(log_p_BQ.mean(axis=1)).astype(np.float32)
    return scores_B

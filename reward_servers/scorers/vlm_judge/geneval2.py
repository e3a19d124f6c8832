"""GenEval 2 (Kamath et al. 2025, arXiv 2512.16853) with Soft-TIFA, by a vision-language model behind vLLM.

    each image, each question of its prompt  ─►  p = P(a correct answer as the first token)  ─►  a mean of the p's

`geneval2` is the geometric mean, the benchmark's estimate for whole prompts (Soft-TIFA GM); `geneval2_parts` is the
arithmetic mean, its estimate for atoms (AM). The p of a question is the sum, over the spellings of its answer, of the
probability of the spelling's first token among all tokens: nothing is normalised over yes and no, and of "10" the "1"
counts. Questions and answers come with the metadata (`atoms.py`). The benchmark's figure is 100 times the mean over its
800 prompts. Its judge is Qwen/Qwen3-VL-8B-Instruct; judge.yaml names the model (its rubric and answers are not used).

Departures: spellings that begin with the same token count once, where the released script adds it for each (Qwen's
tokenizer splits digits and spaces, so none of one answer do); control tokens spelt out in a question are escaped. Not
verified here, because weights are not available: a published score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import ModelError
from common.rewards.api import ByteArray, FloatArray, Metadata
from reward_servers.scorers.vlm_judge.atoms import ANSWERS, INSTRUCTION, KEY, NO, YES, Atom, parse_atoms
from reward_servers.scorers.vlm_judge.client import VllmClient, data_url
from reward_servers.scorers.vlm_judge.judge import JudgeScorer
from reward_servers.scorers.vlm_judge.server import VllmProcess
from reward_servers.scorers.vlm_judge.settings import JudgeSettings


class Geneval2Scorer(JudgeScorer):
    """score = geometric mean of the atoms' probabilities, in [0, 1]; no gradient."""

    name = "geneval2"
    score_range = (0.0, 1.0)
    preprocess_version = "geneval2-1"
    check_prompt = "a dog"
    check_metadata = {KEY: [["How many dogs are in the image?", "one"], ["Are there any dogs in the image?", "Yes"]]}  # noqa: RUF012

    def __init__(
        self, settings: JudgeSettings, texts: Mapping[str, str], client: VllmClient, process: VllmProcess | None
    ) -> None:
        super().__init__(settings, texts, client, process)
        self._tokens = {spellings: first_tokens(client, spellings) for spellings in ANSWERS}
        self._yes_or_no = first_tokens(client, (*YES, *NO))

    @classmethod
    def texts(cls, settings: JudgeSettings, directory: Path) -> dict[str, str]:  # noqa: ARG003
        return {"protocol": "soft-tifa"}

    def direct_question(self) -> tuple[str, Sequence[int]]:
        return f"Is the image grey? {INSTRUCTION}", self._yes_or_no

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        """RewardRejected for metadata that is not the benchmark's; otherwise as `JudgeScorer.ask_all`."""
        atoms = [parse_atoms(item) for item in metadata]
        urls = [data_url(image) for image in images_BHWC]
        asked = [(url, atom) for url, those in zip(urls, atoms, strict=True) for atom in those]
        ends = np.cumsum([len(those) for those in atoms])[:-1]
        of_images = np.split(np.array(self.ask_all(self._log_probability, asked)), ends)
        return np.array([self.mean(log_p) for log_p in of_images], dtype=np.float32)

    @staticmethod
    def mean(log_p: FloatArray) -> float:
        """ln p of each atom of an image -> its score."""
        return float(np.exp(log_p.mean()))

    def _log_probability(self, asked: tuple[str, Atom], deadline: float) -> float:
        url, atom = asked
        values = self._client.log_probabilities(url, atom.question, self._tokens[atom.answers], deadline)
        # Rounding may carry a sum of probabilities beyond 1.
        return min(0.0, float(np.logaddexp.reduce(values)))


class Geneval2PartsScorer(Geneval2Scorer):
    """score = arithmetic mean of the atoms' probabilities."""

    name = "geneval2_parts"

    @staticmethod
    def mean(log_p: FloatArray) -> float:
        return float(np.exp(log_p).mean())


def first_tokens(client: VllmClient, spellings: Sequence[str]) -> list[int]:
    """The first token of each spelling, each once; ModelError when a spelling has none."""
    found: dict[int, None] = {}
    for spelling in spellings:
        tokens = client.tokens(spelling)
        if not tokens:
            raise ModelError(f"the answer {spelling!r} has no token for {client.where}: is it a Qwen3-VL?")
        found[tokens[0]] = None
    return list(found)

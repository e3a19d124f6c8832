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
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx
import numpy as np
import xxhash

from common.errors import ModelError
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.rewards.bearer import bearer_token
from common.rewards.proxies import UNUSABLE_ENVIRONMENT, trusts_environment, unusable_environment
from common.wire import fingerprint
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.vlm_judge.client import JUDGE, Answers, VllmClient, data_url
from reward_servers.scorers.vlm_judge.server import VllmProcess
from reward_servers.scorers.vlm_judge.settings import JudgeSettings, LaunchSettings, ask_about, escape, read_rubric

API_KEY_VARIABLE = "JUDGE_API_KEY"
CONNECT_SECONDS = 120.0
"""A server that already listens may take this long to name its model."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""These files of a model directory decide a score: weights, tokenizer, chat template, model and processor settings."""
NOT_THE_MODEL = ("figures.json",)
HASH_CHUNK = 2**24


class VlmJudgeScorer(Scorer):
    """Geometric mean of the rubric's P(yes) / (P(yes) + P(no)), in [0, 1]; no gradient."""

    name = JUDGE
    score_range = (0.0, 1.0)
    differentiable = False
    precisions = ()

    def __init__(
        self, settings: JudgeSettings, rubric: dict[str, str], client: VllmClient, process: VllmProcess | None
    ) -> None:
        self._settings = settings
        self._questions = list(rubric.values())
        self._client = client
        self._process = process
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")
        self._answers = Answers(client.token(settings.positive_answer), client.token(settings.negative_answer))

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        """Start vLLM or connect to it, and wait for it; ModelError with the end of vLLM's log if it does not start."""
        if model_dir is None:
            raise ModelError("the vlm_judge scorer needs the directory of its judge.yaml: pass --model DIR")
        settings = JudgeSettings.read(model_dir)
        rubric = read_rubric(settings.rubric)
        launch = settings.launch
        if launch is None:
            process = None
            client = VllmClient(_http_of_url(str(settings.url)), f"the vLLM server at {settings.url}", _unknown)
        else:
            refuse_unescapable(launch.model)
            process = VllmProcess(launch, device)
            transport = httpx.HTTPTransport(uds=str(process.socket_file))
            http = httpx.Client(transport=transport, base_url="http://localhost")
            client = VllmClient(http, f"the vLLM server of {launch.model}", process.died)
        try:
            if launch is not None and process is not None:
                process.wait(launch.ready_timeout_s)
            served = client.connect(CONNECT_SECONDS)
            scorer = cls(settings, rubric, client, process)
        except BaseException:
            client.close()
            if process is not None:
                process.stop()
            raise
        scorer.weights_hash = _identity(settings, rubric, served, launch)
        return scorer

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        """RewardUnavailable or RewardInvalid when any question about any image stays unanswered."""
        deadline = time.monotonic() + self._settings.timeout_s
        urls = [data_url(image) for image in images_BHWC]
        asked = [
            (url, ask_about(question, prompt))
            for (url, prompt), question in itertools.product(zip(urls, prompts, strict=True), self._questions)
        ]
        ask = self._client.log_probabilities
        answers = [self._threads.submit(ask, *one, self._answers, deadline) for one in asked]
        try:
            log_odds = [positive - negative for positive, negative in (answer.result() for answer in answers)]
        finally:
            for answer in answers:
                answer.cancel()
        return geometric_mean(np.reshape(log_odds, (len(urls), len(self._questions))))

    def close(self) -> None:
        """Stop vLLM if this process started it. The end of the process does the same."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()
        if self._process is not None:
            self._process.stop()


def geometric_mean(log_odds_BQ: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> FloatArray:
    """Log-odds of yes against no -> (p_1 ... p_Q)^(1 / Q), p = 1 / (1 + exp(-log-odds)): float32 [B]."""
    log_p_BQ = -np.logaddexp(0.0, -log_odds_BQ)
    scores_B: FloatArray = np.exp(log_p_BQ.mean(axis=1)).astype(np.float32)
    return scores_B


def refuse_unescapable(model: Path) -> None:
    """ModelError if a prompt could still spell one of the model's added tokens."""
    path = model / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing: without it nothing tells which tokens a prompt must not spell")
    tokens = [entry["content"] for entry in json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])]
    spelt = [token for token in tokens if token in escape(token)]
    if spelt:
        raise ModelError(f"{path} adds the tokens {spelt[:5]}, which a prompt could spell: this judge is not supported")


def _http_of_url(url: str) -> httpx.Client:
    key = bearer_token(os.environ.get(API_KEY_VARIABLE), API_KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        # Clients of OpenAI's API want the same address with /v1 at its end.
        base_url = url.rstrip("/").removesuffix("/v1")
        return httpx.Client(base_url=base_url, headers=headers, trust_env=trusts_environment(url))
    except UNUSABLE_ENVIRONMENT as error:
        raise ModelError(f"{url}: {unusable_environment(error)}") from error


def _unknown(within_s: float) -> None:
    """None: whether a server that this process did not start has died is unknown."""


def _identity(settings: JudgeSettings, rubric: dict[str, str], served: str, launch: LaunchSettings | None) -> str:
    """Everything that decides a score. For a server given by URL, only its model's name is known."""
    answers = {"positive": settings.positive_answer, "negative": settings.negative_answer}
    asked = {f"question {name}": text for name, text in rubric.items()} | answers
    model = {"served": served} if launch is None else {path.name: _file_hash(path) for path in _files(launch.model)}
    how = {} if launch is None else {"arguments": repr(launch.arguments), "environment": repr(launch.environment)}
    return fingerprint(asked | model | how)


def _files(model: Path) -> list[Path]:
    found = [path for pattern in MODEL_FILES for path in model.glob(pattern)]
    return [path for path in found if path.name not in NOT_THE_MODEL]


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

"""The base of all judges: it starts or connects to a vLLM server, and asks its questions in parallel."""

from __future__ import annotations

import json
import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

import httpx
import xxhash

from common.errors import ModelError, RewardError
from common.rewards.bearer import bearer_token
from common.rewards.proxies import UNUSABLE_ENVIRONMENT, trusts_environment, unusable_environment
from common.wire import fingerprint
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.vlm_judge.client import VllmClient, data_url
from reward_servers.scorers.vlm_judge.server import VllmProcess
from reward_servers.scorers.vlm_judge.settings import JudgeSettings, LaunchSettings, escape

API_KEY_VARIABLE = "JUDGE_API_KEY"
CONNECT_SECONDS = 120.0
"""A server that already listens may take this long to name its model."""
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt")
"""These files of a model directory decide a score: weights, tokenizer, chat template, model and processor settings."""
LEAST_SHARE = 0.01
"""Least probability that a reply begins with one of the answers. Of a model that thinks first it is far less."""
NOT_THE_MODEL = ("figures.json",)
HASH_CHUNK = 2**24

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class JudgeScorer(Scorer):
    """Scores an image by the answers of a vision-language model behind vLLM; no gradient.

    A subclass says what it asks (`texts`) and makes scores of the answers. Its constructor may ask for tokens.
    """

    differentiable = False
    precisions = ()

    def __init__(
        self, settings: JudgeSettings, texts: Mapping[str, str], client: VllmClient, process: VllmProcess | None
    ) -> None:
        self._settings = settings
        self._texts = dict(texts)
        self._client = client
        self._process = process
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")

    @classmethod
    @abstractmethod
    def texts(cls, settings: JudgeSettings, directory: Path) -> dict[str, str]:
        """All texts that decide what is asked, by name; ModelError when they are missing or invalid."""

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        """Start vLLM or connect to it, and wait for it; ModelError with the end of vLLM's log if it does not start."""
        if model_dir is None:
            raise ModelError(f"the {cls.name} scorer needs the directory of its judge.yaml: pass --model DIR")
        settings = JudgeSettings.read(model_dir)
        texts = cls.texts(settings, model_dir)
        launch = settings.launch
        if launch is None:
            process = None
            client = VllmClient(
                _http_of_url(str(settings.url)), f"the vLLM server at {settings.url}", _unknown, cls.name
            )
        else:
            refuse_unescapable(launch.model)
            process = VllmProcess(launch, device)
            transport = httpx.HTTPTransport(uds=str(process.socket_file))
            http = httpx.Client(transport=transport, base_url="http://localhost")
            client = VllmClient(http, f"the vLLM server of {launch.model}", process.died, cls.name)
        try:
            if launch is not None and process is not None:
                process.wait(launch.ready_timeout_s)
            served = client.connect(CONNECT_SECONDS)
            version = client.version()
            scorer = cls(settings, texts, client, process)
            scorer._require_direct_replies()
        except BaseException:
            client.close()
            if process is not None:
                process.stop()
            raise
        scorer.weights_hash = _identity(texts, served, version, launch)
        return scorer

    def direct_question(self) -> tuple[str, Sequence[int]] | None:
        """A question about any image, and the tokens with which its reply may begin; None if replies are read whole."""
        return None

    def _require_direct_replies(self) -> None:
        """ModelError if replies do not begin with an answer: the probabilities that are read would be noise."""
        asked = self.direct_question()
        if asked is None:
            return
        question, tokens = asked
        image, deadline = data_url(self.check_request().images_BHWC[0]), time.monotonic() + self._settings.timeout_s
        try:
            share = sum(map(math.exp, self._client.log_probabilities(image, question, tokens, deadline)))
        except RewardError as error:
            raise ModelError(f"a question about a grey picture failed: {error}") from error
        if share < LEAST_SHARE:
            raise ModelError(
                f"{self._client.where} does not begin its reply with an answer (their probabilities add up to "
                f"{share:.1g}, asked {question!r}): serve a model that answers without thinking first, such as an "
                "Instruct one, switch its thinking off, or change the answers in judge.yaml"
            )

    def ask_all(self, ask: Callable[[Question, float], Answer], questions: Sequence[Question]) -> list[Answer]:
        """The answers to all questions, asked at once with one deadline; the first error if one stays unanswered."""
        deadline = time.monotonic() + self._settings.timeout_s
        answers = [self._threads.submit(ask, question, deadline) for question in questions]
        try:
            return [answer.result() for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()

    def close(self) -> None:
        """Stop vLLM if this process started it. The end of the process does the same."""
        self._threads.shutdown(cancel_futures=True)
        self._client.close()
        if self._process is not None:
            self._process.stop()


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


def _identity(texts: Mapping[str, str], served: str, version: str, launch: LaunchSettings | None) -> str:
    """Everything that decides a score. For a server given by URL, only its model's name and its version are known."""
    model = {"served": served} if launch is None else {path.name: _file_hash(path) for path in _files(launch.model)}
    how = {} if launch is None else {"arguments": repr(launch.arguments), "environment": repr(launch.environment)}
    return fingerprint(dict(texts) | model | how | {"vllm": version})


def _files(model: Path) -> list[Path]:
    found = [path for pattern in MODEL_FILES for path in model.glob(pattern)]
    return [path for path in found if path.name not in NOT_THE_MODEL]


def _file_hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()

"""Asks a vLLM server (its OpenAI-compatible API, plus vLLM's own `logprob_token_ids` and /tokenize).

Every request has a deadline, every answer is checked, and every failure is an error that names the server.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from common.errors import ModelError, RewardError, RewardInvalid, RewardUnavailable
from common.rewards.api import ByteArray

JUDGE = "vlm_judge"
POLL_SECONDS = 0.2
HELLO_TIMEOUT_S = 60.0
DEATH_SECONDS = 5.0
MAX_ANSWER_BYTES = 2**22
TOKEN_PREFIX = "token_id:"
IMPOSSIBLE = -9999.0
"""What vLLM writes for the logarithm of zero."""


@dataclass(frozen=True)
class Answers:
    """The token ids of the two answers."""

    positive: int
    negative: int


class VllmClient:
    """One server.

    Args:
        http: a client whose base URL or transport leads to the server.
        where: names the server in errors.
        died: what happened to the server when it is known to be dead within so many seconds; None when it is not.
    """

    def __init__(self, http: httpx.Client, where: str, died: Callable[[float], str | None]) -> None:
        self._http = http
        self._where = where
        self._died = died
        self._model = ""

    def connect(self, timeout_s: float) -> str:
        """Wait until the server answers; the name of its model.

        Raises:
            ModelError: it died, or did not answer within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                listed = self._request("GET", "/v1/models", None, min(deadline, time.monotonic() + HELLO_TIMEOUT_S))
                self._model = str(listed["data"][0]["id"])
                return self._model
            except (KeyError, IndexError, TypeError) as error:
                raise ModelError(f"{self._where} lists no model: {error!r}; is it a vLLM server?") from error
            except RewardError as error:
                if error.cause == "died" or time.monotonic() > deadline:
                    raise ModelError(f"no judge within {timeout_s:g} s: {error}") from error
            time.sleep(POLL_SECONDS)

    def token(self, text: str) -> int:
        """The one token of `text`; ModelError when it has several: only a single token has one probability."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            tokens = self._request("POST", "/tokenize", body, time.monotonic() + HELLO_TIMEOUT_S)["tokens"]
            (token,) = tokens
            return int(token)
        except RewardError as error:
            raise ModelError(f"the answer {text!r} could not be tokenized: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the answer {text!r} is not one token for {self._where}: choose another word") from error

    def log_probabilities(
        self, image_url: str, question: str, answers: Answers, deadline: float
    ) -> tuple[float, float]:
        """ln P(positive) and ln P(negative) of the first token of the reply; `deadline` as time.monotonic().

        Raises:
            RewardUnavailable: the server is gone, or too slow.
            RewardInvalid: it refused the question, or answered something that is no pair of log-probabilities.
        """
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "logprob_token_ids": [answers.positive, answers.negative],
            "return_tokens_as_token_ids": True,
        }
        reply = self._request("POST", "/v1/chat/completions", body, deadline)
        positive, negative = (self._read(reply, token) for token in (answers.positive, answers.negative))
        if max(positive, negative) <= IMPOSSIBLE:
            message = f"to {self._where} neither answer is possible: are positive_answer and negative_answer right?"
            raise RewardInvalid(JUDGE, "answer", message)
        return positive, negative

    def close(self) -> None:
        self._http.close()

    def _read(self, reply: Any, token: int) -> float:
        try:
            listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {entry["token"]: float(entry["logprob"]) for entry in listed}
            value = found[f"{TOKEN_PREFIX}{token}"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            message = f"{self._where} gave no log-probability of token {token} ({error!r}): is it vLLM >= 0.32?"
            raise RewardInvalid(JUDGE, "answer", message) from error
        if not math.isfinite(value):
            raise RewardInvalid(JUDGE, "nan", f"{self._where} gave the log-probability {value} of token {token}")
        return value

    def _request(self, method: str, path: str, body: object, deadline: float) -> Any:
        """One exchange of JSON; RewardError for everything that is not an answer of status 200."""
        status, content = self._exchange(method, path, body, deadline)
        if status != httpx.codes.OK:
            detail = content[:300].decode(errors="replace")
            # 503: it is still loading. Anything else is about this question.
            kind = RewardUnavailable if status >= httpx.codes.INTERNAL_SERVER_ERROR else RewardInvalid
            raise kind(JUDGE, "scorer", f"{self._where} answered {path} with {status}: {detail}")
        try:
            return json.loads(content)
        except ValueError as error:
            raise RewardInvalid(JUDGE, "answer", f"{self._where} answered {path} with no JSON: {error}") from error

    def _exchange(self, method: str, path: str, body: object, deadline: float) -> tuple[int, bytes]:
        # httpx bounds each read, not their sum: the deadline is looked at after every piece.
        content = bytearray()
        try:
            timeout = max(0.001, deadline - time.monotonic())
            with self._http.stream(method, path, json=body, timeout=timeout) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer came too slowly")
                    if len(content) > MAX_ANSWER_BYTES:
                        message = f"{self._where} answered {path} with more than {MAX_ANSWER_BYTES} bytes"
                        raise RewardInvalid(JUDGE, "answer", message)
                return response.status_code, bytes(content)
        except httpx.TimeoutException as error:
            message = f"{self._where} did not answer {path} in time: raise timeout_s, or lower the server's --max-batch"
            raise RewardUnavailable(JUDGE, "timeout", message) from error
        except httpx.TransportError as error:
            # A connection that breaks is often the first sign of a death that is still under way.
            died = self._died(0.0 if isinstance(error, httpx.ConnectError) else DEATH_SECONDS)
            cause = "disconnected" if died is None else "died"
            message = died or f"{self._where} cannot be reached: {error!r}"
            raise RewardUnavailable(JUDGE, cause, message) from error


def data_url(image_HWC: ByteArray) -> str:
    """The picture itself as a URL, lossless: nothing is left for vLLM to fetch."""
    png = io.BytesIO()
    Image.fromarray(image_HWC).save(png, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()

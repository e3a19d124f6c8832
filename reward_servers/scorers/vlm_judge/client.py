"""Client of a vLLM server (its OpenAI-compatible API, plus vLLM's own `logprob_token_ids` and /tokenize).

Every request has a deadline, every response is checked, and every failure is an error that names the server.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from PIL import Image

from common.errors import ModelError, RewardError, RewardInvalid, RewardUnavailable
from common.rewards.api import ByteArray
from common.rewards.http import remedy_of_status, shown_answer
from common.rewards.proxies import UNREACHED, unreachable

JUDGE = "vlm_judge"
POLL_SECONDS = 0.2
HELLO_TIMEOUT_S = 60.0
DEATH_SECONDS = 5.0
MAX_ANSWER_BYTES = 2**22
PASSING = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_EARLY, httpx.codes.TOO_MANY_REQUESTS)
"""Statuses that say to ask again."""
TOKEN_PREFIX = "token_id:"
IMPOSSIBLE = -9999.0
"""vLLM writes this for the logarithm of zero."""


class VllmClient:
    """Client of one server.

    Args:
        http: a client whose base URL or transport leads to the server.
        where: the server's name in errors.
        died: waits up to so many seconds; returns what ended the server if it is known to be dead, else None.
        name: the reward in errors.
    """

    def __init__(self, http: httpx.Client, where: str, died: Callable[[float], str | None], name: str = JUDGE) -> None:
        self._http = http
        self.where = where
        self._name = name
        self._died = died
        self._model = ""

    def connect(self, timeout_s: float) -> str:
        """Wait until the server answers; return the name of its model.

        Raises:
            ModelError: the server died, refused the request, or did not answer within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                listed = self._request("GET", "/v1/models", None, min(deadline, time.monotonic() + HELLO_TIMEOUT_S))
                self._model = str(listed["data"][0]["id"])
                return self._model
            except (KeyError, IndexError, TypeError) as error:
                raise ModelError(f"{self.where} lists no model: {error!r}; is it a vLLM server?") from error
            except RewardInvalid as error:  # such as a wrong path or key: waiting changes nothing
                raise ModelError(f"no judge: {error}; check its url and key") from error
            except RewardError as error:
                if error.cause == "died" or time.monotonic() > deadline:
                    raise ModelError(f"no judge within {timeout_s:g} s: {error}") from error
            time.sleep(POLL_SECONDS)

    def version(self) -> str:
        """The version of vLLM; ModelError when the server names none."""
        try:
            return str(self._request("GET", "/version", None, time.monotonic() + HELLO_TIMEOUT_S)["version"])
        except RewardError as error:
            raise ModelError(f"the version of vLLM is unknown: {error}") from error
        except (KeyError, TypeError) as error:
            raise ModelError(f"{self.where} names no version: is it a vLLM server?") from error

    def token(self, text: str) -> int:
        """The single token of `text`; ModelError when it has several: only a single token has one probability."""
        tokens = self.tokens(text)
        if len(tokens) != 1:
            raise ModelError(f"the answer {text!r} is not one token for {self.where}: choose another word")
        return tokens[0]

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, without those that a model puts before every text; ModelError when there are none."""
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        try:
            found = self._request("POST", "/tokenize", body, time.monotonic() + HELLO_TIMEOUT_S)["tokens"]
            return [int(token) for token in found]
        except RewardError as error:
            raise ModelError(f"the answer {text!r} could not be tokenized: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{self.where} answered /tokenize with no tokens of {text!r}: {error!r}") from error

    def log_probabilities(self, image_url: str, question: str, tokens: Sequence[int], deadline: float) -> list[float]:
        """ln P of each token as the first one of the reply; `deadline` as time.monotonic().

        Raises:
            RewardUnavailable: the server is gone or too slow.
            RewardInvalid: the server refused the question, or its response lacks one of the log-probabilities.
        """
        asked = {
            "max_tokens": 1,
            "logprobs": True,
            "logprob_token_ids": list(tokens),
            "return_tokens_as_token_ids": True,
        }
        reply = self._chat(image_url, question, asked, deadline)
        return [self._read(reply, token) for token in tokens]

    def reply(self, image_url: str, question: str, most_tokens: int, deadline: float) -> str:
        """The likeliest reply, token by token.

        Raises:
            RewardUnavailable: as `log_probabilities`.
            RewardInvalid: also a reply of more than `most_tokens` tokens.
        """
        reply = self._chat(image_url, question, {"max_tokens": most_tokens}, deadline)
        try:
            choice = reply["choices"][0]
            text, ending = choice["message"]["content"], choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise RewardInvalid(self._name, "answer", f"{self.where} gave no reply ({error!r}): is it vLLM?") from error
        if ending != "stop" or not isinstance(text, str):
            message = f"{self.where} did not end its reply within {most_tokens} tokens ({ending}): {str(text)[:80]!r}"
            raise RewardInvalid(self._name, "answer", message)
        return text

    def _chat(self, image_url: str, question: str, more: dict[str, Any], deadline: float) -> Any:
        content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": question}]
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return self._request("POST", "/v1/chat/completions", body | more, deadline)

    def close(self) -> None:
        self._http.close()

    def _read(self, reply: Any, token: int) -> float:
        try:
            listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = {entry["token"]: float(entry["logprob"]) for entry in listed}
            value = found[f"{TOKEN_PREFIX}{token}"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            message = f"{self.where} gave no log-probability of token {token} ({error!r}): is it vLLM >= 0.32?"
            raise RewardInvalid(self._name, "answer", message) from error
        if not math.isfinite(value):
            raise RewardInvalid(self._name, "nan", f"{self.where} gave the log-probability {value} of token {token}")
        return value

    def _request(self, method: str, path: str, body: object, deadline: float) -> Any:
        """One JSON request; RewardError for every response whose status is not 200."""
        status, headers, content = self._exchange(method, path, body, deadline)
        if status != httpx.codes.OK:
            # 503: the model is still loading. Other statuses that do not pass are about this question.
            kind = (
                RewardUnavailable if status in PASSING or status >= httpx.codes.INTERNAL_SERVER_ERROR else RewardInvalid
            )
            told = f"{shown_answer(content)}{remedy_of_status(status, headers)}"
            raise kind(self._name, "scorer", f"{self.where} answered {path} with {status}: {told}")
        try:
            return json.loads(content)
        except ValueError as error:
            raise RewardInvalid(self._name, "answer", f"{self.where} answered {path} with no JSON: {error}") from error

    def _exchange(self, method: str, path: str, body: object, deadline: float) -> tuple[int, httpx.Headers, bytes]:
        # httpx limits each read, not their sum: the deadline is checked after every chunk.
        content = bytearray()
        try:
            timeout = max(0.001, deadline - time.monotonic())
            with self._http.stream(method, path, json=body, timeout=timeout) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer came too slowly")
                    if len(content) > MAX_ANSWER_BYTES:
                        message = f"{self.where} answered {path} with more than {MAX_ANSWER_BYTES} bytes"
                        raise RewardInvalid(self._name, "answer", message)
                return response.status_code, response.headers, bytes(content)
        except httpx.TimeoutException as error:
            message = f"{self.where} did not answer {path} in time: raise timeout_s, or lower the server's --max-batch"
            raise RewardUnavailable(self._name, "timeout", message) from error
        except httpx.TransportError as error:
            # A broken connection is often the first sign that the server is dying: wait a moment for its exit.
            died = self._died(0.0 if isinstance(error, httpx.ConnectError) else DEATH_SECONDS)
            cause = "disconnected" if died is None else "died"
            remedy = unreachable(str(self._http.base_url), "") if isinstance(error, UNREACHED) else ""
            message = died or f"{self.where} cannot be reached: {error!r}{remedy and ': '}{remedy}"
            raise RewardUnavailable(self._name, cause, message) from error


def data_url(image_HWC: ByteArray) -> str:
    """The image itself as a URL, lossless, so that vLLM downloads nothing."""
    png = io.BytesIO()
    Image.fromarray(image_HWC).save(png, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()

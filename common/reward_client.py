"""The one client of the reward servers: workers ask it for scores, the learner for gradients.

    answer ─► count, shape, finite, inside the declared range, same weights as ever ─► array
    failure ─► worth another try? wait (full jitter), within a bounded number of attempts ─► RewardError with a cause

A failure is never a number. Every attempt has a hard deadline, so nothing here waits for ever.

Shape suffixes: B images, H W their height and width, C = 3 colour channels.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx

from common.errors import (
    ConfigError,
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
    WireError,
)
from common.reward_api import (
    ANY_REWARD,
    CAUSES,
    GRADIENT_PATH,
    INFO_PATH,
    MEDIA_TYPE,
    SCORE_PATH,
    ByteArray,
    FloatArray,
    GradientRequest,
    GradientResponse,
    Metadata,
    ScoreRequest,
    ScoreResponse,
    ServerInfo,
)
from common.wire import DEFAULT_MAX_BYTES

# Full jitter (uniform in [0, cap)): a crowd of workers refused together must not come back together.
BACKOFF_BASE_S = 0.1
BACKOFF_LIMIT_S = 5.0
# A server's Retry-After is believed up to here.
RETRY_AFTER_LIMIT_S = 30.0
# Float arithmetic may leave the declared range by this share of its width (a cosine of 1 + 1e-7).
RANGE_TOLERANCE = 1e-4
# Shorter than the servers keep an idle connection, so that none is used just as it is closed.
KEEP_ALIVE_SECONDS = 30.0
OVERLOADED = 429
SERVER_ERRORS = 500
RETRYABLE = (RewardUnavailable, RewardOverloaded)
# What a server found wrong with its own scorer's answer: the same images would give it again.
INVALID_ANSWERS = ("nan", "count", "shape", "dtype")
DEFAULT_CAUSE_OF_STATUS = {401: "unauthorized", 404: "not_found", 413: "too_large", 422: "request", 429: "overloaded"}

Answer = TypeVar("Answer", ScoreResponse, GradientResponse, ServerInfo)


@dataclass(frozen=True)
class RewardEndpoint:
    """A reward by its name in this run, and the base URL of the server that computes it."""

    name: str
    url: str


class RewardClient:
    """Asks reward servers. Thread-safe; use it as a context manager or call `close`.

    Args:
        endpoints: the rewards of this run, names all different.
        timeout_s: seconds one attempt may take, from the first byte sent to the last one read.
        attempts: tries of one request; only failures another try may cure are tried again.
        token: bearer token of the servers, if they want one.
    """

    def __init__(
        self, endpoints: Sequence[RewardEndpoint], timeout_s: float, attempts: int, token: str | None = None
    ) -> None:
        self._urls = {endpoint.name: _checked_url(endpoint) for endpoint in endpoints}
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._infos: dict[str, ServerInfo] = {}
        headers = {"accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS)
        # Reward servers are named in full: a proxy set for the outside world is not asked.
        self._http = httpx.Client(headers=headers, limits=limits, timeout=timeout_s, trust_env=False)
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(self._urls)), thread_name_prefix="reward")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._urls)

    def info(self, name: str) -> ServerInfo:
        """What the server declares of itself; asked once, then remembered."""
        self._require(name)
        if name not in self._infos:
            info = self._retry(lambda: self._exchange(name, "GET", INFO_PATH, None, ServerInfo.from_json))
            # Two threads may ask at once; the first answer stays the reference.
            self._infos.setdefault(name, info)
        return self._infos[name]

    def score(
        self,
        images_BHWC: ByteArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        names: Iterable[str] | None = None,
    ) -> dict[str, FloatArray]:
        """Ask all rewards, or those named, at the same time.

        Args:
            images_BHWC: uint8 [B, H, W, 3].
            prompts: B texts.
            metadata: one dict per image, or None.

        Returns:
            reward name -> finite float32 [B].

        Raises:
            RewardError: the first failure in the order of the names; there is no partial answer.
        """
        body = _encode(ScoreRequest(images_BHWC, prompts, metadata or ()))
        wanted = list(self.names if names is None else names)
        for name in wanted:
            self._require(name)
        futures = {name: self._threads.submit(self._score_one, name, body, len(prompts)) for name in wanted}
        failures = [future.exception() for future in futures.values()]
        for failure in failures:
            if failure is not None:
                raise failure
        return {name: future.result() for name, future in futures.items()}

    def gradient(
        self,
        name: str,
        images_BCHW: FloatArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Ask one differentiable reward for scores float32 [B] and d score_i / d image_i float32 [B, 3, H, W].

        `images_BCHW` is float32 in [0, 1]. RewardError as in `score`.
        """
        if not self.info(name).differentiable:
            raise RewardRejected(name, "not_differentiable", f"{self._where(name)} cannot be differentiated")
        body = _encode(GradientRequest(images_BCHW, prompts, metadata or ()))
        answer = self._retry(lambda: self._exchange(name, "POST", GRADIENT_PATH, body, GradientResponse.from_bytes))
        self._check(name, answer, len(prompts))
        if answer.gradients_BCHW.shape != images_BCHW.shape:
            message = f"gradients of shape {answer.gradients_BCHW.shape} for images of shape {images_BCHW.shape}"
            raise RewardInvalid(name, "shape", f"{self._where(name)}: {message}")
        return answer.scores_B, answer.gradients_BCHW

    def _score_one(self, name: str, body: bytes, count: int) -> FloatArray:
        answer = self._retry(lambda: self._exchange(name, "POST", SCORE_PATH, body, ScoreResponse.from_bytes))
        self._check(name, answer, count)
        return answer.scores_B

    def _check(self, name: str, answer: ScoreResponse | GradientResponse, count: int) -> None:
        """What a single answer cannot know of itself: how many were asked, what the server declared before."""
        info = self.info(name)
        scores_B = answer.scores_B
        if len(scores_B) != count:
            raise RewardInvalid(name, "count", f"{self._where(name)}: {len(scores_B)} scores for {count} images")
        slack = RANGE_TOLERANCE * (info.high - info.low)
        low, high = float(scores_B.min()), float(scores_B.max())
        if not (info.low - slack <= low and high <= info.high + slack):
            message = f"scores span [{low:g}, {high:g}], declared is [{info.low:g}, {info.high:g}]"
            raise RewardInvalid(name, "range", f"{self._where(name)}: {message}")
        if answer.weights_hash != info.weights_hash:
            message = f"weights were {info.weights_hash}, now {answer.weights_hash}: a reward must not change in a run"
            raise RewardInvalid(name, "weights_changed", f"{self._where(name)}: {message}")

    def _retry(self, attempt: Callable[[], Answer]) -> Answer:
        for number in range(1, self._attempts):
            try:
                return attempt()
            except RETRYABLE as error:
                time.sleep(_pause(error, number))
        return attempt()

    def _exchange(
        self, name: str, method: str, path: str, body: bytes | None, read: Callable[[bytes], Answer]
    ) -> Answer:
        """One request and its answer; every failure becomes a RewardError of this reward."""
        status, headers, content = self._send(name, method, path, body)
        if status != httpx.codes.OK:
            raise _error_of_status(name, self._where(name), status, headers, content)
        try:
            return read(content)
        except WireError as error:
            raise RewardInvalid(name, "wire", f"{self._where(name)}: {error}") from error
        except RewardError as error:
            raise RewardInvalid(name, error.cause, f"{self._where(name)}: {error}") from error

    def _send(self, name: str, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        # httpx bounds each read, not their sum: a server that drips bytes would hold us for ever.
        deadline = time.monotonic() + self._timeout_s
        headers = {} if body is None else {"content-type": MEDIA_TYPE}
        content = bytearray()
        try:
            with self._http.stream(method, self._urls[name] + path, content=body, headers=headers) as response:
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) > DEFAULT_MAX_BYTES:
                        message = f"{self._where(name)}: the answer exceeds {DEFAULT_MAX_BYTES} bytes"
                        raise RewardInvalid(name, "answer", message)
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer came too slowly")
                return response.status_code, response.headers, bytes(content)
        except httpx.TimeoutException as error:
            message = f"{self._where(name)}: no answer within {self._timeout_s:g} s: raise reward_client.timeout_s?"
            raise RewardUnavailable(name, "timeout", message) from error
        except httpx.ConnectError as error:
            message = f"{self._where(name)}: {error}: is the server running?"
            raise RewardUnavailable(name, "refused", message) from error
        except httpx.TransportError as error:
            message = f"{self._where(name)}: the connection broke: {error!r}"
            raise RewardUnavailable(name, "disconnected", message) from error

    def _require(self, name: str) -> None:
        if name not in self._urls:
            raise RewardRejected(name, "not_found", f"nobody serves a reward {name!r}: there is {list(self._urls)}")

    def _where(self, name: str) -> str:
        return f"reward {name} at {self._urls[name]}"


def _checked_url(endpoint: RewardEndpoint) -> str:
    try:
        url = httpx.URL(endpoint.url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"reward {endpoint.name}: {endpoint.url!r} is not a URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"reward {endpoint.name}: {endpoint.url!r} is not an http(s) URL")
    return endpoint.url.rstrip("/")


def _encode(request: ScoreRequest | GradientRequest) -> bytes:
    try:
        return request.to_bytes()
    except WireError as error:
        raise RewardRejected(ANY_REWARD, "wire", str(error)) from error


def _pause(error: RewardError, number: int) -> float:
    """Seconds before try `number + 1`."""
    jitter = random.uniform(0.0, min(BACKOFF_LIMIT_S, BACKOFF_BASE_S * 2**number))
    asked = error.retry_after if isinstance(error, RewardOverloaded) else 0.0
    return min(asked, RETRY_AFTER_LIMIT_S) + jitter


def _error_of_status(name: str, where: str, status: int, headers: Mapping[str, str], content: bytes) -> RewardError:
    """The error a server answered, with the cause it named if that is one we know."""
    cause, detail = _error_body(content)
    if cause not in CAUSES:
        cause = DEFAULT_CAUSE_OF_STATUS.get(status, "answer")
    message = f"{where} answered {status} ({cause}): {detail}"
    if status == OVERLOADED:
        return RewardOverloaded(name, cause, message, _retry_after(headers))
    if cause in INVALID_ANSWERS:
        return RewardInvalid(name, cause, message)
    if status >= SERVER_ERRORS:
        # A scorer that raised may have been out of luck (memory, a batch mate): worth another try.
        return RewardUnavailable(name, cause, message)
    return RewardRejected(name, cause, message)


def _error_body(content: bytes) -> tuple[str, str]:
    try:
        body = json.loads(content)
        return str(body["error"]), str(body["message"])
    except (ValueError, KeyError, TypeError):
        return "", content[:200].decode(errors="replace")


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        return 0.0

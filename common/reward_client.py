"""The one client of the reward servers: workers ask it for scores, the learner for gradients.

    question ─► known already? ─► the least loaded server that is well ─► count, finite, in range, same weights ─► array
                                          ▲                                  │
                                after a while, if affordable ◄── failure ◄───┴──► RewardError with a cause

A failure is never a number. Every attempt has a hard deadline and so has every question, so nothing waits for ever.
What to do when a reward stays away is decided one level up, in `common.outage`.

Shape suffixes: B images, H W their height and width, C = 3 colour channels.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx
import numpy as np

from common.circuit_breaker import BreakerState
from common.errors import (
    ConfigError,
    RewardError,
    RewardInvalid,
    RewardOverloaded,
    RewardRejected,
    RewardUnavailable,
    StoreError,
    WireError,
)
from common.retry_budget import RetryBudget, Timing
from common.reward_api import (
    ANY_REWARD,
    GRADIENT_PATH,
    INFO_PATH,
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
from common.reward_http import Exchange, RewardHttp
from common.reward_replicas import Replica, ReplicaSet, same_reward
from common.store import ScoreCache, request_digest, score_key

# A server's Retry-After is believed up to here.
RETRY_AFTER_LIMIT_S = 30.0
# Float arithmetic may leave the declared range by this share of its width (a cosine of 1 + 1e-7).
RANGE_TOLERANCE = 1e-4
# Requests under way at once, of all rewards and callers together.
MAX_REQUESTS = 64

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardEndpoint:
    """A reward by its name in this run, and the base URL of a server that computes it. Several of a name: replicas."""

    name: str
    url: str


@dataclass(frozen=True)
class ScoreQuestion:
    """Images to score, encoded once for all rewards."""

    body: bytes
    digest: bytes
    count: int

    @classmethod
    def of(cls, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> Self:
        """uint8 [B, H, W, 3], B texts and B dicts (or None); RewardRejected when they do not fit together."""
        body = _encode(ScoreRequest(images_BHWC, prompts, metadata or ()))
        return cls(body, request_digest(body), len(prompts))


class RewardClient:
    """Asks reward servers. Thread-safe; use it as a context manager or call `close`.

    Args:
        endpoints: the servers known from the start; several of one name are replicas of one reward.
        timeout_s: seconds one attempt may take, from the first byte sent to the last one read.
        attempts: tries of one question, which may take `attempts * timeout_s` in all. Only failures another try may
            cure are tried again, and only within the retry budget of the whole client.
        token: bearer token of the servers, if they want one.
        discovered: names of rewards whose servers `offer` will tell.
        infos: what the rewards declared when the run began; without, the first server to answer sets the standard.
        cache: scores known already.
    """

    def __init__(
        self,
        endpoints: Sequence[RewardEndpoint],
        timeout_s: float,
        attempts: int,
        token: str | None = None,
        *,
        discovered: Sequence[str] = (),
        infos: Mapping[str, ServerInfo] | None = None,
        cache: ScoreCache | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._timing = timing or Timing()
        urls: dict[str, list[str]] = {name: [] for name in (*(endpoint.name for endpoint in endpoints), *discovered)}
        for endpoint in endpoints:
            urls[endpoint.name].append(_checked_url(endpoint))
        self._replicas = {name: ReplicaSet(found, self._timing) for name, found in urls.items()}
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._infos = dict(infos or {})
        self._cache = cache
        self._budget = RetryBudget()
        self._http = RewardHttp(token, timeout_s)
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="reward")

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
        return tuple(self._replicas)

    def states(self, name: str) -> dict[str, BreakerState]:
        """How each server of a reward is doing, by URL."""
        return self._named(name).states()

    def seconds_to_probe(self, name: str) -> float:
        """How long until a server of this reward may be asked; 0 when one may now."""
        return self._named(name).seconds_to_probe()

    def offer(self, name: str, urls: Sequence[str]) -> None:
        """These servers are registered for a reward now. One of other weights, or that does not answer, is left out.

        None at all is what a registry says that has just come back: the last known ones stay.
        """
        replicas = self._named(name)
        known = replicas.urls
        if not urls or (known and not self._has_standard(name)):
            return
        found = [url.rstrip("/") for url in urls]
        replicas.discovered([url for url in found if url in known or self._is_welcome(name, url)])

    def info(self, name: str) -> ServerInfo:
        """What the servers declare of themselves; asked once, then remembered."""
        self._named(name)
        if name not in self._infos:
            self._ask(name, self._verify)
        return self._infos[name]

    def verify(self, name: str) -> ServerInfo:
        """Ask every server of a reward who it is; RewardError for the first that does not answer or is another."""
        for url in self._named(name).urls:
            self._require_same(name, url, self._read_info(name, url))
        return self.info(name)

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
        question = ScoreQuestion.of(images_BHWC, prompts, metadata)
        wanted = list(self.names if names is None else names)
        for name in wanted:
            self._named(name)
        futures = {name: self._threads.submit(self.score_one, name, question) for name in wanted}
        failures = [future.exception() for future in futures.values()]
        for failure in failures:
            if failure is not None:
                raise failure
        return {name: future.result() for name, future in futures.items()}

    def score_one(self, name: str, question: ScoreQuestion, *, use_cache: bool = True) -> FloatArray:
        """One reward's scores, float32 [B]; RewardError as in `score`."""
        cached = self._cached(name, question) if use_cache else None
        if cached is not None:
            return cached

        def attempt(name: str, replica: Replica, timeout_s: float) -> FloatArray:
            self._verify(name, replica, timeout_s)
            exchange = Exchange(name, replica.url, timeout_s)
            answer = self._http.post(exchange, SCORE_PATH, question.body, ScoreResponse.from_bytes)
            self._check(exchange, answer, question.count)
            return answer.scores_B

        scores_B = self._ask(name, attempt)
        self._remember(name, question, scores_B)
        return scores_B

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
            raise RewardRejected(name, "not_differentiable", f"reward {name} cannot be differentiated")
        body = _encode(GradientRequest(images_BCHW, prompts, metadata or ()))

        def attempt(name: str, replica: Replica, timeout_s: float) -> GradientResponse:
            self._verify(name, replica, timeout_s)
            exchange = Exchange(name, replica.url, timeout_s)
            answer = self._http.post(exchange, GRADIENT_PATH, body, GradientResponse.from_bytes)
            self._check(exchange, answer, len(prompts))
            if answer.gradients_BCHW.shape != images_BCHW.shape:
                message = f"gradients of shape {answer.gradients_BCHW.shape} for images of shape {images_BCHW.shape}"
                raise RewardInvalid(name, "shape", f"{exchange.where}: {message}")
            return answer

        answer = self._ask(name, attempt)
        return answer.scores_B, answer.gradients_BCHW

    def _ask(self, name: str, attempt: Callable[[str, Replica, float], Answer]) -> Answer:
        """Put a question to one server after another until it is answered, or another try is not worth it."""
        timing, replicas = self._timing, self._named(name)
        limit_s = self._timeout_s
        deadline = timing.clock() + self._attempts * limit_s
        # What a server answered wrongly it would answer wrongly again.
        avoid: set[str] = set()
        failure: RewardError | None = None
        self._budget.earn()
        for number in itertools.count(1):
            replica = replicas.choose(avoid)
            if replica is None:
                raise failure or self._nobody(name)
            try:
                with replicas.use(replica):
                    return attempt(name, replica, limit_s)
            except RewardInvalid as error:
                avoid.add(replica.url)
                failure = error
            except (RewardUnavailable, RewardOverloaded) as error:
                failure = error
            pause_s = timing.backoff_s(number)
            if isinstance(failure, RewardOverloaded):
                pause_s += min(failure.retry_after, RETRY_AFTER_LIMIT_S)
            late = number >= self._attempts or timing.clock() + pause_s >= deadline
            if late or not replicas.is_open(avoid) or not self._budget.spend():
                raise failure
            timing.sleep(pause_s)
            # The sleep may have lasted longer than asked.
            limit_s = min(self._timeout_s, deadline - timing.clock())
            if limit_s <= 0:
                raise failure
        raise AssertionError("unreachable")

    def _verify(self, name: str, replica: Replica, timeout_s: float) -> None:
        """Before its first question a server says who it is."""
        if replica.info is None:
            info = self._http.get(Exchange(name, replica.url, timeout_s), INFO_PATH, ServerInfo.from_json)
            self._require_same(name, replica.url, info)
            replica.info = info

    def _read_info(self, name: str, url: str) -> ServerInfo:
        return self._http.get(Exchange(name, url, self._timeout_s), INFO_PATH, ServerInfo.from_json)

    def _require_same(self, name: str, url: str, info: ServerInfo) -> None:
        # Two threads may ask at once; the first answer stays the reference.
        difference = same_reward(self._infos.setdefault(name, info), info)
        if difference is not None:
            message = f"reward {name} at {url}: {difference}: the servers of a reward must be the same, all run long"
            raise RewardInvalid(name, "weights_changed", message)

    def _has_standard(self, name: str) -> bool:
        """Servers named in the run file say what a reward is, before registered ones are compared with it."""
        try:
            self.info(name)
        except RewardError:
            return False
        return True

    def _is_welcome(self, name: str, url: str) -> bool:
        try:
            self._require_same(name, _checked_url(RewardEndpoint(name, url)), self._read_info(name, url))
        except (RewardError, ConfigError) as error:
            logger.warning("a registered server is left out: %s", error)
            return False
        return True

    def _check(self, exchange: Exchange, answer: ScoreResponse | GradientResponse, count: int) -> None:
        """What a single answer cannot know of itself: how many were asked, what the server declared before."""
        name, info, scores_B = exchange.name, self._infos[exchange.name], answer.scores_B
        if len(scores_B) != count:
            raise RewardInvalid(name, "count", f"{exchange.where}: {len(scores_B)} scores for {count} images")
        outside = _outside_range(scores_B, info)
        if outside is not None:
            raise RewardInvalid(name, "range", f"{exchange.where}: {outside}")
        expected, found = (info.scorer, info.weights_hash), (answer.scorer, answer.weights_hash)
        if found != expected:
            message = f"scorer and weights were {expected}, now {found}: a reward must not change in a run"
            raise RewardInvalid(name, "weights_changed", f"{exchange.where}: {message}")

    def _cached(self, name: str, question: ScoreQuestion) -> FloatArray | None:
        """Scores of the very same question, checked like an answer."""
        if self._cache is None:
            return None
        info = self.info(name)
        try:
            scores_B = self._cache.get(score_key(question.digest, info))
        except StoreError:
            return None
        if scores_B is None or len(scores_B) != question.count or not np.isfinite(scores_B).all():
            return None
        return None if _outside_range(scores_B, info) else scores_B

    def _remember(self, name: str, question: ScoreQuestion, scores_B: FloatArray) -> None:
        if self._cache is None:
            return
        try:
            self._cache.put(score_key(question.digest, self._infos[name]), scores_B)
        except StoreError:
            return

    def _nobody(self, name: str) -> RewardUnavailable:
        urls = self._replicas[name].urls
        if not urls:
            message = f"reward {name}: no server of that name is registered: start one with --redis-url"
            return RewardUnavailable(name, "no_server", message)
        message = f"reward {name}: every server failed a moment ago ({', '.join(urls)}) and is not asked for now"
        return RewardUnavailable(name, "circuit_open", message)

    def _named(self, name: str) -> ReplicaSet:
        if name not in self._replicas:
            message = f"nobody serves a reward {name!r}: there is {list(self._replicas)}"
            raise RewardRejected(name, "not_found", message)
        return self._replicas[name]


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


def _outside_range(scores_B: FloatArray, info: ServerInfo) -> str | None:
    """What is wrong with scores that leave the declared range, in words."""
    slack = RANGE_TOLERANCE * (info.high - info.low)
    low, high = float(scores_B.min()), float(scores_B.max())
    if info.low - slack <= low and high <= info.high + slack:
        return None
    return f"scores span [{low:g}, {high:g}], declared is [{info.low:g}, {info.high:g}]"

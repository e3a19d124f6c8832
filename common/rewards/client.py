"""Client of the reward servers: workers request scores from it, the learner requests gradients.

    request ─► cached? ─► a healthy server (`common.rewards.attempts`) ─► count, range, identity valid? ─► array
                                                                                     └──► RewardError with a cause

A failure never becomes a number. `common.rewards.guard`, one level up, decides what to do during an outage.

Shape suffixes: B images, H W their height and width, C = 3 colour channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx
import numpy as np

from common.errors import (
    ConfigError,
    RewardInvalid,
    RewardRejected,
    RewardUnavailable,
    StoreError,
    WireError,
)
from common.rewards.answers import check_answer, outside_range
from common.rewards.api import (
    ANY_REWARD,
    GRADIENT_PATH,
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
from common.rewards.attempts import Attempts
from common.rewards.breaker import BreakerState
from common.rewards.cache import ScoreCache, image_digests, score_keys
from common.rewards.control_request import WITHOUT_PROMPT, ControlRequest, Reference
from common.rewards.http import Exchange, RewardHttp
from common.rewards.identity import RewardIdentities
from common.rewards.newcomers import NEWCOMERS_AT_ONCE, Newcomers
from common.rewards.replicas import Replica, ReplicaSet
from common.rewards.retry_budget import Timing
from common.urls import server_url_fault, without_secrets

MAX_REQUESTS = 64
"""At most this many requests are in flight at once, over all rewards and callers."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RewardEndpoint:
    """A reward's name in this run and the base URL of a server for it. Endpoints with the same name are replicas."""

    name: str
    url: str


@dataclass(frozen=True)
class ScoreQuestion:
    """Images to score, encoded once for all rewards; `digests` identify the images."""

    body: bytes
    digests: tuple[bytes, ...]

    @property
    def count(self) -> int:
        return len(self.digests)

    @classmethod
    def of(cls, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata] | None) -> Self:
        """From uint8 [B, H, W, 3], B texts and B dicts (or None); RewardRejected when their lengths differ."""
        request = ScoreRequest(images_BHWC, prompts, metadata or ())
        return cls(_encode(request), image_digests(request))


class RewardClient:
    """Sends requests to reward servers. Thread-safe; use it as a context manager or call `close`.

    Args:
        endpoints: the servers known from the start; several with one name are replicas of one reward.
        timeout_s: seconds that one attempt may take, from connecting to the last byte.
        attempts: attempts per request, which may take `attempts * timeout_s` in total. Only failures that a retry
            may fix are retried, and only within the retry budget of the whole client.
        token: bearer token for the servers, if they require one. It is sent only to the endpoints, and to servers
            whose registration is signed.
        discovered: names of rewards whose servers come later, through `offer`.
        infos: the identities declared when the run began; without them, the first server to answer sets the reference.
        controls: each reward's control request, for the prompt of random pictures.
        references: what the servers answered to random pictures when the run began.
        cache: cache of scores.
        run: name of the run in every request, see `RewardHttp`.
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
        controls: Mapping[str, ControlRequest] | None = None,
        references: Mapping[str, Reference] | None = None,
        cache: ScoreCache | None = None,
        timing: Timing | None = None,
        run: str | None = None,
    ) -> None:
        timing = timing or Timing()
        urls: dict[str, list[str]] = {name: [] for name in (*(endpoint.name for endpoint in endpoints), *discovered)}
        for endpoint in endpoints:
            urls[endpoint.name].append(_checked_url(endpoint))
        self._replicas = {name: ReplicaSet(found, timing) for name, found in urls.items()}
        self._cache = cache
        self._http = RewardHttp(token, [endpoint.url for endpoint in endpoints], run)
        self._identities = RewardIdentities(self._http, infos or {}, timeout_s)
        self._attempts = Attempts(timeout_s, attempts, timing, self._identities.verify)
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="reward")
        self._checks = ThreadPoolExecutor(NEWCOMERS_AT_ONCE, thread_name_prefix="reward-newcomer")
        self._newcomers = {
            name: Newcomers(
                name,
                self._http,
                self._identities,
                (controls or {}).get(name, WITHOUT_PROMPT),
                (references or {}).get(name),
                self._checks,
                timeout_s,
                timing.clock,
            )
            for name in urls
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._checks.shutdown(wait=False, cancel_futures=True)
        self._attempts.close()
        self._http.close()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._replicas)

    def states(self, name: str) -> dict[str, BreakerState]:
        """The breaker state of each server of a reward, by URL."""
        return self._named(name).states()

    def seconds_to_probe(self, name: str) -> float:
        """Seconds until a server of this reward accepts a request; 0 when one does now."""
        return self._named(name).seconds_to_probe()

    def offer(self, name: str, urls: Sequence[str], *, signed: bool = False) -> None:
        """Report the servers registered for a reward now; `Newcomers.welcome` decides which are used.

        `signed`: their registrations show that they know the token, so it may be sent to them.
        """
        replicas = self._named(name)
        if signed:
            self._http.trust(urls)
        self._newcomers[name].welcome(replicas, urls)

    def reference(self, name: str) -> Reference | None:
        """The answer of a reward's servers to random pictures; None if they have no valid one."""
        replicas = self._named(name)
        return self._newcomers[name].reference(replicas)

    def info(self, name: str) -> ServerInfo:
        """The identity that the servers declare; requested once, then remembered."""
        replicas = self._named(name)
        return self._identities.known(name) or self._attempts.ask(name, replicas, 0, self._declared)

    def verify(self, name: str) -> ServerInfo:
        """Check the identity of every server of a reward; see `RewardIdentities.verify_all`.

        RewardInvalid also if all servers are registered ones and differ: there is no reference to choose between them.
        """
        replicas = self._named(name)
        self._identities.verify_all(name, replicas)
        if not replicas.given:
            self._newcomers[name].require_one_answer()
        return self.info(name)

    def score(
        self,
        images_BHWC: ByteArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        names: Iterable[str] | None = None,
    ) -> dict[str, FloatArray]:
        """Request scores from all rewards, or from those named, in parallel.

        Args:
            images_BHWC: uint8 [B, H, W, 3].
            prompts: B texts.
            metadata: one dict per image, or None.

        Returns:
            reward name -> finite float32 [B].

        Raises:
            RewardError: the first failure in the order of the names; there is no partial result.
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

    def score_one(self, name: str, question: ScoreQuestion, *, again: bool = False) -> FloatArray:
        """One reward's scores, float32 [B]; RewardError as in `score`. `again`: this request was given up before."""
        cached = self._cached(name, question)
        if cached is not None:
            return cached
        attempt = self._score_attempt(question)
        scores_B = self._attempts.ask(name, self._named(name), question.count, attempt, again=again)
        self._remember(name, question, scores_B)
        return scores_B

    def gradient(
        self,
        name: str,
        images_BCHW: FloatArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        *,
        again: bool = False,
    ) -> tuple[FloatArray, FloatArray]:
        """Request scores float32 [B] and d score_i / d image_i float32 [B, 3, H, W] from one differentiable reward.

        `images_BCHW` is float32 in [0, 1]. RewardError as in `score`.
        """
        if not self.info(name).differentiable:
            raise RewardRejected(name, "not_differentiable", f"reward {name} cannot be differentiated")
        attempt = self._gradient_attempt(GradientRequest(images_BCHW, prompts, metadata or ()))
        answer = self._attempts.ask(name, self._named(name), len(prompts), attempt, again=again)
        return answer.scores_B, answer.gradients_BCHW

    def send_control(
        self, name: str, control: ControlRequest, *, url: str | None = None, gradient: bool = False
    ) -> None:
        """Send the control request, to one server if `url` names it; RewardError unless the response is valid.

        The server's breaker records the outcome: a valid response marks it healthy.
        """
        attempt: Callable[[Replica, Exchange], object]
        prompts, metadata = [control.prompt], [control.metadata]
        if gradient:
            attempt = self._gradient_attempt(GradientRequest(control.images_BCHW(), prompts, metadata))
        else:
            attempt = self._score_attempt(ScoreQuestion.of(control.images_BHWC(), prompts, metadata))
        if url is None:
            self._attempts.ask(name, self._named(name), 1, attempt)
            return
        replica = self._named(name).of_url(url)
        if replica is None:
            raise RewardUnavailable(name, "no_server", f"reward {name}: the server at {url} is no longer registered")
        self._attempts.attempt_at(replica, Exchange(name, url, self._timeout_s), 1, attempt)

    def _score_attempt(self, question: ScoreQuestion) -> Callable[[Replica, Exchange], FloatArray]:
        def attempt(replica: Replica, exchange: Exchange) -> FloatArray:
            info = self._declared(replica, exchange)
            answer = self._http.post(exchange, SCORE_PATH, question.body, ScoreResponse.from_bytes)
            check_answer(exchange, info, answer, question.count)
            return answer.scores_B

        return attempt

    def _gradient_attempt(self, request: GradientRequest) -> Callable[[Replica, Exchange], GradientResponse]:
        body, shape = _encode(request), request.images_BCHW.shape

        def attempt(replica: Replica, exchange: Exchange) -> GradientResponse:
            info = self._declared(replica, exchange)
            answer = self._http.post(exchange, GRADIENT_PATH, body, GradientResponse.from_bytes)
            check_answer(exchange, info, answer, len(request.prompts))
            if answer.gradients_BCHW.shape != shape:
                message = f"gradients of shape {answer.gradients_BCHW.shape} for images of shape {shape}"
                raise RewardInvalid(exchange.name, "shape", f"{exchange.where}: {message}")
            return answer

        return attempt

    def _declared(self, replica: Replica, exchange: Exchange) -> ServerInfo:
        """Check a server's identity before its first request."""
        if replica.info is None:
            self._identities.verify(replica, exchange)
        assert replica.info is not None
        return replica.info

    def _cached(self, name: str, question: ScoreQuestion) -> FloatArray | None:
        """Cached scores if all images are cached, validated like a response."""
        if self._cache is None:
            return None
        info = self.info(name)
        try:
            scores_B = self._cache.get(score_keys(question.digests, info))
        except StoreError:
            return None
        if scores_B is None or not np.isfinite(scores_B).all() or outside_range(scores_B, info):
            return None
        return scores_B

    def _remember(self, name: str, question: ScoreQuestion, scores_B: FloatArray) -> None:
        keys = score_keys(question.digests, self.info(name)) if self._cache is not None else ()
        if self._cache is None or not keys:
            return
        try:
            self._cache.put(keys, scores_B)
        except StoreError:
            return

    def _named(self, name: str) -> ReplicaSet:
        if name not in self._replicas:
            message = f"no server for the reward {name!r}: the rewards are {list(self._replicas)}"
            raise RewardRejected(name, "not_found", message)
        return self._replicas[name]


def _checked_url(endpoint: RewardEndpoint) -> str:
    where = f"reward {endpoint.name} at {without_secrets(endpoint.url)}"
    fault = server_url_fault(endpoint.url)
    if fault:
        raise ConfigError(f"{where}: {fault}")
    try:
        host = httpx.URL(endpoint.url).host
    except httpx.InvalidURL as error:
        raise ConfigError(f"{where}: not a URL: {error}") from error
    if not host:
        raise ConfigError(f"{where}: a URL without a host: write http://HOST:PORT")
    return endpoint.url.rstrip("/")


def _encode(request: ScoreRequest | GradientRequest) -> bytes:
    try:
        return request.to_bytes()
    except WireError as error:
        raise RewardRejected(ANY_REWARD, "wire", str(error)) from error

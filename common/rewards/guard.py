"""Applies each reward's outage policy to every request.

    pause         hold until the reward is back, up to a limit; then RewardOutage names it and ends the run
    drop_group    the caller drops the whole group
    renormalise   continue with the other rewards and report the one that was left out

A failed score never becomes zero. A rejected request is not an outage. Neither is a request that a server fails while
it still answers the control request: that request is at fault, and it is dropped under every policy.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Generic, TypeVar

from common.errors import RewardError, RewardInvalid, RewardOutage, RewardOverloaded, RewardRejected
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.rewards.attempts import RETRY_AFTER_LIMIT_S
from common.rewards.breaker import BreakerState
from common.rewards.client import RewardClient, ScoreQuestion
from common.rewards.control_request import ControlRequest
from common.rewards.retry_budget import Timing
from common.types import OutagePolicy, RewardHealth

Gradient = tuple[FloatArray, FloatArray]
Value = TypeVar("Value")

AMBIGUOUS_CAUSES = ("scorer", "deadline")
"""For these causes the request or the server may be at fault: the scorer raised, or took too long."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outage:
    """The outage policy of a reward, and the seconds that a pause may last."""

    policy: OutagePolicy
    limit_s: float


@dataclass(frozen=True)
class Answers(Generic[Value]):
    """The outcome of a request to several rewards.

    Attributes:
        values: reward -> its result.
        left_out: reward -> its error, for rewards whose policy is to continue without them.
        failure: why the whole request must be dropped, or None.
        held_s: seconds spent waiting for rewards to recover.
        seconds: reward -> seconds from the request to the result, held ones included; of the rewards that answered.
    """

    values: dict[str, Value]
    left_out: dict[str, RewardError] = field(default_factory=dict)
    failure: RewardError | None = None
    held_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Result(Generic[Value]):
    """The result of one reward, the seconds that its request was held, and all seconds since it was made."""

    value: Value
    held_s: float
    seconds: float


class RewardGuard:
    """A reward client with the outage policies of its rewards; thread-safe.

    Args:
        controls: each reward's control request; without one, any failure of the reward is an outage.
    """

    def __init__(
        self,
        client: RewardClient,
        outages: Mapping[str, Outage],
        controls: Mapping[str, ControlRequest] | None = None,
        timing: Timing | None = None,
    ) -> None:
        self._client = client
        self._controls = dict(controls or {})
        self._outages = dict(outages)
        self._timing = timing or Timing()
        self._lock = Lock()
        self._held: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(max(1, 4 * len(self._outages)), thread_name_prefix="reward-guard")

    def score(
        self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata], names: Iterable[str]
    ) -> Answers[FloatArray]:
        """Scores float32 [B] of each reward. RewardOutage when a pause reaches its limit."""
        return self._score(images_BHWC, prompts, metadata, {name: self._outages[name] for name in names})

    def score_all(
        self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, FloatArray]:
        """Scores of every reward, each with policy `pause`; a reward that fails only at these images is left out.

        Raises:
            RewardOutage: a pause reached its limit.
            RewardRejected: the request itself is wrong for a reward.
        """
        outages = {name: Outage(OutagePolicy.PAUSE, outage.limit_s) for name, outage in self._outages.items()}
        answers = self._score(images_BHWC, prompts, metadata, outages)
        if isinstance(answers.failure, RewardRejected):
            raise answers.failure
        return answers.values

    def gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata], names: Iterable[str]
    ) -> Answers[Gradient]:
        """Scores [B] and gradients [B, 3, H, W] of each reward; see `RewardClient.gradient`."""

        def ask(name: str, again: bool) -> Gradient:
            return self._client.gradient(name, images_BCHW, prompts, metadata, again=again)

        return self._ask_all(ask, {name: self._outages[name] for name in names}, gradient=True)

    def health(self) -> dict[str, RewardHealth]:
        """Of each reward: the states of its servers' circuit breakers, and the number of held requests."""
        with self._lock:
            held = dict(self._held)
        return {name: RewardHealth(self._connections(name), held.get(name, 0)) for name in self._outages}

    def _connections(self, name: str) -> dict[str, int]:
        states = Counter(self._client.states(name).values())
        return {state: states[state] for state in BreakerState}

    def _score(
        self,
        images_BHWC: ByteArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        outages: Mapping[str, Outage],
    ) -> Answers[FloatArray]:
        question = ScoreQuestion.of(images_BHWC, prompts, metadata)

        def ask(name: str, again: bool) -> FloatArray:
            return self._client.score_one(name, question, again=again)

        return self._ask_all(ask, outages, gradient=False)

    def _ask_all(
        self, ask: Callable[[str, bool], Value], outages: Mapping[str, Outage], *, gradient: bool
    ) -> Answers[Value]:
        futures = {
            name: self._threads.submit(self._ask_one, name, ask, outage, gradient) for name, outage in outages.items()
        }
        errors = {name: future.exception() for name, future in futures.items()}
        left_out: dict[str, RewardError] = {}
        failure: RewardError | None = None
        for name, error in errors.items():
            if error is None:
                continue
            if isinstance(error, RewardOutage) or not isinstance(error, RewardError):
                raise error
            if outages[name].policy.leaves_reward_out and not isinstance(error, RewardRejected):
                left_out[name] = error
            else:
                failure = failure or error
        answered = {name: future.result() for name, future in futures.items() if errors[name] is None}
        if not answered and left_out:
            failure = failure or next(iter(left_out.values()))
        return Answers(
            {name: result.value for name, result in answered.items()},
            left_out,
            failure,
            max((result.held_s for result in answered.values()), default=0.0),
            {name: result.seconds for name, result in answered.items()},
        )

    def _ask_one(self, name: str, ask: Callable[[str, bool], Value], outage: Outage, gradient: bool) -> _Result[Value]:
        """The result of one reward; while its request is held, it is counted as such."""
        with ExitStack() as held:
            return self._ask_until_back(name, ask, outage, gradient, held)

    def _ask_until_back(
        self, name: str, ask: Callable[[str, bool], Value], outage: Outage, gradient: bool, held: ExitStack
    ) -> _Result[Value]:
        timing, started = self._timing, self._timing.clock()
        tries = 0
        while True:
            asked = timing.clock()
            try:
                value = ask(name, tries > 0)
            except RewardRejected:
                raise
            except RewardError as error:
                if self._is_at_fault_alone(name, error, gradient) or not outage.policy.holds_requests:
                    raise
                tries += 1
                if tries == 1:
                    held.enter_context(self._counted_as_held(name))
                    logger.warning("reward %s is out (%s): holding for up to %g s", name, error.cause, outage.limit_s)
                left_s = started + outage.limit_s - timing.clock()
                if left_s <= 0:
                    raise _limit_reached(name, outage, error) from error
                timing.sleep(min(left_s, self._pause_s(name, error, tries)))
            else:
                return _Result(value, asked - started if tries else 0.0, timing.clock() - started)

    @contextmanager
    def _counted_as_held(self, name: str) -> Iterator[None]:
        with self._lock:
            self._held[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[name] -= 1

    def _pause_s(self, name: str, error: RewardError, tries: int) -> float:
        soonest_s = self._client.seconds_to_probe(name)
        if isinstance(error, RewardOverloaded):
            soonest_s = max(soonest_s, min(error.retry_after, RETRY_AFTER_LIMIT_S))
        return soonest_s + self._timing.backoff_s(tries)

    def _is_at_fault_alone(self, name: str, error: RewardError, gradient: bool) -> bool:
        """Whether the request is at fault: the same server that failed it answers the control request."""
        may_be = isinstance(error, RewardInvalid) or error.cause in AMBIGUOUS_CAUSES
        if not may_be or not error.url or name not in self._controls:
            return False
        try:
            self._client.send_control(name, self._controls[name], url=error.url, gradient=gradient)
        except RewardError:
            return False
        logger.warning("reward %s fails for one request only, which is dropped: %s", name, error)
        return True


def _limit_reached(name: str, outage: Outage, error: RewardError) -> RewardOutage:
    message = (
        f"reward {name} was out for {outage.limit_s:g} s, as long as rewards.{name}.outage_limit_s allows; bring it "
        f"back and --resume, or choose another rewards.{name}.outage; the last failure: {error}"
    )
    return RewardOutage(name, error.cause, message)

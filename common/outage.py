"""What a run does when a reward cannot be had: the policy of each reward, applied to every question.

    pause         hold until it is back, bounded; then RewardOutage ends the run by name
    drop_group    whoever asked drops its group whole
    renormalise   go on with the other rewards, and say which one was left out

Never a zero in its place. A request that the server rejects is no outage; nor is an answer that stays wrong while the
same server answers what it has answered before: such a question fails by itself, whatever the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from common.errors import RewardError, RewardInvalid, RewardOutage, RewardRejected
from common.retry_budget import Timing
from common.reward_api import ByteArray, FloatArray, Metadata
from common.reward_client import RewardClient, ScoreQuestion

OutagePolicy = Literal["pause", "drop_group", "renormalise"]
Gradient = tuple[FloatArray, FloatArray]
Value = TypeVar("Value")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outage:
    """What to do when a reward is out, and for how many seconds a pause may hold."""

    policy: OutagePolicy
    limit_s: float


@dataclass(frozen=True)
class Answers(Generic[Value]):
    """What became of a question to several rewards.

    Attributes:
        values: reward -> its answer.
        left_out: reward -> why it is not among the values, for rewards whose policy is to go on without.
        failure: why the question as a whole must be dropped, if it must.
        held_s: seconds spent waiting for rewards to come back.
    """

    values: dict[str, Value]
    left_out: dict[str, RewardError] = field(default_factory=dict)
    failure: RewardError | None = None
    held_s: float = 0.0


class RewardGuard:
    """A reward client with the outage policies of its rewards; thread-safe."""

    def __init__(self, client: RewardClient, outages: Mapping[str, Outage], timing: Timing | None = None) -> None:
        self._client = client
        self._outages = dict(outages)
        self._timing = timing or Timing()
        self._threads = ThreadPoolExecutor(max(1, 4 * len(self._outages)), thread_name_prefix="reward-guard")
        self._known_good: dict[str, Callable[[], object]] = {}

    def policy(self, name: str) -> OutagePolicy:
        return self._outages[name].policy

    def score(
        self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata], names: Iterable[str]
    ) -> Answers[FloatArray]:
        """Scores float32 [B] of each reward. RewardOutage when a pause came to its limit."""
        return self._score(images_BHWC, prompts, metadata, {name: self._outages[name] for name in names})

    def score_all(
        self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, FloatArray]:
        """Scores of every reward, each waited for as under `pause`; RewardError when one cannot be had."""
        outages = {name: Outage("pause", outage.limit_s) for name, outage in self._outages.items()}
        answers = self._score(images_BHWC, prompts, metadata, outages)
        if answers.failure is not None:
            raise answers.failure
        return answers.values

    def gradient(
        self, images_BCHW: FloatArray, prompts: Sequence[str], metadata: Sequence[Metadata], names: Iterable[str]
    ) -> Answers[Gradient]:
        """Scores [B] and gradients [B, 3, H, W] of each reward; see `RewardClient.gradient`."""
        first = images_BCHW[:1].copy(), list(prompts[:1]), list(metadata[:1])

        def ask(name: str) -> Gradient:
            return self._client.gradient(name, images_BCHW, prompts, metadata)

        def ask_first(name: str) -> object:
            return self._client.gradient(name, *first)

        return self._ask_all(ask, ask_first, {name: self._outages[name] for name in names})

    def _score(
        self,
        images_BHWC: ByteArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        outages: Mapping[str, Outage],
    ) -> Answers[FloatArray]:
        question = ScoreQuestion.of(images_BHWC, prompts, metadata)
        first = images_BHWC[:1].copy(), list(prompts[:1]), list(metadata[:1])

        def ask(name: str) -> FloatArray:
            return self._client.score_one(name, question)

        def ask_first(name: str) -> object:
            return self._client.score_one(name, ScoreQuestion.of(*first), use_cache=False)

        return self._ask_all(ask, ask_first, outages)

    def _ask_all(
        self, ask: Callable[[str], Value], ask_first: Callable[[str], object], outages: Mapping[str, Outage]
    ) -> Answers[Value]:
        futures = {
            name: self._threads.submit(self._ask_one, name, ask, ask_first, outage) for name, outage in outages.items()
        }
        errors = {name: future.exception() for name, future in futures.items()}
        left_out: dict[str, RewardError] = {}
        failure: RewardError | None = None
        for name, error in errors.items():
            if error is None:
                continue
            if isinstance(error, RewardOutage) or not isinstance(error, RewardError):
                raise error
            if outages[name].policy == "renormalise" and not isinstance(error, RewardRejected):
                left_out[name] = error
            else:
                failure = failure or error
        answered = {name: future.result() for name, future in futures.items() if errors[name] is None}
        if not answered and left_out:
            failure = failure or next(iter(left_out.values()))
        held_s = max((held for _, held in answered.values()), default=0.0)
        return Answers({name: value for name, (value, _) in answered.items()}, left_out, failure, held_s)

    def _ask_one(
        self, name: str, ask: Callable[[str], Value], ask_first: Callable[[str], object], outage: Outage
    ) -> tuple[Value, float]:
        """The answer and how many seconds it was held for."""
        timing, started = self._timing, self._timing.clock()
        tries = 0
        while True:
            asked = timing.clock()
            try:
                value = ask(name)
            except RewardRejected:
                raise
            except RewardError as error:
                if outage.policy != "pause" or (isinstance(error, RewardInvalid) and self._answers_as_before(name)):
                    raise
                tries += 1
                if tries == 1:
                    logger.warning("reward %s is out (%s): holding for up to %g s", name, error.cause, outage.limit_s)
                left_s = started + outage.limit_s - timing.clock()
                if left_s <= 0:
                    raise _limit_reached(name, outage, error) from error
                timing.sleep(min(left_s, self._client.seconds_to_probe(name) + timing.backoff_s(tries)))
            else:
                # One image that this reward can score, to tell later whose fault a wrong answer is.
                self._known_good.setdefault(name, lambda: ask_first(name))
                return value, asked - started if tries else 0.0

    def _answers_as_before(self, name: str) -> bool:
        """Whether the reward still answers what it answered once; false when it never has."""
        if name not in self._known_good:
            return False
        try:
            self._known_good[name]()
        except RewardError:
            return False
        return True


def _limit_reached(name: str, outage: Outage, error: RewardError) -> RewardOutage:
    message = (
        f"reward {name} was out for {outage.limit_s:g} s, as long as rewards.{name}.outage_limit_s allows; bring it "
        f"back and --resume, or choose another rewards.{name}.outage; the last failure: {error}"
    )
    return RewardOutage(name, error.cause, message)

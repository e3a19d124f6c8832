"""The nouns of the system.

Shape suffixes used throughout the project:

    B samples   P prompts   G samples per prompt (the group)   T steps   S = T + 1 states of a trajectory
    c latent channels   C image channels (3)   h, w latent height and width   H, W image height and width

Life cycle of a group: a `Prompt` and a `StepPlan` go to a rollout worker, which holds the weights of one
`PolicyVersion`. It returns a `TrajectoryGroup` (the samples), wrapped into a `ScoredGroup` (with every reward's
scores). The learner derives nothing again: the plan and the version are sent with the samples.

Example, four steps of which the first two are trained in this iteration:

    StepPlan(iteration=7, sigmas=(1.0, 0.9, 0.75, 0.5, 0.0), eta=0.9, selected=(0, 1))
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import total_ordering
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.errors import RewardError
from common.kept_groups import GroupPicture, TrainedSamples

if TYPE_CHECKING:
    import ray

    from common.group_ends import GroupEnd, RefusedGroup
    from common.sealed_group import SealedGroup

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class Network(StrEnum):
    """The networks of RTDMD. STUDENT generates, TEACHER is the target, FAKE_SCORE tracks the student's distribution.

    SURROGATE_REWARD is the teacher with an adapter that learns rewards; only `learner/training/surrogate_reward.py` has
    it.
    """

    TEACHER = "teacher"
    STUDENT = "student"
    FAKE_SCORE = "fake_score"
    SURROGATE_REWARD = "surrogate_reward"


class Guidance(StrEnum):
    """A family's kind of guidance: a second pass without prompt, an input of its networks, or none."""

    CLASSIFIER_FREE = "classifier_free"
    INPUT = "input"
    NONE = "none"


class OutagePolicy(StrEnum):
    """A reward's outage policy, applied by `common/rewards/guard.py`. Members have the values of rewards.*.outage."""

    PAUSE = "pause"
    DROP_GROUP = "drop_group"
    RENORMALISE = "renormalise"

    @property
    def holds_requests(self) -> bool:
        """Whether a request is held until the reward is back; otherwise it fails at once."""
        return self is OutagePolicy.PAUSE

    @property
    def leaves_reward_out(self) -> bool:
        """Whether a group is trained on the other rewards; otherwise it is dropped whole."""
        return self is OutagePolicy.RENORMALISE


class AlarmAction(StrEnum):
    """Actions of a run on an alarm of the watchdog. Members have the values of watchdog.on_alarm."""

    MARK = "mark"
    WARN = "warn"
    PAUSE = "pause"
    ROLL_BACK = "roll_back"


class Precision(StrEnum):
    """The type in which a reward's model computes."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Stage(StrEnum):
    """The two stages of a run, with the names used in its files."""

    COLD_START = "cold_start"
    ALIGNMENT = "alignment"


@total_ordering
@dataclass(frozen=True)
class Position:
    """A place in a run: a stage and the number of its finished iterations. The cold start comes before alignment."""

    stage: Stage
    iteration: int

    def __lt__(self, other: Position) -> bool:
        order = list(Stage)
        return (order.index(self.stage), self.iteration) < (order.index(other.stage), other.iteration)

    @property
    def directory(self) -> str:
        """The name of the checkpoint of this position."""
        return f"{self.stage}-{self.iteration:06d}"


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file. `index` is its position there and keys the noise shared within its group."""

    index: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSets:
    """A run's prompts: those that each stage trains on, and those of the evaluations."""

    cold_start: Sequence[Prompt]
    alignment: Sequence[Prompt]
    evaluation: Sequence[Prompt]


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from a noise level down to the next.

    Attributes:
        sigma, sigma_next: the levels, in [0, 1]; 0 is the image.
        eta: stochasticity of coefficient-preserving sampling, in [0, 1]; a step to level 0 is deterministic anyway.
        shared_noise: whether the samples of a group share this step's noise.
    """

    sigma: float
    sigma_next: float
    eta: float
    shared_noise: bool = False


def steps_between(sigmas: Sequence[float], eta: float) -> tuple[Step, ...]:
    """The steps through a schedule of T + 1 levels, all with one eta; every sample has its own noise."""
    return tuple(Step(sigma, sigma_next, eta) for sigma, sigma_next in pairwise(sigmas))


@dataclass(frozen=True)
class StepPlan:
    """The sampling of one iteration: the same plan on every worker.

    Attributes:
        iteration: the training iteration the samples are for; part of every random key.
        sigmas: T + 1 noise levels, from 1.0 (noise) down to 0.0 (image).
        eta: stochasticity of coefficient-preserving sampling, in [0, 1].
        selected: the steps on which each sample has its own noise and which enter the policy loss (SubGRPO). On every
            other stochastic step the group shares its noise.
        same_latent: whether the samples of a group start from one initial noise.
    """

    iteration: int
    sigmas: tuple[float, ...]
    eta: float
    selected: tuple[int, ...]
    same_latent: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its steps; on those that are not selected the group shares its noise."""
        steps = steps_between(self.sigmas, self.eta)
        return tuple(replace(step, shared_noise=index not in self.selected) for index, step in enumerate(steps))


@dataclass(frozen=True)
class PolicyVersion:
    """The weights that made a sample: a counter for people, a fingerprint for programs."""

    number: int
    fingerprint: str


@dataclass(frozen=True)
class TrajectoryGroup:
    """G samples of one prompt.

    Attributes:
        latents_SGchw: float32 [T + 1, G, c, h, w]; state 0 is the initial noise, state T the final clean latents.
        surrogate_TG: float32 [T, G]; the surrogate log-density of each transition as the sampler computed it (0 on
            the deterministic last step).
    """

    prompt: Prompt
    plan: StepPlan
    policy: PolicyVersion
    latents_SGchw: FloatArray
    surrogate_TG: FloatArray

    @property
    def group_size(self) -> int:
        return int(self.latents_SGchw.shape[1])


@dataclass(frozen=True)
class ScoredGroup:
    """A group with the scores of every reward.

    Attributes:
        rewards_G: reward name -> float32 [G], every value finite. A trained reward may be absent: it was not available,
            and its outage policy is to continue without it.
    """

    trajectory: TrajectoryGroup
    rewards_G: Mapping[str, FloatArray]


@dataclass(frozen=True)
class ScoringFailure:
    """The reason why a reward was not available, counted by reward and cause."""

    reward: str
    cause: str
    message: str

    @classmethod
    def of(cls, error: RewardError) -> ScoringFailure:
        return cls(error.reward, error.cause, str(error))


@dataclass(frozen=True)
class RolloutOutcome:
    """A rollout's report for the driver: small, because the group itself goes to the learner.

    Attributes:
        worker: host:pid, so that a restarted worker counts as a new one.
        seconds: by part: weights, rollout and decode use the model; idle: the model's, just before; score; held.
        failure: why the group could not be scored; such a group is never trained on.
        left_out: rewards that the group is trained without, according to their outage policy.
        digest: of the group as the worker sealed it; "" without a group.
        picture: None if it was not asked for.
        statistics: what the watchdog needs of the group, by name: of its images, and the agreement of its rewards.
        reward_seconds: reward -> seconds from the request to the scores; of the rewards that answered.
        reward_spreads: reward -> standard deviation within the group.
    """

    worker: str
    version: PolicyVersion
    seconds: dict[str, float]
    failure: ScoringFailure | None = None
    left_out: tuple[ScoringFailure, ...] = ()
    digest: str = ""
    picture: GroupPicture | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)
    reward_seconds: Mapping[str, float] = field(default_factory=dict)
    reward_spreads: Mapping[str, float] = field(default_factory=dict)

    @property
    def model_s(self) -> float:
        """Seconds for which the call used its worker's model."""
        return sum(self.seconds.get(part, 0.0) for part in ("weights", "rollout", "decode", "statistics"))


@dataclass(frozen=True)
class ProcessPlace:
    """Where a process runs.

    Attributes:
        node: Ray's id of the machine.
    """

    node: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class RewardHealth:
    """A process's view of one reward.

    Attributes:
        connections: state of a circuit breaker -> number of the reward's servers in it.
        held: requests that are held until the reward is back.
    """

    connections: Mapping[str, int]
    held: int


@dataclass(frozen=True)
class EvaluatedPrompt:
    """One prompt's images under one policy, uint8 [G, H, W, C], every reward of each [G], and their diversity.

    A reward that failed only at these images is absent: it would fail at them every time. `statistics` are those of
    `rollout_workers/image_statistics.py`.
    """

    prompt: Prompt
    images_GHWC: ByteArray
    rewards_G: dict[str, FloatArray]
    diversity: float
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Collected:
    """The groups of one iteration.

    Attributes:
        groups: references in the order of the prompts, dropped ones left out.
        seconds: worker seconds by part, summed over groups, including samplings without a result.
        dropped: reward:cause, or infra:fault -> number of groups dropped for it, over all samplings.
        reasons: by the same causes, the error of the last such group.
        renormalised: reward:cause -> number of groups trained without that reward.
        images: worker -> number of samples it contributed.
        model_s, idle_s: worker -> seconds for which its model was used, and idle before.
        refused: by the learner, over all samplings; most of these groups were sampled again.
        ends: of every group, in the order of the prompts, once `groups` are trained.
        pictures: place in `groups` -> its picture, of the groups that have one.
        statistics: those of each group, see `RolloutOutcome`.
        spreads: reward -> its standard deviation within each group.
    """

    groups: list[ray.ObjectRef[SealedGroup]]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    dropped: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    renormalised: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    model_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    idle_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    refused: list[RefusedGroup] = field(default_factory=list)
    ends: list[GroupEnd] = field(default_factory=list)
    spreads: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    pictures: dict[int, GroupPicture] = field(default_factory=dict)
    statistics: list[Mapping[str, float]] = field(default_factory=list)

    def idle_shares(self) -> dict[str, float]:
        """Worker -> the part of the time in which its model was idle: between groups, for scores or for new weights."""
        total_s = {worker: idle_s + self.model_s[worker] for worker, idle_s in self.idle_s.items()}
        return {worker: self.idle_s[worker] / seconds for worker, seconds in total_s.items() if seconds > 0}


@dataclass(frozen=True)
class UpdateResult:
    """The report of one update: metrics by name, seconds by part, and the peak memory of rank 0 in bytes so far.

    `trained`: in stage 2, what it trained on.
    """

    metrics: dict[str, float]
    seconds: dict[str, float]
    trained: TrainedSamples | None = None
    peak_bytes: int = 0

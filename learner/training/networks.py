"""Teacher, student and fake score on their frozen bases: the adapters of each, and which of them train.

    stage 1   student    = base + cold_start (trains)
              fake score = base + fake_score (trains)
    stage 2   student    = base + cold_start (frozen) + aligned (trains)
              fake score = base + fake_score (frozen) + aligned_fake_score (trains)
              surrogate  = teacher + surrogate_reward (trains), with alignment.policy_gradient: surrogate_reward only

Stage 2 starts from the moving average of stage 1's student and from stage 1's fake score, both frozen, with a fresh
adapter on each. RTDMD's authors merge both into the bases instead: the same function up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from common.backbones.base import Backbone
from common.backbones.flat_adapter import FlatAdapter
from common.backbones.lora_targets import adapted_layers, suffixes
from common.config.stages import AlignmentConfig, ColdStartConfig
from common.errors import CheckpointError, ModelError
from common.types import Network, Stage
from learner.training.optimizer import AdapterOptimizer, LearningRate, MovingAverage, OptimizerSettings
from learner.training.ranks import ALONE, Ranks

COLD_START, ALIGNED = "cold_start", "aligned"
"""Names of the student's adapters in stage 1 and stage 2."""
FAKE_SCORE, ALIGNED_FAKE_SCORE = "fake_score", "aligned_fake_score"
"""Names of the fake score's adapters in stage 1 and stage 2."""
SURROGATE_REWARD = "surrogate_reward"
"""Name of the surrogate reward's adapter."""


@dataclass(frozen=True)
class StageSettings:
    """Training settings of a stage's adapters.

    Attributes:
        student, fake: settings of the two optimizers.
        ema_decay: decay of the student's moving average, per update of the average.
        init_std: standard deviation of the fresh adapters' A; None means 1 / rank.
        rank: rank of the fresh adapters; None means `lora.rank`.
        surrogate: whether stage 2 learns a surrogate reward. Its optimizer has the fake score's settings, as published.
    """

    student: OptimizerSettings
    fake: OptimizerSettings
    ema_decay: float
    init_std: float | None
    rank: int | None = None
    surrogate: bool = False

    @classmethod
    def of(cls, stage: ColdStartConfig | AlignmentConfig) -> StageSettings:
        """The settings of a stage."""
        schedule = stage.learning_rate_schedule, stage.iterations
        return cls(
            OptimizerSettings(
                LearningRate(stage.learning_rate_student, *schedule),
                stage.weight_decay_student,
                stage.gradient_clip_student,
            ),
            OptimizerSettings(
                LearningRate(stage.learning_rate_fake, *schedule), stage.weight_decay_fake, stage.gradient_clip_fake
            ),
            stage.ema_decay,
            stage.lora_init_std,
            stage.lora_rank if isinstance(stage, AlignmentConfig) else None,
            isinstance(stage, AlignmentConfig) and stage.policy_gradient == "surrogate_reward",
        )


class Networks:
    """The three networks, the two optimizers and the student's moving average, in one of the two stages."""

    def __init__(self, backbone: Backbone, settings: StageSettings, seed: int, ranks: Ranks = ALONE) -> None:
        """Set up stage 1: student and fake score start equal to the teacher."""
        self.backbone = backbone
        self.ranks = ranks
        self._seed = seed
        self._surrogate_optimizer: AdapterOptimizer | None = None
        self._start_training(COLD_START, FAKE_SCORE, settings)
        backbone.adapters.define(Network.STUDENT, (COLD_START,))
        backbone.adapters.define(Network.FAKE_SCORE, (FAKE_SCORE,))

    def begin_alignment(self, settings: StageSettings) -> None:
        """Switch to stage 2; optimizers and moving average start anew."""
        bank = self.backbone.adapters
        bank.load(COLD_START, self.average.state())
        bank.freeze(COLD_START)
        bank.freeze(FAKE_SCORE)
        self._start_training(ALIGNED, ALIGNED_FAKE_SCORE, settings)
        bank.define(Network.STUDENT, (COLD_START, ALIGNED))
        bank.define(Network.FAKE_SCORE, (FAKE_SCORE, ALIGNED_FAKE_SCORE))
        if settings.surrogate:
            self._add_surrogate(settings)

    @property
    def stage(self) -> Stage:
        return Stage.ALIGNMENT if self.student_adapter == ALIGNED else Stage.COLD_START

    @property
    def student(self) -> FlatAdapter:
        """The student's adapter that trains now."""
        return self.backbone.adapters.adapter(self.student_adapter)

    @property
    def surrogate_optimizer(self) -> AdapterOptimizer:
        """The surrogate reward's optimizer.

        Raises:
            ModelError: there is none.
        """
        if self._surrogate_optimizer is None:
            raise ModelError("no surrogate reward: stage 2 has not begun with policy_gradient: surrogate_reward")
        return self._surrogate_optimizer

    def _add_surrogate(self, settings: StageSettings) -> None:
        bank = self.backbone.adapters
        self._add(SURROGATE_REWARD, Network.TEACHER, settings)
        bank.share_base(Network.SURROGATE_REWARD, Network.TEACHER)
        bank.define(Network.SURROGATE_REWARD, (SURROGATE_REWARD,))
        adapter = bank.adapter(SURROGATE_REWARD)
        self._surrogate_optimizer = AdapterOptimizer("surrogate reward", adapter, settings.fake, self.ranks)

    def _add(self, name: str, network: Network, settings: StageSettings) -> None:
        """Add a fresh adapter that trains."""
        self.backbone.adapters.add(
            name,
            seed=self._seed,
            trainable=True,
            network=network,
            init_std=settings.init_std,
            rank=settings.rank,
        )

    def _start_training(self, student_adapter: str, fake_adapter: str, settings: StageSettings) -> None:
        """Add the adapters of a stage, and their optimizers and moving average."""
        bank = self.backbone.adapters
        for name, network in ((student_adapter, Network.STUDENT), (fake_adapter, Network.FAKE_SCORE)):
            self._add(name, network, settings)
        self.student_adapter = student_adapter
        student, fake = bank.adapter(student_adapter), bank.adapter(fake_adapter)
        self.student_optimizer = AdapterOptimizer("student", student, settings.student, self.ranks)
        self.fake_optimizer = AdapterOptimizer("fake score", fake, settings.fake, self.ranks)
        self.average = MovingAverage(student, settings.ema_decay)

    def update_average(self) -> None:
        self.average.update()

    @contextmanager
    def averaged_student(self) -> Iterator[None]:
        """Inside this block the student has its averaged weights, which are evaluated and exported."""
        with self.average.applied():
            yield

    def _adapters(self) -> tuple[str, ...]:
        bank = self.backbone.adapters
        surrogate = (SURROGATE_REWARD,) if self._surrogate_optimizer else ()
        return (*bank.stack(Network.STUDENT), *bank.stack(Network.FAKE_SCORE), *surrogate)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes, as one flat dict: `part/...` -> tensor."""
        bank = self.backbone.adapters
        parts: dict[str, Mapping[str, Tensor]] = {f"adapter/{name}": bank.state(name) for name in self._adapters()}
        parts["average"] = self.average.state()
        parts["optimizer/student"] = self.student_optimizer.state()
        parts["optimizer/fake"] = self.fake_optimizer.state()
        if self._surrogate_optimizer:
            parts["optimizer/surrogate"] = self._surrogate_optimizer.state()
        return {f"{part}/{key}": value for part, tensors in parts.items() for key, value in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state` from the same stage.

        Raises:
            CheckpointError: the state's adapters are on other layers, or it is from the other stage; nothing has
                changed.
        """
        bank = self.backbone.adapters
        parts = {name: _part(state, f"adapter/{name}") for name in self._adapters()}
        for name, part in parts.items():
            _require_same_layers(name, part, bank.parameters(name))
        for name, part in parts.items():
            bank.load(name, part)
        self.average.load(_part(state, "average"))
        self.student_optimizer.load(_part(state, "optimizer/student"))
        self.fake_optimizer.load(_part(state, "optimizer/fake"))
        if self._surrogate_optimizer:
            self._surrogate_optimizer.load(_part(state, "optimizer/surrogate"))


def student_adapters(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The averaged student in a result of `Networks.state`: its adapters by name, in the order of its stack."""
    cold_start = _part(state, f"adapter/{COLD_START}")
    if not _part(state, f"adapter/{ALIGNED}"):
        return {COLD_START: _part(state, "average")}
    return {COLD_START: cold_start, ALIGNED: _part(state, "average")}


def _require_same_layers(name: str, saved: Collection[str], own: Collection[str]) -> None:
    there, here = set(adapted_layers(saved)), set(adapted_layers(own))
    if not there:
        raise CheckpointError(f"the checkpoint has no adapter {name!r}: it is of the other stage or an earlier version")
    if there != here:
        first = min(there ^ here)
        raise CheckpointError(
            f"the checkpoint's adapter {name!r} is on {len(there)} layers, lora.targets bind to {len(here)}. "
            f"{first} is only in the {'checkpoint' if first in there else 'run'}. To use the checkpoint set "
            f"lora.targets to [{', '.join(suffixes(there))}]"
        )


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}

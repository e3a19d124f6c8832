"""Teacher, student and fake score on their frozen bases: which adapters they are made of, and which of them train.

    stage 1   student = base + cold_start (trains)                        fake score = base + fake_score (trains)
    stage 2   student = base + cold_start (frozen) + aligned (trains)     fake score = base + fake_score (trains)

Stage 2 starts from the moving average of stage 1's student, frozen, with a fresh adapter on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from common.backbones.base import Backbone, Network
from common.config import AlignmentConfig, ColdStartConfig
from learner.optimizer import AdapterOptimizer, LearningRate, MovingAverage

COLD_START, ALIGNED, FAKE_SCORE = "cold_start", "aligned", "fake_score"


@dataclass(frozen=True)
class OptimizerSettings:
    learning_rate_student: LearningRate
    learning_rate_fake: LearningRate
    weight_decay: float
    gradient_clip: float
    ema_decay: float

    @classmethod
    def of(cls, stage: ColdStartConfig | AlignmentConfig) -> OptimizerSettings:
        """The settings of a stage."""
        return cls(
            LearningRate(stage.learning_rate_student, stage.learning_rate_schedule, stage.iterations),
            LearningRate(stage.learning_rate_fake, stage.learning_rate_schedule, stage.iterations),
            stage.weight_decay,
            stage.gradient_clip,
            stage.ema_decay,
        )


class Networks:
    """The three networks, the two optimizers and the student's moving average, in one of the two stages."""

    def __init__(self, backbone: Backbone, settings: OptimizerSettings, seed: int) -> None:
        """Stage 1: student and fake score start as the teacher."""
        self.backbone = backbone
        self._seed = seed
        backbone.adapters.add(COLD_START, seed=seed, trainable=True)
        backbone.adapters.add(FAKE_SCORE, seed=seed, trainable=True, network=Network.FAKE_SCORE)
        backbone.adapters.define(Network.STUDENT, (COLD_START,))
        backbone.adapters.define(Network.FAKE_SCORE, (FAKE_SCORE,))
        self._start_optimizing(COLD_START, settings)

    def begin_alignment(self, settings: OptimizerSettings) -> None:
        """Go over to stage 2; optimizers and moving average start anew."""
        bank = self.backbone.adapters
        bank.load(COLD_START, self.average.state())
        bank.freeze(COLD_START)
        bank.add(ALIGNED, seed=self._seed, trainable=True)
        bank.define(Network.STUDENT, (COLD_START, ALIGNED))
        self._start_optimizing(ALIGNED, settings)

    def _start_optimizing(self, student_adapter: str, settings: OptimizerSettings) -> None:
        bank = self.backbone.adapters
        self.student_adapter = student_adapter
        self.student_optimizer = AdapterOptimizer(
            "student",
            bank.parameters(student_adapter),
            learning_rate=settings.learning_rate_student,
            weight_decay=settings.weight_decay,
            gradient_clip=settings.gradient_clip,
        )
        self.fake_optimizer = AdapterOptimizer(
            "fake score",
            bank.parameters(FAKE_SCORE),
            learning_rate=settings.learning_rate_fake,
            weight_decay=settings.weight_decay,
            gradient_clip=settings.gradient_clip,
        )
        self.average = MovingAverage(bank.state(student_adapter), settings.ema_decay)

    def update_average(self) -> None:
        self.average.update(self.backbone.adapters.parameters(self.student_adapter))

    @contextmanager
    def averaged_student(self) -> Iterator[None]:
        """Inside this block the student carries its averaged weights: what is evaluated and exported."""
        bank = self.backbone.adapters
        trained = bank.state(self.student_adapter)
        bank.load(self.student_adapter, self.average.state())
        try:
            yield
        finally:
            bank.load(self.student_adapter, trained)

    def state(self) -> dict[str, Tensor]:
        """Everything training changes, as one flat dict: `part/...` -> tensor."""
        bank = self.backbone.adapters
        parts: dict[str, Mapping[str, Tensor]] = {
            f"adapter/{name}": bank.state(name) for name in {*bank.stack(Network.STUDENT), FAKE_SCORE}
        }
        parts["average"] = self.average.state()
        parts["optimizer/student"] = self.student_optimizer.state()
        parts["optimizer/fake"] = self.fake_optimizer.state()
        return {f"{part}/{key}": value for part, tensors in parts.items() for key, value in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, in the same stage.

        Raises:
            WeightUpdateError: the state is of other adapters.
        """
        bank = self.backbone.adapters
        for name in (*bank.stack(Network.STUDENT), FAKE_SCORE):
            bank.load(name, _part(state, f"adapter/{name}"))
        self.average.load(_part(state, "average"))
        self.student_optimizer.load(_part(state, "optimizer/student"))
        self.fake_optimizer.load(_part(state, "optimizer/fake"))


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}

"""The section `trackers` of the run file (see `common.config.run`)."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from common.config.section import Section, problem


class TrackerKind(StrEnum):
    """An experiment tracker. Its value is the name of its package."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"
    MLFLOW = "mlflow"


class TrackersConfig(Section):
    """Experiment trackers, which get the run's metrics, sample grids, configuration and final table."""

    kinds: tuple[TrackerKind, ...] = Field(
        (),
        description="Trackers of the run, such as [tensorboard, wandb]. Each reads its own variables, such as "
        "WANDB_API_KEY. One that cannot be reached gets what it missed later.",
    )
    project: str = Field(
        "rtdmd",
        min_length=1,
        description="Project that the run belongs to in Weights & Biases and trackio; experiment in MLflow.",
    )

    @model_validator(mode="after")
    def _kinds_differ(self) -> Self:
        if len(set(self.kinds)) < len(self.kinds):
            raise problem("kinds", f"[{', '.join(self.kinds)}]: name each tracker once")
        return self

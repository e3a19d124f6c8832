"""The sections `workers` and `learner` of the run file (see `common.config.run`), and the GPUs that the two share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from common.config.section import Section, problem

ROUNDING = 1e-6
"""Tolerance for GPU shares that add up to a whole GPU."""
GPUS = (
    "GPUs that Ray reserves per {whose}: a whole number, or a share. If {other}.num_gpus is a share too, every GPU "
    "holds equally many ranks and equally many workers."
)


class WorkersConfig(Section):
    """Rollout workers (Ray actors)."""

    count: PositiveInt = Field(
        1, description="Number of rollout workers. Neither the number nor the placement changes the samples of a run."
    )
    min: PositiveInt | None = Field(
        None, description="The run starts when this many are ready; the others join when they are. null: count."
    )
    max: PositiveInt | None = Field(
        None, description="As many as the cluster can place, at most this many. Needs min. null: count."
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker.")
    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs that Ray reserves per worker.")
    num_gpus: NonNegativeFloat = Field(0.0, description=GPUS.format(whose="worker", other="learner"))
    compiled: bool = Field(
        False, description="Compile the transformer's blocks. The start is slower, and workers may differ by rounding."
    )
    restarts: NonNegativeInt = Field(
        3,
        description="A worker that is gone is replaced so many times within 10 minutes, each place by itself. The run "
        "goes on with the others, and stops when none is left.",
    )
    unhealthy_after_s: float = Field(
        5.0,
        ge=1.0,
        description="A worker that has not answered for this long, and whose process uses no processor, is replaced.",
    )

    @property
    def least(self) -> int:
        """Workers that a run starts with."""
        return self.min or self.count

    @property
    def most(self) -> int:
        """Workers that a run uses."""
        return self.max or self.count

    @property
    def numbers(self) -> str:
        return str(self.most) if self.least == self.most else f"{self.least} to {self.most}"

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if (self.min is None) != (self.max is None):
            raise problem("min" if self.max is None else "max", "min and max go together: set both, or count alone")
        if self.max is not None and self.count != 1:
            raise problem("count", f"{self.count}, beside min and max: leave it out")
        if self.least > self.most:
            raise problem("max", f"{self.most} is less than min = {self.least}")
        return self


class LearnerConfig(Section):
    """The learner: one Ray actor per rank. Ray places it on a machine with the resources below."""

    ranks: PositiveInt = Field(
        1,
        description="Processes that share every update, each with a part of the batch. Results differ by float "
        "rounding only.",
    )
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads per rank. null: 1 on GPUs, else the fastest number, timed for two seconds at the "
        "start. It changes results by float rounding; config.yaml records it, and a resumed run keeps it.",
    )
    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs that Ray reserves per rank.")
    num_gpus: NonNegativeFloat = Field(0.0, description=GPUS.format(whose="rank", other="workers"))
    shard_base: bool = Field(
        False, description="Shard the frozen weights over the ranks (FSDP2), for models that do not fit one GPU."
    )
    restarts: NonNegativeInt = Field(
        3,
        description="A learner that is gone is started again so many times within 10 minutes, all ranks together, and "
        "repeats what it had not finished. Then the run ends.",
    )
    unhealthy_after_s: float = Field(
        5.0,
        ge=1.0,
        description="A rank that has work, has not answered for this long, and whose process uses no processor, is "
        "ended, and the learner started again.",
    )


@dataclass(frozen=True)
class SharedGpus:
    """GPUs that hold ranks and workers together.

    Attributes:
        count: number of such GPUs.
        ranks, workers: number of them on each.
        share: the part of each GPU that they reserve.
    """

    count: int
    ranks: int
    workers: int
    share: float


def shared_gpus(learner: LearnerConfig, workers: WorkersConfig) -> SharedGpus | None:
    """The GPUs that ranks and workers share; None if they do not both have shares of one.

    Raises:
        PydanticCustomError: a share above a GPU, or shares that do not fill GPUs with equally many of each.
    """
    for key, gpus in (("learner", learner.num_gpus), ("workers", workers.num_gpus)):
        if gpus > 1 and not gpus.is_integer():
            raise problem(f"{key}.num_gpus", f"{gpus:g}: above one GPU Ray gives whole ones only: use {int(gpus)}")
    if not (0 < learner.num_gpus < 1 and 0 < workers.num_gpus < 1):
        return None
    if workers.max is not None:
        raise problem(
            "workers.max", f"{workers.max}, but workers that share GPUs with the ranks are a fixed number: use count"
        )
    count = min(learner.ranks, workers.count)
    of_each = learner.ranks // count, workers.count // count
    share = of_each[0] * learner.num_gpus + of_each[1] * workers.num_gpus
    if learner.ranks % count or workers.count % count or share > 1 + ROUNDING:
        raise problem(
            "workers.num_gpus",
            f"{workers.num_gpus:g} for {workers.count} workers, beside learner.num_gpus = {learner.num_gpus:g} for "
            f"{learner.ranks} ranks: they cannot be packed with equally many of each on every GPU: use as many workers "
            "as ranks and shares that add up to at most 1, or whole GPUs",
        )
    return SharedGpus(count, *of_each, share)

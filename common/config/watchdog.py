"""The section `watchdog` of the run file (see `common.config.run`)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from common.config.rewards import RewardConfig
from common.config.section import Section, problem
from common.types import AlarmAction


class WatchdogConfig(Section):
    """The watchdog looks for reward hacking in stage 2, see docs/watchdog.md. It changes no number of the training."""

    on_alarm: AlarmAction = Field(
        AlarmAction.WARN,
        description="mark: write the alarm into watchdog.jsonl and the metrics. warn: print it, too. pause: print it, "
        "write a checkpoint, then wait as for `rtdmd control pause`; without Redis the run stops. roll_back: print it, "
        "then stop the run at the checkpoint with the best held-out reward, which is never pruned; later checkpoints "
        "are set aside. Each detector raises one alarm per run.",
    )
    false_alarm_rate: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Largest probability that a run in which nothing drifts beyond the tolerances raises any alarm.",
    )
    gold: str | None = Field(
        None,
        description="The evaluation-only reward that tells which checkpoint is best. null: the first one in `rewards`.",
    )

    def gold_of(self, rewards: Sequence[RewardConfig]) -> str | None:
        """Name of the reward that tells which checkpoint is best; None if no reward is held out."""
        held_out = [reward.name for reward in rewards if reward.evaluation_only]
        return self.gold or (held_out[0] if held_out else None)


def check_watchdog(
    watchdog: WatchdogConfig, rewards: Sequence[RewardConfig], evaluation_every: int, checkpoint_every: int
) -> None:
    """Check the conditions between this section and others."""
    held_out = [reward.name for reward in rewards if reward.evaluation_only]
    if watchdog.gold is not None and watchdog.gold not in held_out:
        known = ", ".join(held_out) or "none"
        raise problem("watchdog.gold", f"{watchdog.gold}, which is no evaluation_only reward: there are {known}")
    if watchdog.on_alarm is not AlarmAction.ROLL_BACK:
        return
    if not held_out:
        raise problem(
            "watchdog.on_alarm", "roll_back, but no reward is evaluation_only, so none tells which checkpoint is best"
        )
    if checkpoint_every % evaluation_every:
        raise problem(
            "watchdog.on_alarm",
            f"roll_back, but checkpoint.every = {checkpoint_every} is not a multiple of evaluation.every = "
            f"{evaluation_every}: a checkpoint must be evaluated to be the best",
        )

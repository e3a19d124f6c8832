"""The present steps of calls that run at the same time."""

from __future__ import annotations

import pytest

from common.heartbeat import StepAtWork
from common.progress import STEP_LIMIT_S, Progress


def test_each_call_has_its_own_step_and_its_own_seconds() -> None:
    progress = Progress("node", first_call_limit_s=0.0)
    with progress.call() as first, progress.call() as second:
        first.begin("rollout")
        first.begin("score", 90.0)
        second.begin("rollout")
        assert progress.heartbeat().at_work == (
            StepAtWork(2, "score", 90.0),
            StepAtWork(3, "rollout", STEP_LIMIT_S),
        )
        first.end()
        assert [step.name for step in progress.heartbeat().at_work] == ["rollout"]
    assert progress.heartbeat().at_work == ()
    assert (first.seconds.keys(), second.seconds.keys()) == ({"rollout", "score"}, {"rollout"})


def test_until_a_call_is_finished_its_long_limit_holds_for_all() -> None:
    progress = Progress("node", first_call_limit_s=1800.0)
    with pytest.raises(ZeroDivisionError), progress.call() as call:
        _ = 1 / len(call.seconds)
    with progress.call() as call:
        call.begin("rollout")
        assert progress.heartbeat().at_work == (StepAtWork(1, "rollout", 1800.0),)
    with progress.call() as call:
        call.begin("rollout")
        assert progress.heartbeat().at_work == (StepAtWork(2, "rollout", STEP_LIMIT_S),)

"""A seal finds every change of what a group holds."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from common.sealed_group import SealedGroup
from common.types import PolicyVersion, Prompt, ScoredGroup, StepPlan, TrajectoryGroup

PLAN = StepPlan(3, (1.0, 0.5, 0.0), 0.9, (0,))


def group() -> ScoredGroup:
    latents = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 1, 2, 2)
    trajectory = TrajectoryGroup(
        Prompt(1, "a dot", {"count": 2}), PLAN, PolicyVersion(3, "f"), latents, np.ones((2, 2), np.float32)
    )
    return ScoredGroup(trajectory, {"hps": np.array([0.5, 0.25], np.float32)})


def test_a_group_that_was_sent_is_whole() -> None:
    sealed = SealedGroup.of(group())
    assert pickle.loads(pickle.dumps(sealed)).is_whole()
    assert sealed.digest == SealedGroup.of(group()).digest


@pytest.mark.parametrize("array", ["latents", "surrogate", "reward"])
def test_one_flipped_bit_is_found(array: str) -> None:
    sealed = SealedGroup.of(group())
    trajectory = sealed.group.trajectory
    arrays = {
        "latents": trajectory.latents_SGchw,
        "surrogate": trajectory.surrogate_TG,
        "reward": sealed.group.rewards_G["hps"],
    }
    arrays[array].view(np.uint8).reshape(-1)[-3] ^= 1
    assert not sealed.is_whole()


def test_prompt_plan_policy_shape_and_names_belong_to_the_seal() -> None:
    scored, found = group(), set()
    trajectory = scored.trajectory
    for one in (
        scored,
        replace(scored, rewards_G={"other": scored.rewards_G["hps"]}),
        *(
            replace(scored, trajectory=replace(trajectory, **change))
            for change in (
                {"prompt": Prompt(1, "a dot", {"count": 3})},
                {"prompt": Prompt(2, "a dot", {"count": 2})},
                {"plan": replace(PLAN, iteration=4)},
                {"policy": PolicyVersion(3, "g")},
                {"latents_SGchw": trajectory.latents_SGchw.reshape(3, 2, 1, 4, 1)},
            )
        ),
    ):
        found.add(SealedGroup.of(one).digest)
    assert len(found) == 7

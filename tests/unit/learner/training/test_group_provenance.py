"""The learner trains on what it published, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import AttestationError
from common.group_ends import DueGroup, GroupFault
from common.sealed_group import SealedGroup
from common.types import PolicyVersion, Prompt, ScoredGroup, StepPlan, TrajectoryGroup
from learner.training.group_provenance import PublishedPolicies


def groups(iteration: int, number: int, count: int = 3) -> list[ScoredGroup]:
    """Groups of an iteration, sampled with version `number`."""
    plan = StepPlan(iteration, (1.0, 0.5, 0.0), 0.9, (0,))
    policy = PolicyVersion(number, f"weights {number}")
    latents, surrogate = np.zeros((3, 2, 1, 1, 1), np.float32), np.zeros((2, 2), np.float32)
    return [
        ScoredGroup(TrajectoryGroup(Prompt(place, "a dot"), plan, policy, latents, surrogate), {})
        for place in range(count)
    ]


def published(up_to: int, max_staleness: int, first: int = 0) -> PublishedPolicies:
    policies = PublishedPolicies(max_staleness)
    for number in range(first, up_to + 1):
        policies.remember(PolicyVersion(number, f"weights {number}"))
    return policies


@pytest.mark.parametrize(("staleness", "iteration", "due"), [(0, 0, 0), (0, 7, 7), (2, 1, 0), (2, 2, 0), (2, 7, 5)])
def test_the_version_that_is_due_passes_and_its_neighbours_do_not(staleness: int, iteration: int, due: int) -> None:
    policies = published(iteration, staleness)
    policies.attest(groups(iteration, due))
    for number in (due - 1, due + 1):
        with pytest.raises(AttestationError, match=rf"group of prompt 0 in iteration {iteration}: .*due is .*{due}"):
            policies.attest(groups(iteration, number))


def test_a_resumed_run_starts_with_the_first_version_it_published() -> None:
    for iteration, due in ((40, 40), (41, 40), (42, 40), (43, 41)):
        policies = published(iteration, max_staleness=2, first=40)
        policies.attest(groups(iteration, due))
        with pytest.raises(AttestationError, match=rf"due is .*{due}"):
            policies.attest(groups(iteration, due + 1))


def test_a_republished_version_counts_as_it_is_now() -> None:
    policies = published(3, 0)
    policies.remember(PolicyVersion(3, "other weights"))
    with pytest.raises(AttestationError, match=r"due is .*other weights"):
        policies.attest(groups(3, 3))


@pytest.mark.parametrize("odd", ["plan", "size", "fingerprint"])
def test_one_group_that_differs_is_named(odd: str) -> None:
    mixed = groups(4, 4)
    last = mixed[-1].trajectory
    changed = {
        "plan": replace(last, plan=replace(last.plan, selected=(1,))),
        "size": replace(last, latents_SGchw=last.latents_SGchw[:, :1]),
        "fingerprint": replace(last, policy=PolicyVersion(4, "other weights")),
    }[odd]
    mixed[-1] = replace(mixed[-1], trajectory=changed)
    with pytest.raises(AttestationError, match="group of prompt 2 in iteration 4"):
        published(4, 0).attest(mixed)


def test_a_group_that_comes_twice_in_a_batch_is_named() -> None:
    batch = groups(4, 4)
    with pytest.raises(AttestationError, match="group of prompt 1 in iteration 4: it came twice"):
        published(4, 0).attest([*batch, batch[1]])


def due(group: ScoredGroup, digest: str | None = None) -> DueGroup:
    trajectory = group.trajectory
    return DueGroup(trajectory.prompt, trajectory.plan, trajectory.group_size, digest or SealedGroup.of(group).digest)


def test_a_group_that_is_due_passes_and_the_same_one_in_another_place_is_repeated() -> None:
    policies, (first, second, third) = published(4, 0), groups(4, 4)
    assert policies.fault(SealedGroup.of(first), due(first)) is None
    assert policies.fault(SealedGroup.of(first), due(first)) is None, "asked again, for the same place"
    assert policies.fault(SealedGroup.of(first), due(second)) is GroupFault.REPEATED
    assert policies.fault(SealedGroup.of(third), due(second)) is GroupFault.FOREIGN, "it has not arrived before"


def test_groups_of_other_iterations_runs_and_policies_are_told_apart() -> None:
    policies, group = published(7, 2), groups(7, 5)[0]
    trajectory = group.trajectory
    assert policies.fault(SealedGroup.of(group), due(group)) is None
    cases = {
        GroupFault.STALE: [replace(trajectory, policy=PolicyVersion(4, "weights 4"))],
        GroupFault.FOREIGN: [
            groups(6, 4)[0].trajectory,
            replace(trajectory, policy=PolicyVersion(6, "weights 6")),
            replace(trajectory, policy=PolicyVersion(5, "weights of another run")),
            replace(trajectory, prompt=Prompt(0, "another text")),
            replace(trajectory, surrogate_TG=trajectory.surrogate_TG + 1),  # whole, but not what its worker reported
        ],
    }
    for fault, found in cases.items():
        for one in found:
            assert policies.fault(SealedGroup.of(replace(group, trajectory=one)), due(group)) is fault, one

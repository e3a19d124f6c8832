"""Groups that arrive damaged, twice, from elsewhere or not at all, on a real object store: none is trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from common.group_ends import DueGroup, GroupFault
from common.progress import STEP_LIMIT_S, Progress
from common.sealed_group import SealedGroup
from common.types import Collected, Prompt, StepPlan
from learner.driver.fleet import Fleet
from learner.driver.ledger import LEDGER, Ledger
from learner.driver.machines import RayMachines
from learner.driver.publisher import Publication
from learner.driver.rollouts import GROUP_ATTEMPTS, Rollouts
from learner.driver.worker_pool import WorkerPool
from learner.training.actor import Learner
from learner.training.group_provenance import PublishedPolicies
from learner.training.learner_rank import LearnerRank
from tests.helpers.ray_machine import ray_machine
from tests.helpers.toy_group_worker import POLICY, toy_group, toy_group_workers
from tests.helpers.waiting import wait_until

UNHEALTHY_AFTER_S = 5.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_machine(num_cpus=1) as started:
        yield started


PLAN = StepPlan(0, (1.0, 0.5, 0.0), 0.9, (0,))
PROMPTS = [Prompt(index, "a dot") for index in range(6)]


def receiving_learner() -> Learner:
    """A learner of one rank that has published the toy workers' weights, and has no model."""
    learner = Learner.__new__(Learner)
    learner._own, learner._others = LearnerRank.__new__(LearnerRank), []
    learner._own._progress, learner._own._limits_s, learner._own._pass_limit_s = Progress(""), {}, STEP_LIMIT_S
    learner._published = PublishedPolicies(0)
    learner._published.remember(POLICY)
    return learner


@ray.remote(num_cpus=0)
class Owner:
    def put(self) -> list[ray.ObjectRef]:
        return [ray.put(np.zeros(2**20))]


def lost_object() -> ray.ObjectRef:
    """A reference whose object went with the process that owned it."""
    owner = Owner.remote()
    (reference,) = ray.get(owner.put.remote())
    ray.kill(owner)
    wait_until(lambda: is_lost(reference), "the object to go")
    return reference


def is_lost(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference)
    except RayError:
        return True
    return False


def collected_with(folder: Path, faults: dict[int, GroupFault], times: int) -> Collected:
    """An iteration of toy groups, of which these are faulty so many times; prompt 4's object is lost."""
    learner, unhealthy_after_s = receiving_learner(), UNHEALTHY_AFTER_S
    lost = [4] * times if faults.get(4) is GroupFault.LOST else []

    def attest(group: ray.ObjectRef[SealedGroup], due: DueGroup) -> GroupFault | None:
        if due.prompt.index in lost:
            lost.remove(due.prompt.index)
            group = lost_object()
        return learner.attest([group], due)

    workers = toy_group_workers(folder, {index: fault for index, fault in faults.items() if index != 4}, times)
    with WorkerPool(Fleet(workers, 1, 0, unhealthy_after_s), RayMachines(), unhealthy_after_s) as started:
        started.admit("base", 1)
        rollouts = Rollouts(started, 2, attest)
        rollouts.request(PLAN, PROMPTS, Publication(None, None))  # type: ignore[arg-type]
        return rollouts.collect(0)


FAULTS = {
    1: GroupFault.DAMAGED,
    2: GroupFault.STALE,
    3: GroupFault.FOREIGN,
    4: GroupFault.LOST,
    5: GroupFault.REPEATED,  # of prompt 0, which has arrived by then
}


@pytest.mark.usefixtures("cluster")
def test_faulty_groups_are_refused_by_name_and_sampled_again(tmp_path: Path) -> None:
    collected = collected_with(tmp_path, FAULTS, times=1)
    found = [sealed.group.trajectory for sealed in ray.get(collected.groups)]
    assert [trajectory.prompt for trajectory in found] == PROMPTS
    for trajectory in found:
        whole = toy_group(trajectory.prompt, PLAN, 2).trajectory
        assert np.array_equal(trajectory.latents_SGchw, whole.latents_SGchw)
    assert Counter(group.fault for group in collected.refused) == Counter(FAULTS.values())
    assert {group.worker for group in collected.refused} == set(collected.images)
    Ledger(tmp_path).record(collected.ends)
    lines = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert [(line["prompt"], line["outcome"], line["attempts"]) for line in lines] == [
        (index, "trained", 1 + (index in FAULTS)) for index in range(6)
    ]


@pytest.mark.usefixtures("cluster")
def test_groups_that_stay_faulty_are_dropped_and_each_has_one_end(tmp_path: Path) -> None:
    collected = collected_with(tmp_path, FAULTS, times=GROUP_ATTEMPTS)
    assert [sealed.group.trajectory.prompt.index for sealed in ray.get(collected.groups)] == [0]
    assert collected.dropped == {f"infra:{fault}": 1 for fault in FAULTS.values()}
    assert [str(end.outcome) for end in collected.ends] == ["trained", "infra_dropped", "stale", *["infra_dropped"] * 3]

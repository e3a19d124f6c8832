"""A rollout worker without a model, whose groups are damaged, repeated or foreign when a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from common.group_ends import GroupFault
from common.heartbeat import Heartbeat
from common.progress import Progress
from common.sealed_group import SealedGroup
from common.types import PolicyVersion, ProcessPlace, Prompt, RolloutOutcome, ScoredGroup, StepPlan, TrajectoryGroup
from learner.driver.worker_pool import HEALTH

POLICY = PolicyVersion(0, "weights 0")


def toy_group(prompt: Prompt, plan: StepPlan, group_size: int) -> ScoredGroup:
    """A function of its keys alone."""
    latents = np.full((3, group_size, 1, 2, 2), prompt.index + 10 * plan.iteration, np.float32)
    trajectory = TrajectoryGroup(prompt, plan, POLICY, latents, np.zeros((2, group_size), np.float32))
    return ScoredGroup(trajectory, {"bright": np.zeros(group_size, np.float32)})


class ToyGroupWorker:
    """`folder` holds a file for each fault that has happened: each happens `times` times."""

    def __init__(self, folder: Path, faults: Mapping[int, GroupFault], times: int) -> None:
        self._folder, self._faults, self._times = folder, faults, times
        self._progress = Progress(ray.get_runtime_context().get_node_id(), first_call_limit_s=0.0)

    def ready(self) -> tuple[str, ProcessPlace]:
        return "base", self._progress.place

    def heartbeat(self) -> Heartbeat:
        return self._progress.heartbeat()

    def rollout(
        self,
        prompt: Prompt,
        plan: StepPlan,
        group_size: int,
        weights: None,
        frozen: None,
        *,
        pictured: bool,
    ) -> tuple[RolloutOutcome, SealedGroup]:
        sealed = SealedGroup.of(toy_group(prompt, plan, group_size))
        outcome = RolloutOutcome(str(self._progress.place), POLICY, {"rollout": 1.0}, digest=sealed.digest)
        fault = self._faults.get(prompt.index)
        happened = list(self._folder.glob(f"{prompt.index}.*"))
        if fault is None or len(happened) >= self._times:
            return outcome, sealed
        (self._folder / f"{prompt.index}.{len(happened)}").write_text(str(os.getpid()))
        return outcome, _faulty(fault, sealed)


def _faulty(fault: GroupFault, sealed: SealedGroup) -> SealedGroup:
    trajectory = sealed.group.trajectory
    if fault is GroupFault.DAMAGED:
        trajectory.latents_SGchw.view(np.uint8).reshape(-1)[5] ^= 16
        return sealed
    if fault is GroupFault.STALE:
        return SealedGroup.of(replace(sealed.group, trajectory=replace(trajectory, policy=PolicyVersion(-1, "old"))))
    plan = replace(trajectory.plan, iteration=99) if fault is GroupFault.FOREIGN else trajectory.plan
    first = replace(trajectory.prompt, index=0) if fault is GroupFault.REPEATED else trajectory.prompt
    return SealedGroup.of(toy_group(first, plan, trajectory.group_size))


def toy_group_workers(folder: Path, faults: Mapping[int, GroupFault], times: int) -> Callable[[int], ActorHandle]:
    """Starts a worker that takes one CPU. It runs one call at a time, so that groups arrive in the order of prompts."""
    actor = ray.remote(num_cpus=1, concurrency_groups={HEALTH: 1})(ToyGroupWorker)
    return lambda _: actor.remote(folder, faults, times)

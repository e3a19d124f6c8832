"""Starts the learner: one actor, or several placed together, one per rank.

The driver only calls the first, a `Learner` (`learner/training/actor.py`). The others are `LearnerRank`s.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.run import Config
from common.errors import ConfigError
from common.rewards.access import RewardAccess
from common.types import Prompt
from learner.driver.calls import CALL_TIMEOUT_S
from learner.driver.cluster import actor_environment
from learner.training.actor import Learner
from learner.training.learner_rank import LearnerRank
from learner.training.ranks import Meeting


@contextmanager
def started_learner(
    config: Config, prompts: Sequence[Prompt], access: RewardAccess, device: str
) -> Iterator[list[ActorHandle]]:
    """The learner, still loading, and the actors of its other ranks. Calls wait; the driver only calls the learner.

    Raises:
        ConfigError: the cluster has not enough room for the ranks.
    """
    settings = config.learner
    resources = ray.remote(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, runtime_env=actor_environment())
    leader, rank = resources(Learner), resources(LearnerRank)
    if settings.ranks == 1:
        yield [leader.remote(config, prompts, access, device)]
        return
    with _placed(settings.ranks, {"CPU": settings.num_cpus, "GPU": settings.num_gpus}) as group, _meeting(group) as at:

        def meeting(index: int) -> Meeting:
            return Meeting(index, settings.ranks, at, CALL_TIMEOUT_S, settings.shard_base)

        def placed(index: int) -> dict[str, Any]:
            return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)}

        others = [
            rank.options(**placed(index)).remote(config, prompts, access, device, meeting(index))
            for index in range(1, settings.ranks)
        ]
        learner = leader.options(**placed(0)).remote(config, prompts, access, device, meeting(0), others)
        yield [learner, *others]


@contextmanager
def _placed(count: int, resources: dict[str, float]) -> Iterator[PlacementGroup]:
    """A placement group for `count` ranks, close together."""
    bundle = {name: amount for name, amount in resources.items() if amount > 0} or {"CPU": 0.001}
    group = placement_group([bundle] * count, strategy="PACK")
    try:
        if not group.wait(CALL_TIMEOUT_S):
            raise ConfigError(
                f"learner.ranks = {count}: the cluster has no room for as many times {bundle}; use fewer ranks, or "
                "lower learner.num_cpus and learner.num_gpus"
            )
        yield group
    finally:
        with suppress(ray.exceptions.RayError):
            remove_placement_group(group)


@contextmanager
def _meeting(group: PlacementGroup) -> Iterator[str]:
    """The ranks' meeting point: a file if they and the driver share one machine, else a port on rank 0's machine."""
    where = PlacementGroupSchedulingStrategy
    asked = [
        ray.remote(num_cpus=0)(_address).options(scheduling_strategy=where(group, index)).remote()
        for index in range(group.bundle_count)
    ]
    addresses = ray.get(asked, timeout=CALL_TIMEOUT_S)
    # A file would exist on the driver's machine only.
    if len({ray.util.get_node_ip_address(), *(host for host, _ in addresses)}) > 1:
        yield "tcp://{}:{}".format(*addresses[0])
        return
    folder = Path(tempfile.mkdtemp(prefix="rtdmd-ranks-"))
    try:
        yield (folder / "meeting").as_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _address() -> tuple[str, int]:
    """This machine's address and a port that was free a moment ago."""
    with socket.create_server(("", 0)) as server:
        return ray.util.get_node_ip_address(), server.getsockname()[1]

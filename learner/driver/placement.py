"""Places the learner's ranks together, and the workers that share GPUs with them.

a GPU each       Ray places every worker; the ranks are packed close together
shares of a GPU  one bundle per GPU, for its ranks and its workers, so that no GPU gets only one kind
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.processes import SharedGpus, shared_gpus
from common.config.run import Config
from common.errors import ConfigError
from learner.driver.calls import CALL_TIMEOUT_S


@dataclass(frozen=True)
class Placement:
    """Ray's options that put each process in its place.

    Attributes:
        group: the places of the ranks, which no other process takes between two starts of the learner.
        shared: None if ranks and workers share no GPUs.
    """

    group: PlacementGroup | None = None
    shared: SharedGpus | None = None

    def rank(self, index: int) -> dict[str, Any]:
        """The options of a rank, counted from 0."""
        return self._bundle(index if self.shared is None else index // self.shared.ranks)

    def worker(self, place: int) -> dict[str, Any]:
        """The options of the worker of a place, counted from 1. Ray places those that a run gets in addition."""
        if self.shared is None or place > self.shared.count * self.shared.workers:
            return {}
        return self._bundle((place - 1) // self.shared.workers)

    def bundles(self) -> list[dict[str, Any]]:
        """The options that put something into each bundle."""
        return [] if self.group is None else [self._bundle(index) for index in range(self.group.bundle_count)]

    def _bundle(self, index: int) -> dict[str, Any]:
        if self.group is None:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, index)}


def bundles_of(config: Config) -> list[dict[str, float]]:
    """The bundles that a run reserves: one per shared GPU, else one per rank."""
    learner, workers = config.learner, config.workers
    shared = shared_gpus(learner, workers)
    if shared is not None:
        cpus = shared.ranks * learner.num_cpus + shared.workers * workers.num_cpus
        return [_amounts(cpus, shared.share)] * shared.count
    return [_amounts(learner.num_cpus, learner.num_gpus)] * learner.ranks


@contextmanager
def placed(config: Config) -> Iterator[Placement]:
    """Reserve the bundles of a run, close together. A single rank waits by itself until its bundle is there.

    Raises:
        ConfigError: the cluster has not enough room for them.
    """
    bundles = bundles_of(config)
    group = placement_group(bundles, strategy="PACK")
    try:
        if len(bundles) > 1 and not group.wait(CALL_TIMEOUT_S):
            raise ConfigError(
                f"learner.ranks = {config.learner.ranks}: the cluster has no room for {len(bundles)} times "
                f"{bundles[0]}; use fewer ranks, or lower num_cpus and num_gpus"
            )
        yield Placement(group, shared_gpus(config.learner, config.workers))
    finally:
        with suppress(ray.exceptions.RayError):
            remove_placement_group(group)


def _amounts(cpus: float, gpus: float) -> dict[str, float]:
    amounts = {"CPU": cpus, "GPU": gpus}
    return {name: amount for name, amount in amounts.items() if amount > 0} or {"CPU": 0.001}

"""The simulated learner: publishes versions, fetches and checks groups, updates.

The driver waits for every call of it, and lets virtual time pass meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.simulate.cluster import LEARNER_MACHINE, Cluster
from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.timeline import Timeline
from benchmarks.simulate.worker import GroupReference, Published
from common.group_ends import DueGroup, GroupFault
from common.types import UpdateResult
from learner.driver.durable_learner import DurableLearner

FROZEN = -1
"""The number of the adapters that do not train."""


class SimulatedLearner(DurableLearner):
    """A learner without processes.

    Attributes:
        trained: number of groups that were trained. `worst_age`: the largest age of one.
        calls: of the driver. `versions`: those that were published.
    """

    def __init__(self, timeline: Timeline, cluster: Cluster, scenario: Scenario) -> None:
        self._timeline, self._cluster, self._scenario = timeline, cluster, scenario
        self.trained, self.worst_age, self.calls = 0, 0, 0
        self.versions: list[Published] = []

    def frozen_weights(self) -> Published:
        return self._appear(FROZEN, 0.0)

    def publish(self, number: int, *, averaged: bool) -> Published:  # noqa: ARG002
        published = self._appear(number, self._scenario.publish_s)
        self.versions.append(published)
        return published

    def attest(
        self,
        group: GroupReference,
        due: DueGroup,  # noqa: ARG002
        watch: Callable[[], None],  # noqa: ARG002
    ) -> GroupFault | None:
        """Fetch a group and hash it; LOST if its machine is lost before it is here."""
        self._wait(0.0)
        arrived: list[bool] = []
        self._cluster.network.send(
            group.machine, LEARNER_MACHINE, self._scenario.group_bytes, lambda: arrived.append(True)
        )
        here = self._timeline.until(
            lambda: True if arrived else False if self._cluster.losses[group.machine] > group.losses else None
        )
        self._timeline.advance(self._scenario.check_s)
        return None if here else GroupFault.LOST

    def attested(self, group: GroupReference, due: DueGroup) -> GroupFault | None:
        """`attest`, as `Rollouts` asks for it."""
        return self.attest(group, due, lambda: None)

    def align(self, groups: Sequence[GroupReference], watch: Callable[[], None]) -> UpdateResult:  # noqa: ARG002
        """One update."""
        self.trained += len(groups)
        self.worst_age = max([self.worst_age, *(group.iteration - group.version for group in groups)])
        self._wait(self._scenario.update_s)
        return UpdateResult({}, {})

    def _appear(self, number: int, seconds: float) -> Published:
        published = Published(number, self._cluster.shared(self._scenario.adapter_bytes))
        self._wait(seconds)
        published.shared.appear()
        return published

    def _wait(self, seconds: float) -> None:
        """Wait for the answer of a call that takes so many seconds."""
        self.calls += 1
        self._timeline.advance(seconds + 2 * self._scenario.call_s)

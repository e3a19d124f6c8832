"""The simulated learner: publishes versions, fetches and checks groups, updates. It does one call at a time.

The driver's waits for it let virtual time pass, as `learner.driver.calls.answer` lets real time pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.simulate.cluster import LEARNER_MACHINE, Cluster
from benchmarks.simulate.references import Method
from benchmarks.simulate.scenario import Scenario
from benchmarks.simulate.timeline import Timeline
from benchmarks.simulate.worker import GroupReference, Published
from common.group_ends import DueGroup, GroupFault

FROZEN = -1
"""The number of the adapters that do not train."""


class SimulatedLearner:
    """The handle of the learner's actor, and the learner. `worst_age`: of a group that was trained."""

    def __init__(self, timeline: Timeline, cluster: Cluster, scenario: Scenario) -> None:
        self._timeline, self._cluster, self._scenario = timeline, cluster, scenario
        self._free_at = 0.0
        self.worst_age = 0
        self.calls = 0
        self.versions: list[Published] = []
        self.frozen_weights = Method(lambda: self._appear(FROZEN, 0.0))
        self.publish = Method(self._publish)

    def _publish(self, number: int, *, averaged: bool) -> Published:  # noqa: ARG002
        published = self._appear(number, self._scenario.publish_s)
        self.versions.append(published)
        return published

    def _appear(self, number: int, seconds: float) -> Published:
        published = Published(number, self._cluster.shared(self._scenario.adapter_bytes))
        self._timeline.after(self._after(seconds), published.shared.appear)
        return published

    def attest(self, group: GroupReference, due: DueGroup) -> GroupFault | None:  # noqa: ARG002
        """Fetch a group and hash it; LOST if its machine is lost before it is here."""
        self.calls += 1
        self._timeline.advance(max(0.0, self._free_at - self._timeline.now) + self._scenario.call_s)
        arrived: list[bool] = []
        self._cluster.network.send(
            group.machine, LEARNER_MACHINE, self._scenario.group_bytes, lambda: arrived.append(True)
        )
        here = self._timeline.until(
            lambda: True if arrived else False if self._cluster.losses[group.machine] > group.losses else None
        )
        self._timeline.advance(self._scenario.check_s + self._scenario.call_s)
        return None if here else GroupFault.LOST

    def align(self, groups: Sequence[GroupReference]) -> None:
        """One update."""
        self.worst_age = max([self.worst_age, *(group.iteration - max(0, group.version) for group in groups)])
        self._timeline.advance(self._after(self._scenario.update_s))

    def _after(self, seconds: float) -> float:
        """Seconds until a call that takes so many is answered: those before it are finished first."""
        self.calls += 1
        self._free_at = max(self._free_at, self._timeline.now) + seconds
        return self._free_at - self._timeline.now + 2 * self._scenario.call_s

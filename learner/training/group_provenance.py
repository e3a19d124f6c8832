"""Provenance of groups: the weights that an iteration's groups must have been sampled with, and the check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.errors import AttestationError
from common.group_ends import DueGroup, GroupFault
from common.sealed_group import SealedGroup
from common.types import PolicyVersion, ScoredGroup


class PublishedPolicies:
    """Remembers the policies published for training, only as far back as groups may be stale."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._fingerprints: dict[int, str] = {}
        # Digests of the groups of one iteration that have arrived.
        self._iteration = -1
        self._arrived: set[str] = set()

    @property
    def fingerprints(self) -> dict[int, str]:
        """Version -> fingerprint of the remembered policies."""
        return dict(self._fingerprints)

    def restore(self, fingerprints: Mapping[int, str]) -> None:
        """Remember these policies alone: `fingerprints` of a learner whose place this one takes."""
        self._fingerprints = dict(fingerprints)

    def remember(self, version: PolicyVersion) -> None:
        self._fingerprints[version.number] = version.fingerprint
        oldest = version.number - self._max_staleness
        self._fingerprints = {number: value for number, value in self._fingerprints.items() if number >= oldest}

    def fault(self, sealed: SealedGroup, due: DueGroup) -> GroupFault | None:
        """Why one group of an iteration, which is whole, must not be trained on; None if it is the one that is due."""
        trajectory = sealed.group.trajectory
        if (trajectory.prompt, trajectory.plan, trajectory.group_size) != (due.prompt, due.plan, due.group_size):
            return GroupFault.REPEATED if sealed.digest in self._arrived else GroupFault.FOREIGN
        policy = self._due(due.plan.iteration)
        if trajectory.policy.number < policy.number:
            return GroupFault.STALE
        if trajectory.policy != policy or sealed.digest != due.digest:
            return GroupFault.FOREIGN
        if due.plan.iteration != self._iteration:
            self._iteration, self._arrived = due.plan.iteration, set()
        self._arrived.add(sealed.digest)
        return None

    def _due(self, iteration: int) -> PolicyVersion:
        """The version max(first, iteration - max_staleness).

        `first` is the first published version: 0, or the version at which the run was resumed.
        """
        number = max(min(self._fingerprints), iteration - self._max_staleness)
        return PolicyVersion(number, self._fingerprints[number])

    def attest(self, groups: Sequence[ScoredGroup]) -> None:
        """Check that all groups follow one plan, have one size and prompts of their own, and the due weights.

        Raises:
            AttestationError: the groups differ, one came twice, or one was sampled with other weights.
        """
        first = groups[0].trajectory
        due, seen = self._due(first.plan.iteration), set[int]()
        for trajectory in (group.trajectory for group in groups):
            where = f"group of prompt {trajectory.prompt.index} in iteration {first.plan.iteration}"
            if trajectory.plan != first.plan:
                raise AttestationError(f"{where}: sampled under {trajectory.plan}, the first group under {first.plan}")
            if trajectory.group_size != first.group_size:
                raise AttestationError(f"{where}: {trajectory.group_size} samples, the first has {first.group_size}")
            if trajectory.prompt.index in seen:
                raise AttestationError(f"{where}: it came twice in one batch")
            seen.add(trajectory.prompt.index)
            if trajectory.policy != due:
                raise AttestationError(f"{where}: sampled with {trajectory.policy}, due is {due}")

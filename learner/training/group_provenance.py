"""Provenance of groups: the weights that an iteration's groups must have been sampled with, and the check."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import AttestationError
from common.types import PolicyVersion, ScoredGroup


class PublishedPolicies:
    """Remembers the policies published for training, only as far back as groups may be stale."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._fingerprints: dict[int, str] = {}

    def remember(self, version: PolicyVersion) -> None:
        self._fingerprints[version.number] = version.fingerprint
        oldest = version.number - self._max_staleness
        self._fingerprints = {number: value for number, value in self._fingerprints.items() if number >= oldest}

    def attest(self, groups: Sequence[ScoredGroup]) -> None:
        """Check that all groups follow one plan, have one size, and were sampled with the due weights.

        The due weights have version max(first, iteration - max_staleness). `first` is the first published version: 0,
        or the version at which the run was resumed.

        Raises:
            AttestationError: the groups differ, or were sampled with other weights.
        """
        first = groups[0].trajectory
        number = max(min(self._fingerprints), first.plan.iteration - self._max_staleness)
        due = PolicyVersion(number, self._fingerprints[number])
        for trajectory in (group.trajectory for group in groups):
            where = f"group of prompt {trajectory.prompt.index} in iteration {first.plan.iteration}"
            if trajectory.plan != first.plan:
                raise AttestationError(f"{where}: sampled under {trajectory.plan}, the first group under {first.plan}")
            if trajectory.group_size != first.group_size:
                raise AttestationError(f"{where}: {trajectory.group_size} samples, the first has {first.group_size}")
            if trajectory.policy != due:
                raise AttestationError(f"{where}: sampled with {trajectory.policy}, due is {due}")

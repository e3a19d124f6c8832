"""A scored group on its way from a worker to the learner, with a hash of all that it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from common.types import ScoredGroup
from common.wire import fingerprint, tensor_hashes


@dataclass(frozen=True)
class SealedGroup:
    """A group and its digest, as its worker computed it.

    Attributes:
        digest: xxh3-128, hex, over prompt, plan, policy version and every array. It finds damage; it is no signature.
    """

    group: ScoredGroup
    digest: str

    @classmethod
    def of(cls, group: ScoredGroup) -> Self:
        return cls(group, _digest(group))

    def is_whole(self) -> bool:
        """Whether the group is still what its worker sealed."""
        return _digest(self.group) == self.digest


def _digest(group: ScoredGroup) -> str:
    trajectory = group.trajectory
    arrays = {f"reward/{name}": values for name, values in group.rewards_G.items()}
    arrays |= {"latents": trajectory.latents_SGchw, "surrogate": trajectory.surrogate_TG}
    origin = {"prompt": repr(trajectory.prompt), "plan": repr(trajectory.plan), "policy": repr(trajectory.policy)}
    return fingerprint(tensor_hashes(arrays) | origin)

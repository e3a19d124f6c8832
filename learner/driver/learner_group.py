"""Starts the learner: one actor, or several placed together, one per rank. Restarts it on request.

The driver only calls the first, a `Learner` (`learner/training/actor.py`). The others are `LearnerRank`s. Their places
in the cluster stay reserved, so that no other process takes them between two starts.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from common.config.run import Config
from common.errors import ConfigError, LearnerError, ModelError
from common.rewards.access import RewardAccess
from common.types import ProcessPlace, Prompt
from learner.driver.calls import CALL_TIMEOUT_S, WATCH_S, remote_reason
from learner.driver.cluster import actor_environment
from learner.driver.machines import Machines
from learner.driver.placement import Placement
from learner.driver.worker_pool import HEALTH
from learner.training.actor import Learner
from learner.training.learner_rank import LearnerRank
from learner.training.ranks import Meeting


class LearnerGroup:
    """The ranks of a run's learner. `config` may change between two starts."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        access: RewardAccess,
        device: str,
        placement: Placement,
        machines: Machines,
    ) -> None:
        self.config = config
        self._prompts, self._access, self._device = prompts, access, device
        self._placement = placement
        self._machines = machines
        self._meeting = ExitStack()
        self.ranks: list[ActorHandle] = []
        self.places: list[ProcessPlace] = []

    @property
    def leader(self) -> ActorHandle:
        return self.ranks[0]

    def start(self) -> None:
        """Start every rank, and return while they load. Calls wait."""
        settings, shared = self.config.learner, (self.config, self._prompts, self._access, self._device)
        # Ray's own restart would lose what has been trained.
        resources = ray.remote(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={HEALTH: 1},
            runtime_env=actor_environment(releases_memory=self.config.phases_share_gpus),
        )
        leader, rank = resources(Learner), resources(LearnerRank)
        at = self._meeting.enter_context(_meeting(self._placement)) if settings.ranks > 1 else ""

        def meeting(index: int) -> Meeting | None:
            return Meeting(index, settings.ranks, at, CALL_TIMEOUT_S, settings.shard_base) if at else None

        placed = self._placement.rank
        others = [rank.options(**placed(index)).remote(*shared, meeting(index)) for index in range(1, settings.ranks)]
        self.ranks = [leader.options(**placed(0)).remote(*shared, meeting(0), others), *others]

    def wait_until_loaded(self, watch: Callable[[], None] = lambda: None) -> str:
        """The fingerprint of the base, once all ranks have loaded the same one; `watch` may raise meanwhile.

        Raises:
            LearnerError: a rank could not load, or died.
            ConfigError: the ranks were not placed and loaded in `CALL_TIMEOUT_S`.
            ModelError: they have found different models.
        """
        pending = {rank.ready.remote(): index for index, rank in enumerate(self.ranks)}
        found: dict[int, tuple[str, ProcessPlace]] = {}
        until = time.monotonic() + CALL_TIMEOUT_S
        while pending:
            # One at a time: the error of a failed rank must not be hidden behind the ranks that wait for it.
            done, _ = ray.wait(list(pending), timeout=WATCH_S)
            watch()
            if not done and time.monotonic() > until:
                raise ConfigError(
                    f"the learner did not start in {CALL_TIMEOUT_S:.0f} s: does the cluster have the CPUs and GPUs "
                    "that learner.* asks for?"
                )
            for reference in done:
                try:
                    found[pending.pop(reference)] = ray.get(reference)
                except RayActorError as error:
                    raise LearnerError(f"learner or workers could not start: {remote_reason(error)}") from error
        self.places = [found[index][1] for index in range(len(found))]
        if len({fingerprint for fingerprint, _ in found.values()}) > 1:
            raise ModelError(
                f"the learner's ranks found different models at {self.config.backbone.path}: give all the same"
            )
        return found[0][0]

    def stop(self) -> None:
        """End every rank, also one that is frozen or still loads."""
        for rank in self.ranks:
            self._machines.kill(rank)
        for place in self.places:
            self._machines.end(place)
        self.ranks, self.places = [], []
        self._meeting.close()


@contextmanager
def started_learner(
    config: Config,
    prompts: Sequence[Prompt],
    access: RewardAccess,
    device: str,
    placement: Placement,
    machines: Machines,
) -> Iterator[LearnerGroup]:
    """The learner, still loading."""
    group = LearnerGroup(config, prompts, access, device, placement, machines)
    try:
        group.start()
        yield group
    finally:
        for rank in group.ranks:
            machines.kill(rank)


@contextmanager
def _meeting(placement: Placement) -> Iterator[str]:
    """The ranks' meeting point: a file if they and the driver share one machine, else a port on rank 0's machine."""
    asked = [ray.remote(num_cpus=0)(_address).options(**options).remote() for options in placement.bundles()]
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

"""Starts the learner: one actor, or several placed together, one per rank.

The driver only calls the first, a `Learner` (`learner/training/actor.py`). The others are `LearnerRank`s.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.actor import ActorHandle

from common.config.run import Config
from common.errors import ConfigError, ModelError
from common.rewards.access import RewardAccess
from common.types import Prompt
from learner.driver.calls import CALL_TIMEOUT_S, remote_reason
from learner.driver.cluster import actor_environment
from learner.driver.placement import Placement
from learner.training.actor import Learner
from learner.training.learner_rank import LearnerRank
from learner.training.ranks import Meeting


@contextmanager
def started_learner(
    config: Config, prompts: Sequence[Prompt], access: RewardAccess, device: str, placement: Placement
) -> Iterator[list[ActorHandle]]:
    """The learner, still loading, and the actors of its other ranks. Calls wait; the driver only calls the learner."""
    settings = config.learner
    resources = ray.remote(
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        runtime_env=actor_environment(releases_memory=config.phases_share_gpus),
    )
    leader, rank = resources(Learner), resources(LearnerRank)
    if settings.ranks == 1:
        yield [leader.options(**placement.rank(0)).remote(config, prompts, access, device)]
        return
    with _meeting(placement) as at:

        def meeting(index: int) -> Meeting:
            return Meeting(index, settings.ranks, at, CALL_TIMEOUT_S, settings.shard_base)

        others = [
            rank.options(**placement.rank(index)).remote(config, prompts, access, device, meeting(index))
            for index in range(1, settings.ranks)
        ]
        learner = leader.options(**placement.rank(0)).remote(config, prompts, access, device, meeting(0), others)
        yield [learner, *others]


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


def wait_until_loaded(config: Config, ranks: list[ActorHandle]) -> str:
    """The fingerprint of the base, once all ranks have loaded the same one."""
    pending = [rank.base_fingerprint.remote() for rank in ranks]
    fingerprints: set[str] = set()
    until = time.monotonic() + CALL_TIMEOUT_S
    try:
        while pending:
            # One at a time: the error of a failed rank must not be hidden behind the ranks that wait for it.
            done, pending = ray.wait(pending, timeout=max(0.0, until - time.monotonic()))
            if not done:
                raise ConfigError(
                    f"the learner did not start in {CALL_TIMEOUT_S:.0f} s: does the cluster have the CPUs and GPUs "
                    "that learner.* asks for?"
                )
            fingerprints |= set(ray.get(done))
    except ray.exceptions.RayActorError as error:
        raise ModelError(f"learner or workers could not start: {remote_reason(error)}") from error
    if len(fingerprints) > 1:
        raise ModelError(f"the learner's ranks found different models at {config.backbone.path}: give all the same")
    return fingerprints.pop()


def _address() -> tuple[str, int]:
    """This machine's address and a port that was free a moment ago."""
    with socket.create_server(("", 0)) as server:
        return ray.util.get_node_ip_address(), server.getsockname()[1]

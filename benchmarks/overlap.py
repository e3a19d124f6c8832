"""Images/s of two rollout workers whose reward takes long: with one call at a time per worker, and with two.

    python -m benchmarks.overlap [--config deploy/runs/shapes.yaml] [--score-s 0.2 2] [--groups 16]

Real workers, a real pool and the run file's model; the reward only waits. Every arm repeats the same groups. `sample_s`
is the mean time for which a group used the model, measured in the same arm. `of_ideal` is images/s over those of
workers that need max(sample_s, score_s) per group. Prints one JSON object.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip - before torch, see there

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch

from benchmarks.as_json import add_out, show
from common.backbones import load_backbone
from common.command import user_path
from common.config.run import Config
from common.group_ends import DueGroup, GroupFault
from common.prompts import load_prompts
from common.rewards.access import RewardAccess
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.rewards.guard import Answers, RewardGuard
from common.sealed_group import SealedGroup
from common.types import Collected, Network, StepPlan
from common.weights import frozen_weights, publish
from learner.driver.call_queue import CALLS_PER_WORKER
from learner.driver.cluster import actor_environment
from learner.driver.fleet import Fleet
from learner.driver.machines import RayMachines
from learner.driver.publisher import Publication
from learner.driver.rollouts import Rollouts
from learner.driver.worker_pool import HEALTH, WorkerPool
from learner.preflight.command_line import parse
from learner.training.networks import COLD_START
from rollout_workers.actor import RolloutWorker, WorkerSettings

PROJECT_ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
WARM_GROUPS = 2 * WORKERS
"""Groups before the clock starts."""


class WaitingGuard(RewardGuard):
    """A reward that answers after a fixed time, to any number of requests at once."""

    def __init__(self, score_s: float) -> None:
        self._score_s = score_s

    def score(
        self,
        images_BHWC: ByteArray,
        prompts: Sequence[str],  # noqa: ARG002
        metadata: Sequence[Metadata],  # noqa: ARG002
        names: Iterable[str],
    ) -> Answers[FloatArray]:
        time.sleep(self._score_s)
        return Answers({name: np.zeros(len(images_BHWC), np.float32) for name in names})


@dataclass(frozen=True)
class WaitingAccess(RewardAccess):
    """Access to the reward that waits."""

    score_s: float = 0.0

    def longest_wait_s(self) -> float:
        return 60.0 + self.score_s

    @contextmanager
    def guard(self) -> Iterator[RewardGuard]:
        yield WaitingGuard(self.score_s)


def main() -> None:
    arguments = _parse()
    config = parse(["--config", str(arguments.config)], {}).config
    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    model = _published(config)
    arms = [(score_s, calls) for score_s in arguments.score_s for calls in (1, CALLS_PER_WORKER)]
    found = [_arm(config, model, arguments.groups, score_s, calls) for score_s, calls in arms]
    show({"benchmark": "overlap", "workers": WORKERS, "groups": arguments.groups, "arms": found}, arguments.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=user_path, default=PROJECT_ROOT / "deploy/runs/shapes.yaml")
    parser.add_argument("--score-s", type=float, nargs="+", default=[0.2, 2.0], help="seconds that a score takes")
    parser.add_argument("--groups", type=int, default=16, help="groups per arm")
    add_out(parser)
    return parser.parse_args()


@dataclass(frozen=True)
class _Model:
    """The weights of a model with fresh adapters, its schedule and the fingerprint of its base."""

    weights: Publication
    sigmas: tuple[float, ...]
    fingerprint: str


def _published(config: Config) -> _Model:
    backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    backbone.adapters.add(COLD_START, seed=0, trainable=True)
    backbone.adapters.define(Network.STUDENT, (COLD_START,))
    weights = Publication(ray.put(publish(backbone, 0)), ray.put(frozen_weights(backbone)))
    return _Model(weights, backbone.sigmas(config.sampling.steps), backbone.base_fingerprint())


def _accepted(group: ray.ObjectRef[SealedGroup], due: DueGroup) -> GroupFault | None:  # noqa: ARG001
    """No learner is there to check a group."""
    return None


def _arm(config: Config, model: _Model, groups: int, score_s: float, calls: int) -> Mapping[str, float]:
    """One measurement in fresh workers, each with this many calls at a time."""
    access = WaitingAccess((), {}, config.reward_client, None, None, 0, score_s=score_s)
    settings = WorkerSettings(config.backbone, config.lora, access, ("waiting",), config.run.seed, 1, "cpu", False)
    actor = ray.remote(
        num_cpus=1, max_concurrency=calls, concurrency_groups={HEALTH: 1}, runtime_env=actor_environment()
    )(RolloutWorker)
    unhealthy_after_s = config.workers.unhealthy_after_s
    fleet = Fleet(lambda _: actor.remote(settings), WORKERS, 0, unhealthy_after_s)
    prompts, size = load_prompts(config.prompts.train), config.alignment.group_size
    with WorkerPool(fleet, RayMachines(), unhealthy_after_s) as pool:
        pool.admit(model.fingerprint, WORKERS)
        rollouts = Rollouts(pool, size, _accepted)

        def collected(iteration: int, count: int) -> Collected:
            plan = StepPlan(iteration, model.sigmas, config.sampling.eta, (0, 1))
            rollouts.request(plan, prompts[:count], model.weights)
            return rollouts.collect(iteration)

        collected(0, WARM_GROUPS)
        started = time.perf_counter()
        result = collected(1, groups)
        seconds = time.perf_counter() - started
    for worker in fleet.workers:
        ray.kill(worker.handle)
    sample_s = sum(result.model_s.values()) / groups
    images_per_s, ideal = groups * size / seconds, WORKERS * size / max(sample_s, score_s)
    return {
        "score_s": score_s,
        "calls_per_worker": calls,
        "sample_s": round(sample_s, 3),
        "images_per_s": round(images_per_s, 2),
        "of_ideal": round(images_per_s / ideal, 3),
        "model_idle": round(sum(result.idle_shares().values()) / WORKERS, 3),
    }


if __name__ == "__main__":
    main()

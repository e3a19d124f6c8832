"""A worker with two calls: one uses the model while the other is scored, and no number depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pytest
import torch

from common.config.backbones import ImportedBackbone
from common.config.rewards import RewardClientConfig
from common.config.run import LoraConfig
from common.policies import SamplingSpec
from common.rewards.access import RewardAccess
from common.rewards.api import ByteArray, FloatArray, Metadata
from common.rewards.guard import Answers, RewardGuard
from common.types import Network, Prompt, RewardHealth, ScoredGroup, StepPlan
from common.weights import PublishedWeights, publish
from rollout_workers.actor import RolloutWorker, WorkerSettings
from tests.helpers.tiny_pipeline import randomise
from tests.helpers.toy_family import ToyFlow, write_toy

PLAN = StepPlan(iteration=2, sigmas=(1.0, 0.9, 0.75, 0.5, 0.0), eta=0.9, selected=(0, 2))
PROMPTS = [Prompt(index, text) for index, text in enumerate(("a dot", "eels", "oil", "a line", "ion", "ease"))]
LORA = LoraConfig(rank=2, alpha=4)
DEADLINE_S = 60.0


class TogetherGuard(RewardGuard):
    """Scores as many requests as have met: if they never do, it raises."""

    def __init__(self, together: int) -> None:
        self._meeting = Barrier(together, timeout=DEADLINE_S)

    def score(
        self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata], names: Iterable[str]
    ) -> Answers[FloatArray]:
        self._meeting.wait()
        return Answers({"bright": images_BHWC.mean(axis=(1, 2, 3)).astype(np.float32)})

    def score_all(
        self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, FloatArray]:
        return self.score(images_BHWC, prompts, metadata, ["bright"]).values

    def health(self) -> dict[str, RewardHealth]:
        return {}


@dataclass(frozen=True)
class TogetherAccess(RewardAccess):
    together: int = 1

    def longest_wait_s(self) -> float:
        return DEADLINE_S

    @contextmanager
    def guard(self) -> Iterator[RewardGuard]:
        yield TogetherGuard(self.together)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> ImportedBackbone:
    folder = write_toy(tmp_path_factory.mktemp("toy"))
    return ImportedBackbone(
        family="tests.helpers.toy_family:ToyFlow", path=folder, width=6, options={"shift": 3.0}, dtype="float32"
    )


@pytest.fixture(scope="module")
def versions(backbone: ImportedBackbone) -> list[PublishedWeights]:
    """Two versions of the student."""
    flow = ToyFlow(backbone, LORA, torch.device("cpu"))
    flow.adapters.add("student", seed=0, trainable=True)
    flow.adapters.define(Network.STUDENT, ("student",))
    found = []
    for number in range(2):
        randomise(flow, "student", seed=number)
        found.append(publish(flow, number))
    return found


def worker(backbone: ImportedBackbone, together: int) -> RolloutWorker:
    access = TogetherAccess((), {}, RewardClientConfig(), None, None, 0, together=together)
    return RolloutWorker(WorkerSettings(backbone, LORA, access, ("bright",), 0, 1, "cpu", False))


def rolled(one: RolloutWorker, prompt: Prompt, weights: PublishedWeights) -> ScoredGroup:
    frozen = np.zeros(0, np.uint8)
    outcome, sealed = one.rollout(prompt, PLAN, 3, weights, frozen)
    assert sealed is not None
    assert sealed.is_whole()
    assert outcome.digest == sealed.digest
    group = sealed.group
    assert outcome.version == group.trajectory.policy == weights.manifest.version
    assert outcome.seconds.keys() == {"weights", "rollout", "decode", "statistics", "score", "idle"}
    return group


def test_two_groups_in_flight_are_those_of_one_at_a_time(
    backbone: ImportedBackbone, versions: list[PublishedWeights]
) -> None:
    """Of each pair the second is sampled while the first is scored, with other weights: the swap falls between them."""
    calls = [(prompt, versions[index % 2]) for index, prompt in enumerate(PROMPTS)]
    alone, together = worker(backbone, 1), worker(backbone, 2)
    expected = [rolled(alone, *call) for call in calls]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda call: rolled(together, *call), calls))
    for group, other in zip(found, expected, strict=True):
        assert group.trajectory.policy == other.trajectory.policy
        assert np.array_equal(group.trajectory.latents_SGchw, other.trajectory.latents_SGchw)
        assert np.array_equal(group.trajectory.surrogate_TG, other.trajectory.surrogate_TG)
        assert np.array_equal(group.rewards_G["bright"], other.rewards_G["bright"])
    assert not np.array_equal(found[0].trajectory.latents_SGchw, found[1].trajectory.latents_SGchw)


def test_an_evaluation_samples_while_another_one_is_scored(
    backbone: ImportedBackbone, versions: list[PublishedWeights]
) -> None:
    spec = SamplingSpec(Network.STUDENT, 4, guidance=1.0, eta=0.9)
    alone, together = worker(backbone, 1), worker(backbone, 2)
    frozen = np.zeros(0, np.uint8)
    parts = (PROMPTS[:2], PROMPTS[2:4])
    expected = [alone.evaluate(part, spec, 2, versions[0], frozen) for part in parts]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda part: together.evaluate(part, spec, 2, versions[0], frozen), parts))
    for part, other in zip(found, expected, strict=True):
        for one, same in zip(part, other, strict=True):
            assert np.array_equal(one.images_GHWC, same.images_GHWC)
            assert np.array_equal(one.rewards_G["bright"], same.rewards_G["bright"])
            assert one.diversity == same.diversity
            assert one.statistics == same.statistics
    assert together.heartbeat().at_work == ()

"""GPUs that ranks and workers share: what fills them, and shares that are refused by name."""

from __future__ import annotations

import pytest
from pydantic_core import PydanticCustomError

from common.config.processes import LearnerConfig, SharedGpus, WorkersConfig, shared_gpus


def shared(ranks: int, rank_gpus: float, workers: int, worker_gpus: float) -> SharedGpus | None:
    learner = LearnerConfig(ranks=ranks, num_gpus=rank_gpus)
    return shared_gpus(learner, WorkersConfig(count=workers, num_gpus=worker_gpus))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((8, 0.5, 8, 0.5), (8, 1, 1, 1.0)),
        ((1, 0.45, 1, 0.45), (1, 1, 1, 0.9)),
        ((2, 0.4, 6, 0.2), (2, 1, 3, 1.0)),
        ((10, 0.1, 2, 0.5), (2, 5, 1, 1.0)),
    ],
)
def test_every_gpu_holds_equally_many_of_each(
    asked: tuple[int, float, int, float], expected: tuple[int, int, int, float]
) -> None:
    found = shared(*asked)
    assert found is not None
    assert (found.count, found.ranks, found.workers) == expected[:3]
    assert found.share == pytest.approx(expected[3])


@pytest.mark.parametrize("asked", [(4, 1, 4, 1), (1, 0, 4, 0), (2, 1, 2, 0.5), (2, 0.5, 1, 0), (1, 2, 1, 0.5)])
def test_whole_gpus_and_the_cpu_are_not_shared(asked: tuple[int, float, int, float]) -> None:
    assert shared(*asked) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ((2, 0.5, 2, 0.6), "0.6 for 2 workers, beside learner.num_gpus = 0.5 for 2 ranks: they cannot be packed"),
        ((2, 0.5, 3, 0.25), "0.25 for 3 workers, .* cannot be packed with equally many of each on every GPU"),
        ((1, 0.5, 2, 0.3), "use as many workers as ranks and shares that add up to at most 1, or whole GPUs"),
        ((1, 1.5, 1, 0), "1.5: above one GPU Ray gives whole ones only: use 1"),
    ],
)
def test_shares_that_cannot_be_packed_are_refused(asked: tuple[int, float, int, float], reason: str) -> None:
    with pytest.raises(PydanticCustomError, match=reason):
        shared(*asked)


def test_a_changing_number_of_workers_shares_no_gpu_with_ranks() -> None:
    workers = WorkersConfig(min=1, max=4, num_gpus=0.5)
    with pytest.raises(PydanticCustomError, match="4, but workers that share GPUs with the ranks are a fixed number"):
        shared_gpus(LearnerConfig(ranks=4, num_gpus=0.5), workers)
    assert shared_gpus(LearnerConfig(ranks=4, num_gpus=1), workers) is None

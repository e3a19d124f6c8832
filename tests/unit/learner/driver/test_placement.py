"""The bundles that a run reserves, by hand; tests/integration/test_worker_pool.py fills them on a cluster."""

from __future__ import annotations

import pytest
from ray.util.placement_group import PlacementGroup

from common.config.processes import SharedGpus
from common.config.run import Config
from learner.driver.placement import Placement, bundles_of
from learner.preflight.command_line import parse


def config(ranks: int, rank_gpus: float, workers: int, worker_gpus: float, **more: float) -> Config:
    options = {
        "learner.ranks": ranks,
        "learner.num_gpus": rank_gpus,
        "workers.count": workers,
        "workers.num_gpus": worker_gpus,
        "learner.num_cpus": 0.5,
        **more,
    }
    return parse([f"--{key}={value}" for key, value in options.items()], {}).config


def test_a_gpu_that_is_shared_is_one_bundle() -> None:
    run = config(4, 0.5, 8, 0.25, **{"learner.num_cpus": 2, "workers.num_cpus": 0.5})
    assert bundles_of(run) == [{"CPU": 3.0, "GPU": 1.0}] * 4


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (config(2, 1, 3, 1), [{"CPU": 0.5, "GPU": 1.0}] * 2),
        (config(2, 0, 3, 0), [{"CPU": 0.5}] * 2),
        (config(2, 0, 3, 0, **{"learner.num_cpus": 0}), [{"CPU": 0.001}] * 2),
        (config(1, 1, 3, 1), [{"CPU": 0.5, "GPU": 1.0}]),
    ],
)
def test_without_sharing_each_rank_has_a_bundle(run: Config, expected: list[dict[str, float]]) -> None:
    assert bundles_of(run) == expected


def test_without_bundles_ray_places_everything() -> None:
    nowhere = Placement()
    assert (nowhere.rank(0), nowhere.worker(1), nowhere.bundles()) == ({}, {}, [])


def test_ranks_and_workers_fill_the_bundles_and_further_workers_have_none() -> None:
    placement = Placement(PlacementGroup.empty(), SharedGpus(2, 1, 2, 1.0))
    of_ranks = [placement.rank(index)["scheduling_strategy"].placement_group_bundle_index for index in range(2)]
    of_workers = [placement.worker(place)["scheduling_strategy"].placement_group_bundle_index for place in range(1, 5)]
    assert (of_ranks, of_workers) == ([0, 1], [0, 0, 1, 1])
    assert placement.worker(5) == {}


def test_phases_share_gpus_only_where_they_take_turns() -> None:
    assert config(2, 0.5, 2, 0.5).phases_share_gpus
    assert not config(2, 0.5, 2, 0.5, **{"alignment.max_staleness": 1}).phases_share_gpus
    assert not config(2, 1, 2, 1).phases_share_gpus

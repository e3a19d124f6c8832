"""The pool on a real cluster: workers that freeze, die, join, leave and are slow; none of it loses a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from common.errors import ModelError, WorkerError
from learner.driver import call_queue
from learner.driver.fleet import Fleet
from learner.driver.machines import RayMachines
from learner.driver.placement import placed
from learner.driver.worker_pool import WorkerPool
from learner.preflight.command_line import parse
from tests.helpers.ray_machine import ray_machine
from tests.helpers.toy_worker import toy_workers, work
from tests.helpers.waiting import wait_until

UNHEALTHY_AFTER_S = 2.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A machine of two CPUs; tests add others."""
    with ray_machine(num_cpus=2) as started:
        yield started


@contextmanager
def pool(
    folder: Path, places: int, *, restarts: int = 3, fingerprint: Callable[[], str] = lambda: "base"
) -> Iterator[tuple[WorkerPool, list[str]]]:
    said: list[str] = []
    fleet = Fleet(toy_workers(folder, fingerprint), places, restarts, UNHEALTHY_AFTER_S)
    with WorkerPool(fleet, RayMachines(), UNHEALTHY_AFTER_S, say=said.append) as started:
        yield started, said


def results(workers: WorkerPool, *keys: int) -> dict[int, int]:
    """Each key's process."""
    return {finished.key: finished.result for finished in (workers.take(set(keys)) for _ in keys)}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("fault", "reason"), [("freeze", "it has not answered for"), ("die", "died")])
def test_a_worker_that_is_lost_loses_no_call_and_is_replaced(tmp_path: Path, fault: str, reason: str) -> None:
    with pool(tmp_path, places=2) as (workers, said):
        workers.admit("base", 2)
        for key in range(4):
            workers.submit(work(key))
        results(workers, 0, 1, 2, 3)
        workers.submit(work(9, f"{fault} mark"))
        processes = results(workers, 9)
        lost = int((tmp_path / "mark").read_text())
        assert processes[9] != lost
        wait_until(lambda: not Path(f"/proc/{lost}").exists(), "its process to end")
        workers.admit("base", 2)
        assert "is gone: " in said[0]
        assert reason in said[0]
        assert said[0].endswith("1 call goes to others, and another worker is started")


@pytest.mark.usefixtures("cluster")
def test_a_worker_runs_two_calls_at_once(tmp_path: Path) -> None:
    with pool(tmp_path, places=1) as (workers, said):
        workers.admit("base", 1)
        for key, name in enumerate(("first", "second")):
            workers.submit(work(key, f"wait {name}"))
        for name in ("second", "first"):  # the later call ends before the earlier one
            wait_until(lambda name=name: bool(list(tmp_path.glob(f"{name}.*"))), f"the {name} call to begin")
        (tmp_path / "second").touch()
        results(workers, 1)
        (tmp_path / "first").touch()
        results(workers, 0)
        assert said == []


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_busy_worker_that_cannot_answer_is_left_alone(tmp_path: Path) -> None:
    """It holds the interpreter lock for longer than an idle process could be silent.

    Slow, because beside the other integration tests its process ended in two of four runs. Why is not known.
    """
    with pool(tmp_path, places=1) as (workers, said):
        workers.admit("base", 1)
        workers.submit(work(0))
        first = results(workers, 0)[0]
        workers.submit(work(1, f"lock {3 * UNHEALTHY_AFTER_S}"))
        process = results(workers, 1)[1]
        assert said == []
        assert process == first


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_answers_but_gets_no_further_is_replaced(tmp_path: Path) -> None:
    with pool(tmp_path, places=1) as (workers, said):
        workers.admit("base", 1)
        workers.submit(work(0, "wait go", limit_s=1.0))
        wait_until(lambda: bool(said), "the worker to be given up")
        assert "it gets no further in its step wait" in said[0]
        (tmp_path / "go").touch()
        results(workers, 0)


@pytest.mark.usefixtures("cluster")
def test_a_slow_workers_call_is_given_to_an_idle_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_queue, "SLOW_MIN_S", 0.5)
    with pool(tmp_path, places=2) as (workers, said):
        workers.admit("base", 2)
        workers.submit(work(0))
        results(workers, 0)
        workers.submit(work(1, "wait go"))
        wait_until(lambda: len(list(tmp_path.glob("go.*"))) == 2, "a second worker to get the call")
        (tmp_path / "go").touch()
        results(workers, 1)
        assert said == []


def test_workers_join_when_a_machine_does_and_leave_with_it(cluster: Cluster, tmp_path: Path) -> None:
    """Two find room at first. The others wait, as a demand that an autoscaler sees."""
    with pool(tmp_path, places=4) as (workers, said):
        workers.admit("base", 2)
        assert len(workers) == 2
        added = cluster.add_node(num_cpus=2)
        workers.admit("base", 4)
        for key in range(8):
            workers.submit(work(key, "wait go"))
        wait_until(lambda: len(list(tmp_path.glob("go.*"))) == 4, "a call on each worker")
        cluster.remove_node(added, allow_graceful=False)
        wait_until(lambda: len(workers) == 2, "the workers of the machine to be given up")
        (tmp_path / "go").touch()
        assert len(set(results(workers, *range(8)).values())) == 2
        assert len(said) == 2


@pytest.mark.usefixtures("cluster")
def test_another_model_is_refused_at_the_start_and_later(tmp_path: Path) -> None:
    with (
        pool(tmp_path, places=1, fingerprint=lambda: "other") as (workers, _),
        pytest.raises(ModelError, match=r"found different models at backbone\.path"),
    ):
        workers.admit("base", 1)
    later = iter(["base", "base", "other", "other"])
    with pool(tmp_path, places=2, restarts=1, fingerprint=lambda: next(later)) as (workers, said):
        workers.admit("base", 2)
        workers.submit(work(0, "die mark"))
        results(workers, 0)
        wait_until(lambda: len(said) == 2, "the next worker to be refused")
        assert "it found another model at backbone.path than the learner" in said[1]
        assert len(workers) == 1


@pytest.mark.usefixtures("cluster")
def test_without_workers_and_restarts_the_run_ends_by_name(tmp_path: Path) -> None:
    with pool(tmp_path, places=1, restarts=0) as (workers, _):
        workers.admit("base", 1)
        workers.submit(work(0, "die mark"))
        with pytest.raises(WorkerError, match=r"the last rollout worker is gone.*workers\.restarts = 0.*--resume"):
            workers.take({0})


def test_every_shared_gpu_gets_a_rank_and_a_worker(cluster: Cluster) -> None:
    """Without the bundles Ray would put both ranks on one of the two GPUs of the added machine."""
    machine = cluster.add_node(num_cpus=1, num_gpus=2)
    sharing = ["learner.ranks=2", "learner.num_gpus=0.5", "learner.num_cpus=0.1"]
    sharing += ["workers.count=2", "workers.num_gpus=0.5", "workers.num_cpus=0.1"]
    try:
        with placed(parse([f"--{option}" for option in sharing], {}).config) as placement:
            half = ray.remote(num_cpus=0.1, num_gpus=0.5)(WithGpu)
            ranks = [half.options(**placement.rank(index)).remote() for index in range(2)]
            workers = [half.options(**placement.worker(place)).remote() for place in (1, 2)]
            of_ranks, of_workers = (ray.get([one.gpus.remote() for one in kind]) for kind in (ranks, workers))
        assert sorted(of_ranks) == [["0"], ["1"]]
        assert of_workers == of_ranks
    finally:
        cluster.remove_node(machine)


class WithGpu:
    def gpus(self) -> list[str]:
        return [str(one) for one in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

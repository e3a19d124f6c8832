"""Processes of a run that are killed: a worker, a rank of the learner, a reward server."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from common import WAIT_POLICY
from learner.driver.local_servers import RESTARTS
from tests.helpers.running_service import Run, Service, assert_equal_runs
from tests.helpers.shared_services import Cluster
from tests.helpers.waiting import wait_until

BRIGHTNESS = "reward_servers --scorer tests.helpers.toy_scorers:BrightnessScorer"
PARTS = ("ray::Learner", "ray::RolloutWorker", "-m reward_servers")
"""Processes of a run, by what is known of their command lines."""


def final_state(run: Run) -> bytes:
    """All that training has changed: adapters, moments, moving average."""
    return (run.run_dir / "checkpoints" / "alignment-000008" / "state.safetensors").read_bytes()


def test_faults_that_are_mended_change_nothing(config: Path, finished: Run, cluster: Cluster) -> None:
    """A reward server is killed, then one of two workers, then the other one is frozen; each is replaced.

    Then the learner is killed, and the next one is frozen: it is started again, and repeats what it had not finished.
    """
    options = ("--workers.count", "2", "--workers.unhealthy_after_s", "2", "--learner.unhealthy_after_s", "2")
    run = Run(config, config.parent / "faults", *options, cluster=cluster)
    run.wait_for_lines(1, stage="alignment")
    (server,) = run.processes(BRIGHTNESS)
    os.kill(server.pid, signal.SIGKILL)
    run.wait_for_lines(2, stage="alignment")
    first, second = run.processes("ray::RolloutWorker")
    os.kill(first.pid, signal.SIGKILL)
    run.wait_for_lines(3, stage="alignment")
    os.kill(second.pid, signal.SIGSTOP)
    for iterations, fault in ((4, signal.SIGKILL), (5, signal.SIGSTOP)):
        run.wait_for_lines(iterations, stage="alignment")
        (learner,) = run.processes("ray::Learner")
        os.kill(learner.pid, fault)
        wait_until(lambda gone=learner: not gone.alive, "the lost learner to end")
    run.finish()
    assert_equal_runs(run, finished)
    assert final_state(run) == final_state(finished)
    assert "the local reward server bright ended with exit status -9: it is started again" in run.output
    assert "is gone: " in run.output
    assert "it has not answered for 2 s, and uses no processor" in run.output
    assert run.output.count("another worker is started") == 2
    assert "the learner is gone: the learner died: " in run.output
    assert "the learner is gone: the learner hangs: rank 0 (" in run.output
    assert run.output.count("the learner is back after ") == 2


def assert_nearly_equal_runs(run: Run, finished: Run) -> None:
    assert len(run.metrics()) == len(finished.metrics())
    for (*place, found), (*expected_place, expected) in zip(run.metrics(), finished.metrics(), strict=True):
        assert place == expected_place
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), place


@pytest.mark.slow
def test_all_ranks_start_again_together_and_train_as_one_does(finished: Run, service: Service) -> None:
    """A rank is killed, then the run is interrupted; with a sharded base it resumes, and a rank freezes."""
    options = ("--learner.ranks", "2", "--learner.unhealthy_after_s", "2")
    run = service.run("lost_rank", *options)
    run.wait_for_lines(3, stage="alignment")
    first = run.processes("ray::Learner")
    assert len(first) == 2
    os.kill(max(rank.pid for rank in first), signal.SIGKILL)
    run.wait_for_lines(5, stage="alignment")
    second = run.processes("ray::Learner")
    assert not {rank.pid for rank in first} & {rank.pid for rank in second}
    run.process.send_signal(signal.SIGTERM)
    run.finish(status=130)
    assert "the learner is back after " in run.output
    resumed = service.run("lost_rank", "--resume", *options, "--learner.shard_base", "true")
    resumed.wait_for_lines(6, stage="alignment")
    os.kill(max(rank.pid for rank in resumed.processes("ray::Learner")), signal.SIGSTOP)
    resumed.finish()
    assert "the learner is gone: the learner hangs: rank " in resumed.output
    assert_nearly_equal_runs(resumed, finished)


def test_a_run_that_is_terminated_says_how_to_continue(service: Service) -> None:
    """As Slurm and Kubernetes end a run. Ray would take the signal for itself."""
    run = service.run("terminated")
    run.wait_for_lines(2, stage="cold_start")
    run.process.send_signal(signal.SIGTERM)
    run.finish(status=130)
    assert run.output.splitlines()[-1] == "interrupted; continue with --resume"


def wait_policies(run: Run) -> set[tuple[str, str]]:
    """OMP_WAIT_POLICY in the environment of the run's processes, by the known part of their command lines."""
    found = set()
    for part in PARTS:
        for process in run.processes(part):
            lines = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
            values = [line.partition("=")[2] for line in lines if line.startswith(f"{WAIT_POLICY}=")]
            found.add((part, " ".join(values)))
    return found


@pytest.mark.slow
def test_a_local_reward_server_that_dies_too_often_ends_the_run_by_name(
    config: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it ran ahead by one iteration, evaluations among the rollouts in flight.

    The driver's OMP_WAIT_POLICY reaches all processes, also in a cluster that was started with another value.
    """
    monkeypatch.setenv(WAIT_POLICY, "passive")
    options = {"--alignment.iterations": "500", "--alignment.max_staleness": "1", "--evaluation.every": "2"}
    words = [word for pair in options.items() for word in pair]
    run = Run(config, config.parent / "no_reward", *words, cluster=cluster)
    run.wait_for_lines(4, stage="alignment")
    assert "evaluation" in [line["kind"] for line in run.lines()]
    assert wait_policies(run) == {(part, "passive") for part in PARTS}
    killed: set[int] = set()

    def kill_another() -> bool:
        found = {server.pid for server in run.processes(BRIGHTNESS)} - killed
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        killed.update(found)
        return len(killed) > RESTARTS

    wait_until(kill_another, "the server to die once more than it is started again")
    run.finish(status=1)
    assert "error: " in run.output
    last = run.output.rpartition("error: ")[2]
    assert "local reward server bright ended with exit status -9, for the 4th time in 10 minutes; the end of" in last
    assert "Traceback" not in run.output

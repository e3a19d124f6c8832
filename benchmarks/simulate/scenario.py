"""A scenario: the cluster, the work and the faults of a simulated run. And the figures of one."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.simulate.network import PullRule


@dataclass(frozen=True)
class Scenario:
    """A run of stage 2. The bytes are those of SD3.5-M at 512 x 512 with groups of 24; the seconds are assumptions.

    Attributes:
        groups_per_worker: prompts of an iteration, per worker.
        sample_s: seconds for which a group uses its worker's model: four steps, decoder and statistics.
        score_s: seconds from a group's last image to its scores.
        jitter: relative standard deviation of both.
        apply_s: seconds in which a worker applies and attests a new version.
        update_s, publish_s: seconds of an update and of a publication; the learner has as many ranks as that needs.
        group_bytes: a group: 5 states x 24 samples x 16 x 64 x 64 x 4 bytes.
        adapter_bytes: one adapter in float32; the one that trains and the frozen one have the same size.
        check_s: seconds in which the learner hashes a group.
        link_gbit_s: speed of each machine's link. `link_use`: the part of it that a transfer reaches.
        call_s: seconds of a call's way to an actor, and of its answer's way back.
        load_s: seconds in which a worker loads. `back_s`: seconds until a lost machine can be used again.
        noticed_s: seconds until Ray says that a process is gone. `machine_noticed_s`: the same of a machine.
        slow_workers: share of workers that take `slow_factor` times as long.
        lost_calls: probability that a worker dies in a call; every second one freezes instead.
        lost_machines: share of the iterations that begin with the loss of a machine, at equal distances.
        warm, measured: iterations before the clock starts, and until it stops. As many as `max_staleness` follow.
    """

    workers: int = 256
    workers_per_machine: int = 8
    warm: int = 3
    measured: int = 4
    groups_per_worker: int = 4
    max_staleness: int = 1
    sample_s: float = 3.0
    score_s: float = 0.8
    jitter: float = 0.05
    apply_s: float = 0.25
    update_s: float = 3.0
    publish_s: float = 0.25
    group_bytes: int = 5 * 24 * 16 * 64 * 64 * 4
    adapter_bytes: int = 96_000_000
    check_s: float = 0.0012
    link_gbit_s: float = 100.0
    link_use: float = 0.8
    pull_rule: PullRule = PullRule.ANY_HOLDER
    call_s: float = 0.001
    load_s: float = 60.0
    back_s: float = 120.0
    noticed_s: float = 0.5
    machine_noticed_s: float = 15.0
    unhealthy_after_s: float = 5.0
    restarts: int = 3
    slow_workers: float = 0.0
    slow_factor: float = 10.0
    lost_calls: float = 0.0
    lost_machines: float = 0.0
    seed: int = 0

    @property
    def machines(self) -> int:
        """Machines with workers. The learner has another one."""
        return -(-self.workers // self.workers_per_machine)

    @property
    def groups(self) -> int:
        """Groups of an iteration."""
        return self.workers * self.groups_per_worker

    @property
    def iterations(self) -> int:
        """The last ones are not measured: in them the workers run out of work."""
        return self.warm + self.measured + self.max_staleness

    @property
    def bytes_per_s(self) -> float:
        return self.link_gbit_s * 1e9 / 8 * self.link_use


@dataclass(frozen=True)
class Figures:
    """The measurements of a simulated run, after its warm iterations.

    Attributes:
        groups_per_s: groups that were trained.
        worker_busy: share of the time in which a worker's model was used.
        worst_age: largest age of a trained group: its iteration minus the version that sampled it.
        wasted: share of the sampled groups that were not trained: of slow workers that another one overtook, and lost.
        ends: lines of the ledger. There must be one per group.
        payloads: most copies of one version that the learner's machine sent.
        broadcast_s: longest pull of a version by a machine.
        recovery_s: of each call that was lost with its worker, seconds until another worker had it; the longest.
        faults: number of lost workers.
        driver_cores: processor seconds of the driver's code per second, without those of Ray.
        calls_per_s: calls of the driver to actors per second, heartbeats too.
    """

    groups_per_s: float
    worker_busy: float
    worst_age: int
    wasted: float
    ends: int
    payloads: int
    broadcast_s: float
    recovery_s: float
    faults: int
    driver_cores: float
    calls_per_s: float

"""The questions that are put to the simulation, each answered by a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import ray

from benchmarks.simulate.local import call_costs, measure
from benchmarks.simulate.network import PullRule
from benchmarks.simulate.run import simulate
from benchmarks.simulate.scenario import Scenario

SIZES = (8, 64, 256)
PACES = ((1.2, 25.0), (1.2, 100.0), (3.0, 25.0), (3.0, 100.0), (6.0, 25.0))
"""Seconds in which a worker samples a group, and GBit/s."""
LOCAL = Scenario(
    sample_s=0.4,
    score_s=0.3,
    apply_s=0.05,
    update_s=0.6,
    publish_s=0.05,
    group_bytes=1_000_000,
    adapter_bytes=1_000_000,
    link_gbit_s=1000.0,
    warm=1,
)
"""A scenario that takes seconds with real workers."""
LONG = 40
"""Iterations that are measured where faults come by chance."""


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """The lines of a markdown table."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def sizes(base: Scenario) -> Iterator[str]:
    """Throughput against the size of the cluster, link speed and the seconds of a group."""

    def rows() -> Iterator[Sequence[str]]:
        for sample_s, link in PACES:
            paced = replace(base, sample_s=sample_s, link_gbit_s=link)
            one = simulate(replace(paced, workers=1)).groups_per_s
            for workers in SIZES:
                found = simulate(replace(paced, workers=workers))
                share = found.groups_per_s / workers / one
                yield (
                    f"{sample_s:g}",
                    f"{link:g}",
                    f"{workers}",
                    f"{found.groups_per_s:.1f}",
                    f"{share:.1%}",
                    f"{found.payloads}",
                    f"{found.driver_cores:.3f}",
                    f"{found.calls_per_s:.0f}",
                )

    head = ("s per group", "GbE", "workers", "groups/s", "of linear", "payloads", "driver's cores", "calls/s")
    return table(head, rows())


def stragglers(base: Scenario) -> Iterator[str]:
    """Slow workers, and how far the others may go ahead."""

    def rows() -> Iterator[Sequence[str]]:
        for staleness in (0, 1, 4):
            usual = None
            for slow in (0.0, 0.01):
                found = simulate(replace(base, max_staleness=staleness, slow_workers=slow, measured=8))
                usual = usual or found.groups_per_s
                yield (
                    f"{staleness}",
                    f"{slow:.0%}",
                    f"{found.groups_per_s:.1f}",
                    f"{found.groups_per_s / usual:.1%}",
                    f"{found.worst_age}",
                    f"{found.wasted:.2%}",
                )

    return table(("max_staleness", "slow workers", "groups/s", "of none slow", "worst age", "wasted groups"), rows())


def faults(base: Scenario) -> Iterator[str]:
    """Lost machines and lost workers."""

    def rows() -> Iterator[Sequence[str]]:
        usual = simulate(replace(base, measured=LONG)).groups_per_s
        for machines, calls in ((0.1, 0.0), (0.2, 0.0), (0.0, 0.0005)):
            found = simulate(replace(base, measured=LONG, lost_machines=machines, lost_calls=calls))
            yield (
                f"{machines:.0%}",
                f"{calls:.2%}",
                f"{found.faults}",
                f"{found.groups_per_s / usual:.1%}",
                f"{found.recovery_s:.1f}",
                f"{found.wasted:.2%}",
            )

    head = ("iterations that lose a machine", "calls that lose a worker", "workers lost", "effective time")
    return table((*head, "longest recovery, s", "wasted groups"), rows())


def broadcast(base: Scenario) -> Iterator[str]:
    """A publication to all workers. With max_staleness 0 all of them wait for it, and ask at once."""

    def rows() -> Iterator[Sequence[str]]:
        for rule in PullRule:
            for staleness in (0, 1):
                for link in (25.0, 100.0):
                    scenario = replace(
                        base, pull_rule=rule, max_staleness=staleness, link_gbit_s=link, groups_per_worker=2
                    )
                    found = simulate(scenario)
                    yield f"{rule}", f"{staleness}", f"{link:g}", f"{found.payloads}", f"{found.broadcast_s:.2f}"

    return table(("rule of pulls", "max_staleness", "GbE", "payloads of the learner", "longest pull, s"), rows())


def local(_: Scenario) -> Iterator[str]:
    """The prediction beside real workers that wait, on this machine."""

    def rows() -> Iterator[Sequence[str]]:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        for workers in (2, 4):
            for staleness in (0, 1):
                scenario = replace(LOCAL, workers=workers, max_staleness=staleness)
                measured, modelled = measure(scenario), simulate(scenario).groups_per_s
                yield (
                    f"{workers}",
                    f"{staleness}",
                    f"{modelled:.2f}",
                    f"{measured:.2f}",
                    f"{modelled / measured:.3f}",
                )

    head = ("workers", "max_staleness", "modelled groups/s", "measured groups/s", "modelled / measured")
    yield from table(head, rows())
    costs = call_costs(LOCAL)
    yield f"\nprocessor ms of the driver per call: ping {costs.ping_ms:.2f}, rollout {costs.rollout_ms:.2f}"


TABLES: dict[str, Callable[[Scenario], Iterator[str]]] = {
    "sizes": sizes,
    "stragglers": stragglers,
    "faults": faults,
    "broadcast": broadcast,
    "local": local,
}

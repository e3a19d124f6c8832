"""The simulation runs the driver's own code, its parts do what they say, and its figures are those of small cases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from benchmarks.simulate import run
from benchmarks.simulate.network import Network, PullRule, SharedObject
from benchmarks.simulate.run import simulate
from benchmarks.simulate.scenario import Figures, Scenario
from benchmarks.simulate.timeline import Timeline, VirtualEvents

SMALL = Scenario(workers=2, groups_per_worker=2, jitter=0.0, link_gbit_s=100.0, warm=2, measured=2)
MODULES = {
    "learner.driver.fleet": "Fleet",
    "learner.driver.ledger": "Ledger",
    "learner.driver.publisher": "Publisher",
    "learner.driver.rollouts": "Rollouts",
    "learner.driver.worker_pool": "WorkerPool",
    "learner.loop": "run_alignment",
}


@pytest.mark.parametrize("module", MODULES)
def test_the_parts_of_the_driver_are_the_drivers_own(module: str) -> None:
    assert vars(run)[MODULES[module]] is vars(sys.modules[module])[MODULES[module]]


@pytest.fixture
def ledger_lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every group that the real ledger writes."""
    lines: list[str] = []
    record = run.Ledger.record

    def recorded(self: run.Ledger, ends: list[object]) -> None:
        lines.extend(f"{end}" for end in ends)
        record(self, ends)  # type: ignore[arg-type]

    monkeypatch.setattr(run.Ledger, "record", recorded)
    return lines


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_happen_in_the_order_of_their_times() -> None:
    timeline, seen = Timeline(), list[tuple[str, float]]()
    timeline.after(2.0, lambda: seen.append(("late", timeline())))
    timeline.after(1.0, lambda: seen.append(("early", timeline())))
    timeline.advance(5.0)
    assert seen == [("early", 1.0), ("late", 2.0)]
    assert timeline() == 5.0


def test_a_wait_ends_with_what_it_looks_for_or_with_its_time() -> None:
    timeline, found = Timeline(), list[str]()
    timeline.after(2.0, lambda: found.append("there"))
    assert timeline.until(lambda: found or None, 1.0) is None
    assert timeline.now == 1.0
    assert timeline.until(lambda: found or None) == ["there"]
    assert timeline.now == 2.0
    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        timeline.until(lambda: None)


def test_virtual_events_run_checks_at_intervals_and_raise_errors_where_the_driver_waits() -> None:
    timeline, checks = Timeline(), list[float]()
    events = VirtualEvents(timeline)
    events.start(lambda: checks.append(timeline()), 0.25)
    assert events.until(lambda: None, 0.6) is None
    assert checks == [0.0, 0.25, 0.5]

    def fail() -> None:
        raise ValueError("of the event")

    events.put(fail)
    with pytest.raises(ValueError, match="of the event"):
        events.until(lambda: None)
    events.stop()
    assert timeline.until(lambda: None, 5.0) is None
    assert checks == [0.0, 0.25, 0.5]


# ── network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def arrivals(start: Callable[[Network, Callable[[str], Callable[[], None]]], None]) -> dict[str, float]:
    """When what is sent over links of 100 bytes per second arrives."""
    timeline, found = Timeline(), dict[str, float]()

    def noted(name: str) -> Callable[[], None]:
        return lambda: found.__setitem__(name, timeline.now)

    start(Network(timeline, 100.0, 0.0), noted)
    timeline.advance(1000.0)
    return found


def test_transfers_share_a_link() -> None:
    """Two leave one machine; when the shorter has arrived, the longer has the link for itself."""

    def start(network: Network, noted: Callable[[str], Callable[[], None]]) -> None:
        network.send(0, 1, 100, noted("short"))
        network.send(0, 2, 200, noted("long"))
        network.send(3, 4, 100, noted("apart"))

    assert arrivals(start) == pytest.approx({"short": 2.0, "long": 3.0, "apart": 1.0})


def broadcast(rule: PullRule, machines: int) -> tuple[SharedObject, float]:
    """An object of one second on every link, pulled by all machines at once."""
    timeline, arrived = Timeline(), list[float]()
    shared = SharedObject(Network(timeline, 100.0, 0.0), 0, 100, rule, Random(0))
    for machine in range(1, machines + 1):
        shared.pull(machine, lambda: arrived.append(timeline.now))
    shared.appear()
    timeline.until(lambda: len(arrived) == machines or None)
    return shared, timeline.now


def test_if_all_ask_at_once_the_first_holder_sends_to_all() -> None:
    shared, seconds = broadcast(PullRule.ANY_HOLDER, 31)
    assert shared.sent == {0: 31}
    assert seconds == pytest.approx(31.0)


def test_in_a_tree_every_round_doubles_the_holders() -> None:
    shared, seconds = broadcast(PullRule.TREE, 31)
    assert shared.sent[0] == 5
    assert seconds == pytest.approx(5.0)


def test_who_pulls_from_a_lost_machine_asks_another() -> None:
    timeline, arrived = Timeline(), list[int]()
    network = Network(timeline, 100.0, 0.0)
    shared = SharedObject(network, 0, 100, PullRule.TREE, Random(0))
    shared.appear()
    for machine in (1, 2, 3):
        shared.pull(machine, lambda machine=machine: arrived.append(machine))  # type: ignore[misc]
    timeline.advance(1.5)  # 1 has it; 0 and 1 are sending to 2 and 3
    network.cut_off(1)
    shared.lose(1)
    timeline.advance(10.0)
    assert sorted(arrived) == [1, 2, 3]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_synchronous_iteration_takes_the_seconds_of_its_parts() -> None:
    """One worker, two groups: publication, pull, two samplings in turn, scores, one attestation that is waited for."""
    scenario = replace(SMALL, workers=1, max_staleness=0)
    figures = simulate(scenario)
    pull_s = scenario.adapter_bytes / scenario.bytes_per_s
    attested_s = scenario.group_bytes / scenario.bytes_per_s + scenario.check_s
    seconds = scenario.publish_s + pull_s + scenario.apply_s + 2 * scenario.sample_s + scenario.score_s
    seconds += attested_s + scenario.update_s
    assert figures.groups_per_s == pytest.approx(2 / seconds, rel=0.005)
    assert (figures.worst_age, figures.wasted, figures.payloads) == (0, 0.0, 1)


def test_the_same_scenario_gives_the_same_figures() -> None:
    scenario = replace(SMALL, jitter=0.1)
    first, second = (replace(simulate(scenario), driver_cores=0.0) for _ in range(2))
    assert first == second
    assert replace(simulate(replace(scenario, seed=1)), driver_cores=0.0) != first


@pytest.mark.parametrize("staleness", [0, 2, 4])
def test_groups_are_as_old_as_the_run_allows(staleness: int) -> None:
    assert simulate(replace(SMALL, max_staleness=staleness, warm=5)).worst_age == staleness


def test_every_group_ends_once_whatever_dies(ledger_lines: list[str]) -> None:
    """Workers are killed, freeze, and go with their machines; others get their calls."""
    scenario = replace(
        SMALL, workers=16, workers_per_machine=4, groups_per_worker=4, measured=8, lost_calls=0.02, lost_machines=0.3
    )
    said: list[str] = []
    figures = simulate(scenario, said.append)
    assert figures.ends == scenario.iterations * scenario.groups == len(set(ledger_lines))
    assert figures.faults > 10
    assert {reason for reason in ("killed", "has not answered", "its machine is gone") if reason in "".join(said)} == {
        "killed",
        "has not answered",
        "its machine is gone",
    }
    assert 0.0 < figures.wasted < 0.1
    assert figures.recovery_s >= scenario.machine_noticed_s


def test_a_slow_workers_call_goes_to_another_as_well() -> None:
    def rate(slow: float) -> Figures:
        return simulate(replace(SMALL, workers=10, measured=6, slow_workers=slow))

    usual, slowed = rate(0.0), rate(0.1)
    assert slowed.wasted > usual.wasted == 0.0
    assert 0.3 * usual.groups_per_s < slowed.groups_per_s < usual.groups_per_s

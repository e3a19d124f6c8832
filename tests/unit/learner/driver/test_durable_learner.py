"""A learner that is lost is started again, catches up, and repeats the lost call; nothing is trained twice.

Real processes: `tests/integration/test_service_faults.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client import CollectorRegistry
from ray.exceptions import RayActorError

from common.config.run import Config
from common.errors import AttestationError, LearnerError, ModelError, RankError
from learner.driver.durable_learner import MOST_REPEATED, WINDOW_S, DurableLearner
from learner.records.prometheus import RunMetrics
from tests.helpers.hand_clock import HandClock
from tests.helpers.remote_errors import raised_remotely
from tests.helpers.trained_run import tiny_config

KILLED = RayActorError(error_msg="The actor died.\nThe process was killed.")


class Reference:
    """The result of a call, or its error."""

    def __init__(self, answer: Any, *, arrives: bool = True) -> None:
        self.answer, self._arrives = answer, arrives

    def future(self) -> Future[Any]:
        found: Future[Any] = Future()
        if isinstance(self.answer, Exception):
            found.set_exception(self.answer)
        elif self._arrives:
            found.set_result(self.answer)
        return found


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, **_: object) -> Method:
        return self


class Processes:
    """The group of a learner whose state is the list of what it has done. Faults come at the numbered calls."""

    def __init__(self, config: Config, clock: HandClock) -> None:
        self.config, self._clock = config, clock
        self.faults: dict[int, Exception] = {}
        self.no_snapshot: Exception | None = None
        self.fingerprints = ["base"]
        self.update_s, self.snapshot_s, self.arrives = 1.0, 0.0, True
        self.calls, self.starts, self.stops, self.snapshots = 0, 0, 0, 0
        self.ranks: list[Any] = []
        self.places: list[Any] = []
        self.start()

    @property
    def leader(self) -> Processes:
        return self

    def start(self) -> None:
        self.starts += 1
        self.state: list[str] = []

    def stop(self) -> None:
        self.stops += 1

    def wait_until_loaded(self, watch: Callable[[], None] = lambda: None) -> str:
        return self.fingerprints[min(self.starts, len(self.fingerprints)) - 1]

    def _called(self, what: str, answer: Any) -> Reference:
        self.calls += 1
        fault = self.faults.get(self.calls)
        if fault is not None:
            return Reference(fault)
        self.state.append(what)
        return Reference(answer)

    @property
    def cold_start(self) -> Method:
        def update(iteration: int) -> Reference:
            self._clock.now += self.update_s
            return self._called(f"update {iteration}", f"result {iteration}")

        return Method(update)

    @property
    def publish(self) -> Method:
        def publish(number: int, *, averaged: bool) -> list[Reference]:
            return [self._called(f"publish {number}", "version"), Reference(f"weights {number}")]

        return Method(publish)

    @property
    def peak_gib(self) -> Method:
        return Method(lambda: Reference(1.5))

    @property
    def snapshot(self) -> Method:
        def snapshot() -> Reference:
            self.snapshots += 1
            self._clock.now += self.snapshot_s
            return Reference(self.no_snapshot or list(self.state), arrives=self.arrives)

        return Method(snapshot)

    @property
    def load_snapshot(self) -> Method:
        def load(kept: list[Reference]) -> Reference:
            self.state = list(kept[0].answer)
            return Reference(None)

        return Method(load)


class Health:
    """Finds each of these faults once."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def follow(self, *_: object) -> None:
        """There is nobody to ping."""

    def begin(self) -> None:
        """No clock starts."""

    def finished(self) -> None:
        """Nothing is proven."""

    def fault(self) -> str:
        return self.faults.pop()


class Setting:
    def __init__(self, config: Config, restarts: int) -> None:
        self.clock, self.said, self.health = HandClock(), list[str](), Health()
        learner = config.learner.model_copy(update={"restarts": restarts})
        self.processes = Processes(config.model_copy(update={"learner": learner}), self.clock)
        self.metrics = RunMetrics(CollectorRegistry(), "test")
        given: Any = self.processes
        health: Any = self.health
        self.learner = DurableLearner(given, health, self.said.append, self.metrics, self.clock)
        self.learner.load()

    @property
    def restarts(self) -> float | None:
        return self.metrics.registry.get_sample_value("rtdmd_learner_restarts_total", {"run": "test"})


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setting]:
    """A durable learner with `restarts`, whose references are `Reference`s."""
    made: list[Setting] = []

    def get(reference: Reference) -> Any:
        if isinstance(reference.answer, Exception):
            raise reference.answer
        return reference.answer

    def wait(references: list[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
        late = bool(made[-1].health.faults)
        return ([], references) if late else (references, [])

    def make(restarts: int = 3) -> Setting:
        made.append(Setting(tiny_config(tmp_path, tmp_path), restarts))
        return made[-1]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "put", Reference)
    return make


DONE = ["update 0", "update 1", "update 2"]


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("error", [KILLED, raised_remotely(KILLED), raised_remotely(RankError("a rank is gone"))])
def test_the_lost_call_is_repeated_on_the_state_before_it(
    error: Exception, arrives: bool, setting: Callable[..., Setting]
) -> None:
    """From the newest snapshot, or, if none has arrived, from all calls before."""
    given = setting()
    processes = given.processes
    processes.arrives, processes.faults = arrives, {3: error}
    assert [given.learner.cold_start(iteration) for iteration in range(3)] == ["result 0", "result 1", "result 2"]
    assert processes.state == DONE
    assert (processes.starts, processes.stops, given.restarts) == (2, 1, 1)
    assert processes.calls == (3 + 1 if arrives else 3 + 3)
    assert given.said[0].startswith("the learner is gone: ")
    assert "started again (1 of at most 3 times within 10 minutes)" in given.said[0]
    repeated, seconds = (0, 0) if arrives else (2, 2)
    expected = f"the learner is back after {seconds} s; calls repeated since its newest snapshot: {repeated}"
    assert given.said[1] == expected


def test_publications_are_repeated_with_the_updates_they_show(setting: Callable[..., Setting]) -> None:
    given = setting()
    given.processes.arrives, given.processes.faults = False, {4: KILLED}
    given.learner.cold_start(0)
    assert given.learner.publish(1, averaged=False).answer == "weights 1"  # type: ignore[attr-defined]
    given.learner.publish(-1, averaged=True)
    given.learner.cold_start(1)
    assert given.processes.state == ["update 0", "publish 1", "update 1"]


def test_a_rank_that_hangs_is_a_loss(setting: Callable[..., Setting]) -> None:
    given = setting()
    given.learner.cold_start(0)
    given.health.faults = ["rank 1 (host:7): it has not answered for 5 s, and uses no processor"]
    assert given.learner.cold_start(1) == "result 1"
    assert given.processes.state == ["update 0", "update 1"]
    assert given.said[0].startswith("the learner is gone: the learner hangs: rank 1 (host:7): it has not answered")


def test_one_loss_too_many_ends_the_run_by_name(setting: Callable[..., Setting]) -> None:
    """A loss while it catches up counts as well."""
    given = setting(restarts=2)
    given.processes.faults = dict.fromkeys(range(1, 10), KILLED)
    with pytest.raises(LearnerError) as caught:
        given.learner.cold_start(0)
    assert str(caught.value) == (
        "the learner died: The process was killed.; it was lost 3 times within 10 minutes (learner.restarts = 2): look "
        "for the reason in logs/, and continue with --resume"
    )
    assert (given.processes.starts, given.processes.stops) == (3, 3)


def test_losses_of_long_ago_do_not_count(setting: Callable[..., Setting]) -> None:
    given = setting(restarts=1)
    for iteration in range(4):
        given.processes.faults[given.processes.calls + 1] = KILLED
        given.learner.cold_start(iteration)
        given.clock.now += WINDOW_S
    assert given.processes.state == [*DONE, "update 3"]
    assert given.restarts == 4


def test_without_restarts_a_loss_ends_the_run_and_no_snapshot_is_taken(setting: Callable[..., Setting]) -> None:
    given = setting(restarts=0)
    given.learner.cold_start(0)
    given.processes.faults = {2: KILLED}
    with pytest.raises(LearnerError, match=r"it was lost once \(learner\.restarts = 0\).*--resume"):
        given.learner.cold_start(1)
    assert (given.processes.starts, given.processes.snapshots) == (1, 0)


def test_what_the_learner_raises_is_no_loss(setting: Callable[..., Setting]) -> None:
    given = setting()
    given.processes.faults = {1: raised_remotely(AttestationError("other weights"))}
    with pytest.raises(AttestationError, match="other weights"):
        given.learner.cold_start(0)
    assert given.processes.starts == 1


def test_another_model_ends_the_run(setting: Callable[..., Setting]) -> None:
    given = setting()
    given.processes.fingerprints, given.processes.faults = ["base", "other"], {1: KILLED}
    with pytest.raises(ModelError, match=r"found another model at backbone\.path than before"):
        given.learner.cold_start(0)


@pytest.mark.parametrize(("snapshot_s", "expected"), [(0.02, 16), (0.08, 6), (10.0, 2)])
def test_snapshots_take_a_small_part_of_the_time(
    snapshot_s: float, expected: int, setting: Callable[..., Setting]
) -> None:
    """Of 16 updates of a second each; at the latest one is taken after so many updates."""
    given = setting()
    given.processes.snapshot_s = snapshot_s
    for iteration in range(2 * MOST_REPEATED):
        given.learner.cold_start(iteration)
    assert given.processes.snapshots == expected
    taken = given.metrics.registry.get_sample_value("rtdmd_learner_snapshot_seconds", {"run": "test"})
    assert taken == pytest.approx(snapshot_s)


def test_a_snapshot_that_cannot_be_taken_is_said_and_the_run_goes_on(setting: Callable[..., Setting]) -> None:
    given = setting()
    given.processes.no_snapshot = raised_remotely(MemoryError("the object store is full"))
    given.learner.cold_start(0)
    given.learner.cold_start(1)
    expected = "there is no newer snapshot of the learner: MemoryError: the object store is full; the run goes on"
    assert given.said == [expected]
    given.processes.no_snapshot = None
    given.processes.faults = {3: KILLED}
    given.learner.cold_start(2)
    assert given.processes.state == DONE


def test_a_question_is_asked_again_and_not_kept(setting: Callable[..., Setting]) -> None:
    given = setting()
    assert given.learner.peak_gib() == 1.5
    given.processes.faults = {1: KILLED}
    given.learner.cold_start(0)
    assert given.processes.state == ["update 0"]

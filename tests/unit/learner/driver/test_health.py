"""When a process must be ended, by a clock of the test's own."""

from __future__ import annotations

from common.heartbeat import Heartbeat, StepAtWork
from common.types import ProcessPlace
from learner.driver.health import ENDLESS, STALLED, Pulse

PLACE = ProcessPlace("node", "host", 7)
AFTER_S = 5.0


def heartbeat(*steps: StepAtWork) -> Heartbeat:
    return Heartbeat(PLACE, steps)


def pulse(*, proven: bool = True) -> Pulse:
    found = Pulse(AFTER_S, last_answer=0.0, proven=proven)
    found.answered(heartbeat(StepAtWork(1, "rollout", 60.0)), 0.0)
    return found


def watched(found: Pulse, until: float, cpu_per_s: float, *, step: str | None = None) -> list[float]:
    """Times at which it would be ended, looked at every quarter of a second, as the pool does."""
    ended, now = [], 0.0
    while now < until:
        now += 0.25
        if step is not None:
            found.answered(heartbeat(StepAtWork(1, step, 60.0)), now)
        if found.is_doubtful(now):
            found.used_cpu(cpu_per_s * now, now)
        if found.fault(now):
            ended.append(now)
    return ended


def test_a_frozen_process_is_ended_after_the_limit() -> None:
    ended = watched(pulse(), 10.0, cpu_per_s=0.0)
    assert 5.0 <= ended[0] <= 5.5
    found = pulse()
    watched(found, 6.0, cpu_per_s=0.0)
    assert found.fault(6.0) == "it has not answered for 6 s, and uses no processor in its step rollout"


def test_a_busy_process_that_cannot_answer_is_left_alone() -> None:
    assert watched(pulse(), 100.0, cpu_per_s=0.3) == []


def test_only_looks_prove_that_a_process_stands_still() -> None:
    """The driver had no turn for 5 s: its one look of before says nothing about the time since."""
    found = pulse()
    found.used_cpu(1.0, 3.0)
    assert found.fault(8.0) == ""
    found.used_cpu(1.0, 8.0)
    assert found.fault(8.0) != ""
    found.used_cpu(2.0, 8.1)
    assert found.fault(8.1) == ""


def test_before_its_first_call_is_finished_silence_is_no_sign() -> None:
    assert watched(pulse(proven=False), 59.0, cpu_per_s=0.0) == []


def test_a_process_that_answers_and_gets_no_further_is_ended_at_the_limit_of_its_step() -> None:
    found = pulse()
    ended = watched(found, 70.0, cpu_per_s=0.0, step="score")
    assert 60.0 < ended[0] <= 63.0
    assert found.fault(70.0) == "it gets no further in its step score for 70 s"


def test_one_that_works_longer_than_its_limit_has_much_longer() -> None:
    ended = watched(pulse(), 700.0, cpu_per_s=1.0, step="rollout")
    assert 60.0 * ENDLESS < ended[0] <= 60.0 * ENDLESS + 0.5


def test_a_process_between_calls_is_never_late() -> None:
    found = pulse()
    for second in range(100):
        found.answered(heartbeat(), float(second))
        found.used_cpu(0.0, float(second))
        assert found.fault(float(second)) == ""


def test_an_answer_ends_the_doubt_and_rest_is_no_silence() -> None:
    found = pulse()
    watched(found, 4.75, cpu_per_s=0.0)
    found.answered(heartbeat(StepAtWork(2, "decode", 60.0)), 4.9)
    assert not found.is_doubtful(5.0)
    assert found.fault(5.5) == ""
    found.rested(100.0)
    assert not found.is_doubtful(101.0)
    assert found.fault(101.0) == ""


def two_calls(until: float, *, stuck: StepAtWork, other_step_s: float) -> tuple[float, str]:
    """One call stays in a step, the other begins another every `other_step_s`; when and why the process is ended."""
    found, now = Pulse(AFTER_S, last_answer=0.0, proven=True), 0.0
    while now < until:
        now += 0.25
        other = StepAtWork(100 + int(now / other_step_s), "rollout", 60.0)
        found.answered(heartbeat(stuck, other), now)
        if found.is_doubtful(now):
            found.used_cpu(now, now)
        if found.fault(now):
            return now, found.fault(now)
    return until, ""


def test_a_call_that_hangs_is_noticed_although_the_other_one_gets_on() -> None:
    ended, fault = two_calls(300.0, stuck=StepAtWork(1, "score", 90.0), other_step_s=4.0)
    assert 90.0 * STALLED < ended <= 90.0 * STALLED + 5.0
    assert fault.startswith("it gets no further in its step score for 18")


def test_a_slow_call_is_left_alone_while_the_other_one_waits_for_it() -> None:
    """The other one cannot begin a step: the slow one may have the model, and all of the processor."""
    found, now = Pulse(AFTER_S, last_answer=0.0, proven=True), 0.0
    steps = [StepAtWork(1, "rollout", 60.0), StepAtWork(2, "score", 600.0)]
    while now < 300.0:
        now += 0.25
        found.answered(heartbeat(*steps[: 1 + (now < 50)]), now)
        found.used_cpu(now, now)
        assert found.fault(now) == ""


def test_the_steps_of_both_calls_are_named_when_a_process_freezes() -> None:
    found = Pulse(AFTER_S, last_answer=0.0, proven=True)
    found.answered(heartbeat(StepAtWork(1, "score", 90.0), StepAtWork(2, "rollout", 60.0)), 0.0)
    watched(found, 6.0, cpu_per_s=0.0)
    assert found.fault(6.0) == "it has not answered for 6 s, and uses no processor in its step score and rollout"

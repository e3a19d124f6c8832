"""The breaker's states on a clock of the test's own; what may be tried again, and when."""

from __future__ import annotations

import pytest

from common.rewards.breaker import FAILURES_TO_OPEN, FIRST_OPEN_S, LONGEST_OPEN_S, BreakerState, CircuitBreaker
from common.rewards.retry_budget import (
    BACKOFF_LIMIT_S,
    LARGEST_RESERVE,
    RETRY_RESERVE,
    RETRY_SHARE,
    RetryBudget,
    Timing,
)
from tests.helpers.hand_clock import HandClock


def opened(clock: HandClock) -> CircuitBreaker:
    breaker = CircuitBreaker(clock, draw=lambda: 1.0)
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.begin()
        breaker.failed()
    return breaker


def test_only_failures_in_a_row_open_it() -> None:
    breaker = CircuitBreaker(HandClock(100.0))
    for outcome in [breaker.failed] * (FAILURES_TO_OPEN - 1) + [breaker.succeeded] + [breaker.failed] * 2:
        assert breaker.begin()
        outcome()
    assert breaker.state is BreakerState.CLOSED
    breaker.failed()
    assert breaker.state is BreakerState.OPEN
    assert not breaker.begin()


def test_a_certain_failure_opens_it_at_once() -> None:
    breaker = CircuitBreaker(HandClock(100.0))
    breaker.failed(certain=True)
    assert breaker.state is BreakerState.OPEN


def test_after_a_while_one_check_then_one_question_and_its_success_closes() -> None:
    clock = HandClock(100.0)
    breaker = opened(clock)
    assert breaker.seconds_to_probe == FIRST_OPEN_S
    assert not breaker.begin_check()
    clock.now += FIRST_OPEN_S
    assert not breaker.begin()
    assert breaker.begin_check()
    assert not breaker.begin_check()
    assert breaker.seconds_to_probe == FIRST_OPEN_S
    breaker.checked(True)
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.begin()
    assert not breaker.begin()
    breaker.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.seconds_to_probe == 0


@pytest.mark.parametrize("answers_checks", [True, False])
def test_every_failed_check_or_trial_doubles_the_wait_up_to_a_limit(answers_checks: bool) -> None:
    clock, waits = HandClock(100.0), []
    breaker = opened(clock)
    for _ in range(5):
        waits.append(breaker.seconds_to_probe)
        clock.now += waits[-1]
        assert breaker.begin_check()
        breaker.checked(answers_checks)
        if answers_checks:
            assert breaker.begin()
            breaker.failed()
    assert waits == [1, 2, 4, LONGEST_OPEN_S, LONGEST_OPEN_S]
    breaker.succeeded()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed()
    assert breaker.seconds_to_probe == FIRST_OPEN_S


def test_a_check_that_comes_back_late_changes_nothing() -> None:
    clock = HandClock(100.0)
    breaker = opened(clock)
    clock.now += FIRST_OPEN_S
    assert breaker.begin_check()
    breaker.succeeded()
    breaker.checked(False)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.begin()


def test_failures_that_arrive_late_do_not_postpone_the_probe() -> None:
    clock = HandClock(100.0)
    breaker = opened(clock)
    clock.now += FIRST_OPEN_S / 2
    breaker.failed()
    assert breaker.seconds_to_probe == FIRST_OPEN_S / 2


def test_the_probes_of_many_clients_are_spread() -> None:
    clock = HandClock(100.0)
    soonest = CircuitBreaker(clock, draw=lambda: 0.0)
    for _ in range(FAILURES_TO_OPEN):
        soonest.failed()
    assert soonest.seconds_to_probe == FIRST_OPEN_S / 2


def test_repetitions_are_a_tenth_of_the_questions() -> None:
    budget = RetryBudget()
    spent = sum(budget.spend() for _ in range(10))
    assert spent == RETRY_RESERVE
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert spent == RETRY_RESERVE + RETRY_SHARE * 1000


def test_a_quiet_hour_saves_up_only_so_much() -> None:
    budget = RetryBudget()
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1000)) == LARGEST_RESERVE


def test_back_off_is_full_jitter_below_a_cap_that_doubles() -> None:
    assert [Timing(draw=lambda: 0.5).backoff_s(number) for number in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert Timing(draw=lambda: 0.0).backoff_s(3) == 0
    assert Timing(draw=lambda: 1.0).backoff_s(10_000) == BACKOFF_LIMIT_S

"""A process's warnings are single lines that the driver recognises, and repeats are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from common import process_log
from common.process_log import PACKAGES, Repeats, report_to_driver, reported
from tests.helpers.hand_clock import HandClock


@pytest.fixture
def reporting() -> Iterator[None]:
    before = {name: list(logging.getLogger(name).handlers) for name in PACKAGES}
    report_to_driver()
    report_to_driver()  # a process that calls it twice reports once
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers = handlers


@pytest.mark.usefixtures("reporting")
def test_a_warning_is_one_line_and_a_traceback_follows(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("common.rewards.guard")
    logger.info("not shown")
    logger.warning("reward %s is out\n(timeout)", "hps")
    try:
        raise ValueError("odd")
    except ValueError:
        logger.exception("cannot look")
    first, second, *traceback = capsys.readouterr().err.splitlines()
    assert reported(first) == (logging.WARNING, "reward hps is out (timeout)")
    assert reported(second + "\n") == (logging.ERROR, "cannot look")
    assert (traceback[0], traceback[-1]) == ("Traceback (most recent call last):", "ValueError: odd")
    assert [line for line in traceback if reported(line)] == []


@pytest.mark.parametrize("line", ["", "rtdmd", "rtdmd INFO: x", "a rtdmd WARNING: x", "rtdmd WARNING: "])
def test_other_lines_are_not_ours(line: str) -> None:
    assert reported(line) is None


def test_the_same_text_is_new_again_after_a_while() -> None:
    clock = HandClock()
    repeats = Repeats(clock)
    assert repeats.is_new("worker 1: reward hps is out: holding for up to 600 s")
    assert not repeats.is_new("worker 2: reward hps is out: holding for up to 12.5 s")
    assert repeats.is_new("worker 1: reward clip is out: holding for up to 600 s")
    clock.now += process_log.REPEAT_S
    assert repeats.is_new("worker 3: reward hps is out: holding for up to 600 s")


def test_the_memory_for_texts_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_log, "MOST_TEXTS", 3)
    repeats = Repeats()
    assert all(repeats.is_new(letter) for letter in "abcdefgh")
    assert len(repeats._shown) <= 3

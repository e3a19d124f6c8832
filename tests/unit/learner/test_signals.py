"""Signals of a terminal and of a scheduler interrupt a run; Python's own answer to some of them is to die unheard."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from learner import main

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_ends_the_command_with_a_line(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGUSR1 and SIGUSR2 are those of `sbatch --signal` and of submitit."""
    monkeypatch.setattr(main, "parse", lambda *_: os.kill(os.getpid(), number))
    assert main.main([]) == 130
    assert capsys.readouterr().err == "interrupted before the run began\n"


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_one_that_is_ignored_stays_so(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""
    signal.signal(number, signal.SIG_IGN)
    monkeypatch.setattr(main, "exit_status", lambda *_, **__: 0)
    assert main.main([]) == 0
    assert signal.getsignal(number) is signal.SIG_IGN

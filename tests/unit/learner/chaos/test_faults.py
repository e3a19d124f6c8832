"""Faults on real processes of a small family."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from learner.chaos import faults
from learner.chaos.faults import inject, processes
from learner.chaos.schedule import Fault, Injection, Target
from tests.helpers.waiting import wait_until

PARENT = """
import subprocess, sys
command = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen([*command, name]) for name in sys.argv[1:]]
for child in children:
    child.wait()
"""
WRITER = """
import sys, time
path = sys.argv[2]
while True:
    try:
        with open(path, "a") as file:
            file.write("x")
        failed = False
    except OSError:
        failed = True
    open(path + ".tried", "w").close()
    print(failed, flush=True)
    time.sleep(0.01)
"""


@pytest.fixture
def driver() -> Iterator[psutil.Process]:
    """A process with two workers and a learner, by their names."""
    names = ["ray::RolloutWorker", "ray::Learner", "ray::RolloutWorker"]
    process = subprocess.Popen([sys.executable, "-c", PARENT, *names])
    found = psutil.Process(process.pid)
    wait_until(lambda: len(found.children()) == 3, "the children to start")
    yield found
    below = found.children(recursive=True)
    process.kill()
    process.wait()
    for child in below:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def injection(target: Target, fault: Fault, pick: float = 0.0) -> Injection:
    return Injection(1, 0.0, target, fault, pick)


def test_processes_are_found_by_what_they_are(driver: psutil.Process) -> None:
    assert len(processes(Target.WORKER, driver)) == 2
    assert len(processes(Target.LEARNER, driver)) == 1
    assert processes(Target.REDIS, driver) == []
    assert processes(Target.DRIVER, driver) == [driver]
    assert not inject(injection(Target.REDIS, Fault.KILL), driver)


def test_the_picked_process_is_killed_and_the_others_live(driver: psutil.Process) -> None:
    first, second = processes(Target.WORKER, driver)
    assert inject(injection(Target.WORKER, Fault.KILL, pick=0.9), driver)
    wait_until(lambda: len(processes(Target.WORKER, driver)) == 1, "the worker to end")
    assert processes(Target.WORKER, driver) == [first]
    assert second not in processes(Target.WORKER, driver)


def test_a_frozen_process_stays_frozen_and_a_slow_one_goes_on(
    driver: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"SLOW_S": 0.2, "STOPPED_S": 0.05, "RUNNING_S": 0.01}.items():
        monkeypatch.setattr(faults, name, seconds)
    (learner,) = processes(Target.LEARNER, driver)
    assert inject(injection(Target.LEARNER, Fault.SLOW), driver)
    wait_until(lambda: learner.status() != psutil.STATUS_STOPPED, "the slow process to go on")
    assert inject(injection(Target.LEARNER, Fault.FREEZE), driver)
    wait_until(lambda: learner.status() == psutil.STATUS_STOPPED, "the process to freeze")
    assert learner.is_running()


def test_a_disk_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FULL_S", 1.0)
    command = [sys.executable, "-c", WRITER, "ray::Learner", str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "False\n"
        assert inject(injection(Target.DRIVER, Fault.FULL_DISK), psutil.Process(writer.pid))
        lines = iter(writer.stdout.readline, "")
        assert "True\n" in lines, "no write failed"
        assert "False\n" in lines, "writes still fail"
        writer.kill()

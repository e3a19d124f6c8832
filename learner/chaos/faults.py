"""Finds the processes of a run, and does to them what the schedule says."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Callable, Mapping

import psutil

from learner.chaos.schedule import Fault, Injection, Target

NAMES: Mapping[Target, str] = {
    Target.WORKER: "ray::RolloutWorker",
    Target.LEARNER: "ray::Learner",
    Target.REWARD_SERVER: "-m reward_servers --",
    Target.REDIS: "redis-server",
}
"""Part of a target's command line."""
SLOW_S, FULL_S = 8.0, 8.0
"""Seconds that a slow process is slow, and that a disk is full."""
STOPPED_S, RUNNING_S = 0.45, 0.05
"""A slow process runs a tenth of the time."""


def processes(target: Target, driver: psutil.Process) -> list[psutil.Process]:
    """The living processes of a target, the driver's descendants in the order of their start."""
    if target is Target.DRIVER:
        return [driver]
    found = []
    for process in driver.children(recursive=True):
        try:
            if NAMES[target] in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def inject(injection: Injection, driver: psutil.Process) -> bool:
    """Do it; whether there was a process to do it to. Faults that pass have passed when this returns."""
    found = processes(injection.target, driver)
    if not found:
        return False
    process = found[int(injection.pick * len(found))]
    try:
        ACTIONS[injection.fault](process)
    except psutil.NoSuchProcess:
        return False
    return True


def _slow(process: psutil.Process) -> None:
    until = time.monotonic() + SLOW_S
    while time.monotonic() < until:
        process.send_signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        process.send_signal(signal.SIGCONT)
        time.sleep(RUNNING_S)


def _fill_disk(process: psutil.Process) -> None:
    """No file of the process can grow: every write fails with EFBIG, as a quota's would."""
    _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
    try:
        time.sleep(FULL_S)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (hard, hard) if hard != -1 else (resource.RLIM_INFINITY,) * 2)


ACTIONS: Mapping[Fault, Callable[[psutil.Process], None]] = {
    Fault.KILL: lambda process: process.send_signal(signal.SIGKILL),
    Fault.FREEZE: lambda process: process.send_signal(signal.SIGSTOP),
    Fault.END: lambda process: process.send_signal(signal.SIGTERM),
    Fault.SLOW: _slow,
    Fault.FULL_DISK: _fill_disk,
}

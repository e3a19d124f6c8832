"""Signals while the cluster is started."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import pytest

from common.config.run import Config
from common.errors import ConfigError
from learner.driver import cluster
from learner.driver.cluster import _kept_sigterm, ray_cluster


def test_a_signal_that_ray_takes_for_itself_interrupts() -> None:
    """Ray answers it by sys.exit(15), which would end the process without a line."""

    def as_ray_does(number: int, _frame: FrameType | None) -> None:
        sys.exit(number)

    before = signal.getsignal(signal.SIGTERM)

    def start() -> None:
        with _kept_sigterm():
            signal.signal(signal.SIGTERM, as_ray_does)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_machine_too_busy_to_start_ray_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises the bare class then."""

    def start(_config: Config) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(cluster, "_start", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ConfigError, match=r"^no Ray cluster to run in: The current .*; the machine may be busy"),
        ray_cluster(Config.model_construct()),
    ):
        pass


def test_a_fault_of_our_own_is_not_taken_for_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_config: Config) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(cluster, "_start", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(KeyError, match="a fault"), ray_cluster(Config.model_construct()):
        pass

"""The metrics endpoint of a run: who is told its address, and what its last scrape says."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.config.rewards import RewardClientConfig
from common.config.run import Config
from common.errors import AttestationError, LearnerError, RunStopped
from common.redis_link import RedisAddress, RedisLink
from common.rewards.access import RewardAccess
from common.rewards.client import RewardEndpoint
from common.rewards.guard import Outage
from common.rewards.registry import ServerRegistry
from common.types import OutagePolicy
from learner.driver import listed_targets, monitoring
from learner.driver.embedded_redis import embedded_redis
from learner.driver.monitoring import RAY_TARGETS, metrics_endpoint, run_metrics, targets_path
from tests.helpers.remote_errors import raised_remotely
from tests.helpers.waiting import wait_until


def config(**metrics: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "mine"},
            "backbone": {"path": "model"},
            "prompts": {"train": "a.txt", "evaluation": "b.txt"},
            "rewards": [{"name": "hps", "url": "http://127.0.0.1:8101", "differentiable": True}],
            "metrics": metrics,
        }
    )


def access(redis: RedisAddress | None = None) -> RewardAccess:
    endpoints, outages = (RewardEndpoint("hps", "http://127.0.0.1:8101"),), {"hps": Outage(OutagePolicy.PAUSE, 1.0)}
    return RewardAccess(endpoints, outages, RewardClientConfig(), None, redis, 0)


ACCESS = access()


def test_the_file_is_there_while_the_run_is(tmp_path: Path) -> None:
    settings = config(targets=str(tmp_path / "targets"))
    metrics = run_metrics(settings, tmp_path)
    with metrics_endpoint(settings, tmp_path, metrics, ACCESS):
        entries = json.loads((tmp_path / "targets/rtdmd_mine.json").read_text())
        assert [entry["labels"]["job"] for entry in entries] == ["driver", "reward_server"]
        assert entries[1]["targets"] == ["127.0.0.1:8101"]
    assert list((tmp_path / "targets").iterdir()) == []


def test_a_registered_server_is_listed_while_it_renews_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed_targets, "RENEW_S", 0.05)
    settings, other = config(targets=str(tmp_path / "targets")), "http://127.0.0.1:8102"

    def listed() -> list[str]:
        entries = json.loads((tmp_path / "targets/rtdmd_mine.json").read_text())
        return [entry["targets"][0] for entry in entries if entry["labels"]["job"] == "reward_server"]

    with embedded_redis(tmp_path / "redis.log") as address, closing(RedisLink(address)) as link:
        metrics = run_metrics(settings, tmp_path)
        with metrics_endpoint(settings, tmp_path, metrics, access(address)):
            assert listed() == ["127.0.0.1:8101"]
            ServerRegistry(link).register("hps", other)
            wait_until(lambda: listed() == ["127.0.0.1:8101", "127.0.0.1:8102"], "the server to be listed")
            ServerRegistry(link).deregister("hps", other)
            wait_until(lambda: listed() == ["127.0.0.1:8101"], "the server to be removed")


def test_without_a_port_there_is_neither_endpoint_nor_file(tmp_path: Path) -> None:
    settings = config(port=None, targets=str(tmp_path / "targets"))
    with metrics_endpoint(settings, tmp_path, run_metrics(settings, tmp_path), ACCESS):
        assert not (tmp_path / "targets").exists()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (LearnerError("died"), "LearnerError"),
        (raised_remotely(AttestationError("other weights")), "AttestationError"),
        (ValueError("a bug"), "other"),
        (RunStopped("on request"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_the_error_that_ends_a_run_is_counted(error: BaseException, shown: str | None, tmp_path: Path) -> None:
    settings = config()
    metrics = run_metrics(settings, tmp_path)
    with pytest.raises(type(error)), metrics_endpoint(settings, tmp_path, metrics, ACCESS):
        raise error
    samples = [one for family in metrics.registry.collect() for one in family.samples]
    failed = [one.labels["error"] for one in samples if one.name == "rtdmd_failures_total" and one.value > 0]
    assert failed == ([] if shown is None else [shown])


def test_the_file_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(monitoring, "temporary_folder", lambda _: tmp_path / "ray")
    ours = tmp_path / "run/logs/prometheus_targets.json"
    assert targets_path(config(), tmp_path / "run") == ours
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert targets_path(config(), tmp_path / "run") == ours
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / RAY_TARGETS).touch()
    assert targets_path(config(), tmp_path / "run") == tmp_path / "ray/rtdmd_mine.json"
    with monkeypatch.context() as patched:
        patched.setattr(monitoring.os, "access", lambda *_: False)
        assert targets_path(config(), tmp_path / "run") == ours
    assert targets_path(config(targets=str(tmp_path)), tmp_path / "run") == tmp_path / "rtdmd_mine.json"

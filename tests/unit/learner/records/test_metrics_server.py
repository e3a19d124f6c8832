"""The /metrics endpoint and the file that tells Prometheus where it is."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from threading import Thread

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge

from common.errors import ConfigError
from learner.records.metrics_server import WATCHED_S, MetricsServer, Targets
from tests.helpers.hand_clock import HandClock


def read(server: MetricsServer) -> str:
    return httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=5).text


def test_a_value_can_be_read_and_the_port_is_freed() -> None:
    registry = CollectorRegistry()
    Gauge("height", "Height.", registry=registry).set(2)
    with MetricsServer(0, registry) as server:
        assert "height 2.0" in read(server)
    with MetricsServer(server.port, registry):
        pass


def test_a_taken_port_is_named() -> None:
    with (
        MetricsServer(0, CollectorRegistry()) as server,
        pytest.raises(ConfigError, match=rf"metrics\.port = {server.port}: cannot listen on 127\.0\.0\.1"),
    ):
        MetricsServer(server.port, CollectorRegistry())


def test_nobody_is_waited_for_unless_somebody_reads() -> None:
    clock = HandClock()
    with MetricsServer(0, CollectorRegistry(), clock=clock) as server:
        assert not server.wait_for_scrape(60)
        read(server)
        clock.now = WATCHED_S + 1
        assert not server.wait_for_scrape(60)


def test_the_last_values_are_read_before_the_end() -> None:
    with MetricsServer(0, CollectorRegistry(), clock=HandClock()) as server:
        read(server)
        seen: list[bool] = []
        waiting = Thread(target=lambda: seen.append(server.wait_for_scrape(60)))
        waiting.start()
        while waiting.is_alive():
            read(server)
        assert seen == [True]
        assert not server.wait_for_scrape(0.0)  # nobody reads now, and the wait has an end


def test_the_file_lists_every_endpoint_once(tmp_path: Path) -> None:
    targets = Targets(tmp_path / "new" / "a.json", "my-run")
    rewards = {
        "hps": ["http://127.0.0.1:8101/hps", "https://scores.example/hps"],
        "ocr": ["http://127.0.0.1:8101/ocr", "http://[::1]:9000"],
    }
    targets.write("127.0.0.1:9464", rewards)
    entries = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [(*entry["targets"], entry["labels"].get("reward")) for entry in entries] == [
        ("127.0.0.1:9464", None),
        ("127.0.0.1:8101", "hps,ocr"),
        ("scores.example:443", "hps"),
        ("[::1]:9000", "ocr"),
    ]
    assert entries[0]["labels"] == {"run": "my-run", "job": "driver", "instance": "my-run"}
    assert {entry["labels"]["run"] for entry in entries} == {"my-run"}
    assert entries[2]["labels"]["__scheme__"] == "https"
    targets.remove()
    targets.remove()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    targets = Targets(tmp_path / "file" / "a.json", "a")
    with pytest.raises(ConfigError, match=r"metrics\.targets: .*a\.json cannot be written .*: name another folder"):
        targets.write("127.0.0.1:9464", {})


def test_a_client_that_sends_nothing_delays_no_other() -> None:
    registry = CollectorRegistry()
    Gauge("height", "Height.", registry=registry).set(2)
    with MetricsServer(0, registry) as server, socket.create_connection(("127.0.0.1", server.port)) as silent:
        assert "height 2.0" in read(server)
        silent.close()

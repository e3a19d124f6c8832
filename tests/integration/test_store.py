"""Registered servers, known scores and run control in a real Redis, which is lost and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from common.config import RewardClientConfig
from common.embedded_redis import embedded_redis
from common.errors import ConfigError, StoreError
from common.outage import Outage
from common.reward_access import RewardAccess
from common.reward_api import ServerInfo
from common.store import (
    LARGEST_ENTRY,
    RETRY_AFTER_S,
    RedisAddress,
    RedisLink,
    RunControl,
    ScoreCache,
    ServerRegistry,
    request_digest,
    score_key,
)
from learner.local_servers import PROJECT_ROOT

DEADLINE = 60.0
INFO = ServerInfo("hps", "1", "abc", True, 0.0, 1.0, "1")
IMAGES = np.full((2, 8, 8, 3), 51, np.uint8)

PARENT = """
import sys, time
from pathlib import Path
from common.embedded_redis import embedded_redis
with embedded_redis(Path(sys.argv[1])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def answers(url: str) -> bool:
    with redis.Redis.from_url(url, socket_timeout=1.0) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / "redis.log") as started:
        yield started
    assert not answers(started)


@pytest.fixture
def client(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def link(url: str, client: redis.Redis) -> Iterator[RedisLink]:
    opened = RedisLink(RedisAddress(url))
    yield opened
    opened.close()


def test_servers_are_listed_by_reward_while_their_lease_lives(link: RedisLink, client: redis.Redis) -> None:
    registry = ServerRegistry(link)
    for reward, server in (("hps", "http://b"), ("hps", "http://a"), ("other", "http://c")):
        registry.register(reward, server)
    assert registry.urls("hps") == ("http://a", "http://b")
    assert 0 < client.pttl("rtdmd:lease:hps:http://a") <= 15_000
    registry.deregister("hps", "http://b")
    client.pexpire("rtdmd:lease:hps:http://a", 1)
    wait_until(lambda: registry.urls("hps") == ())
    assert client.smembers("rtdmd:servers:hps") == set()
    assert registry.urls("other") == ("http://c",)


def test_known_scores_are_bounded_and_the_least_used_go_first(link: RedisLink, client: redis.Redis) -> None:
    cache = ScoreCache(link, max_entries=3)
    scores = {key: np.array([index, 0.1], np.float32) for index, key in enumerate("abcd")}
    for key in "abc":
        cache.put(key, scores[key])
    np.testing.assert_array_equal(cache.get("a"), scores["a"])
    cache.put("d", scores["d"])
    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]
    assert len(client.keys("rtdmd:score:*")) == client.zcard("rtdmd:scores") == 3
    cache.put("large", np.zeros(LARGEST_ENTRY // 4 + 1, np.float32))
    assert cache.get("large") is None
    client.set("rtdmd:score:torn", b"abc")
    assert cache.get("torn") is None


def test_a_key_stands_for_the_request_and_all_that_its_scores_depend_on() -> None:
    keys = {score_key(request_digest(b"request"), INFO), score_key(request_digest(b"other"), INFO)}
    for change in ({"scorer": "x"}, {"weights_hash": "x"}, {"preprocess_version": "2"}, {"version": "2"}):
        keys.add(score_key(request_digest(b"request"), ServerInfo(**(vars(INFO) | change))))
    assert len(keys) == 6
    assert score_key(request_digest(b"request"), INFO) in keys


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
    url: str, frozen: Callable[[bool], None]
) -> None:
    now = [0.0]
    link = RedisLink(RedisAddress(url), clock=lambda: now[0])
    registry = ServerRegistry(link)
    registry.register("hps", "http://a")
    frozen(True)
    with pytest.raises(StoreError, match="cannot be used"):
        registry.urls("hps")
    with pytest.raises(StoreError, match="lost a moment ago"):
        registry.urls("hps")
    frozen(False)
    now[0] += RETRY_AFTER_S
    assert registry.urls("hps") == ("http://a",)
    link.close()


def test_credentials_come_from_the_environment_and_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "sesame")
    address = RedisAddress.from_environment("redis://host:1/0")
    assert address.password == "sesame"
    assert "sesame" not in repr(address)


def test_an_embedded_redis_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "redis.log")]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as parent:
        url = parent.stdout.readline().strip()
        assert answers(url)
        parent.kill()
    wait_until(lambda: not answers(url))
    assert [path.name for path in tmp_path.iterdir()] == ["redis.log"]


def test_without_a_server_binary_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"redis\.url = embedded, but there is no Redis to start"):
        embedded_redis(tmp_path / "log").__enter__()


# ── servers that register ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def launch(url: str) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a registered server of the reward `brightness`."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        scorer = "tests.toy_scorers:BrightnessScorer"
        command = [sys.executable, "-m", "reward_servers", "--scorer", scorer, "--port", "0", "--redis-url", url]
        started.append(subprocess.Popen(command, cwd=PROJECT_ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE)


def test_servers_are_found_join_leave_and_outlive_redis(
    url: str, client: redis.Redis, launch: Callable[[], subprocess.Popen[bytes]], frozen: Callable[[bool], None]
) -> None:
    registry = ServerRegistry(RedisLink(RedisAddress(url)))
    first = launch()
    wait_until(lambda: len(registry.urls("brightness")) == 1)
    (known,) = registry.urls("brightness")
    access = RewardAccess(
        (), {"brightness": Outage("pause", 30.0)}, RewardClientConfig(timeout_s=20.0), None, RedisAddress(url), 100
    )
    expected = np.full(2, 0.2, np.float32)
    with access.client() as rewards:
        np.testing.assert_array_equal(rewards.score(IMAGES, ["a", "b"])["brightness"], expected)
        assert client.zcard("rtdmd:scores") == 1
        launch()
        wait_until(lambda: len(rewards.states("brightness")) == 2)
        first.terminate()
        assert first.wait(DEADLINE) == 0
        wait_until(lambda: known not in registry.urls("brightness"))
        wait_until(lambda: len(rewards.states("brightness")) == 1)
        frozen(True)
        for prompts in (["a", "b"], ["a", "c"]):
            np.testing.assert_array_equal(rewards.score(IMAGES, prompts)["brightness"], expected)
        frozen(False)
        client.flushall()
        # Listed again by its own renewal.
        wait_until(lambda: len(registry.urls("brightness")) == 1)
        assert len(rewards.states("brightness")) == 1

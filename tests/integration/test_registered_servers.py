"""Servers that register in a real Redis: found, joined, left, and used on while Redis is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import pytest
import redis

from common.config.rewards import RewardClientConfig
from common.project_files import PROJECT_ROOT
from common.redis_link import RedisAddress, RedisLink
from common.rewards.access import RewardAccess
from common.rewards.guard import Outage
from common.rewards.registry import ServerRegistry
from common.types import OutagePolicy
from learner.driver.embedded_redis import embedded_redis

DEADLINE = 60.0
IMAGES = np.full((2, 8, 8, 3), 51, np.uint8)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisAddress]:
    with embedded_redis(tmp_path_factory.mktemp("redis") / "redis.log") as started:
        yield started


@pytest.fixture
def client(address: RedisAddress) -> Iterator[redis.Redis]:
    with address.connect() as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def frozen(client: redis.Redis) -> Iterator[Callable[[bool], None]]:
    """Freezes Redis, as a lost network would, and thaws it."""
    process_id = client.info("server")["process_id"]

    def freeze(on: bool) -> None:
        os.kill(process_id, signal.SIGSTOP if on else signal.SIGCONT)

    yield freeze
    freeze(False)


@pytest.fixture(params=[None, "0123456789abcdef"])
def token(request: pytest.FixtureRequest) -> str | None:
    return cast("str | None", request.param)


@pytest.fixture
def launch(address: RedisAddress, token: str | None) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a registered server of the reward `brightness`."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        scorer = "tests.helpers.toy_scorers:BrightnessScorer"
        options = ["--scorer", scorer, "--port", "0", "--redis-url", address.url]
        command = [sys.executable, "-m", "reward_servers", *options]
        environment = os.environ | {"REDIS_PASSWORD": str(address.password), "REWARD_SERVER_TOKEN": token or ""}
        started.append(subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait(DEADLINE)


def test_servers_are_found_join_leave_and_outlive_redis(
    address: RedisAddress,
    client: redis.Redis,
    token: str | None,
    launch: Callable[[], subprocess.Popen[bytes]],
    frozen: Callable[[bool], None],
) -> None:
    registry = ServerRegistry(RedisLink(address), token)
    first = launch()
    wait_until(lambda: len(registry.urls("brightness")) == 1)
    (known,) = registry.urls("brightness")
    access = RewardAccess(
        (), {"brightness": Outage(OutagePolicy.PAUSE, 30.0)}, RewardClientConfig(timeout_s=20.0), token, address, 100
    )
    expected = np.full(2, 0.2, np.float32)
    with access.client() as rewards:
        np.testing.assert_array_equal(rewards.score(IMAGES, ["a", "b"])["brightness"], expected)
        assert client.zcard("rtdmd:scores") == 2
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

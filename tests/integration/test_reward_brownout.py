"""One of three real reward servers is down, then ten times slower, then answers wrong shapes, then NaN.

Traffic goes on all the while, as rollout workers make it. Measured for each outage policy: how soon the breaker opens
and closes again, what traffic the failures add, and what those who asked were given.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from common.rewards.breaker import BreakerState
from common.rewards.client import RewardClient, RewardEndpoint
from common.rewards.guard import Outage, RewardGuard
from common.rewards.http import RewardHttp
from common.types import OutagePolicy
from tests.helpers.fickle_server import DEADLINE, FickleServer
from tests.helpers.waiting import wait_until

OPENS_WITHIN_S = 5.0
RECOVERS_WITHIN_S = 10.0
EXTRA_REQUESTS = 0.1
TIMEOUT_S = 0.7  # between the scorer's normal 0.1 s and its slow 1 s
REWARDS = ("steady", "calm", "fickle")
FAILING = "fickle"
GROUPS = 40  # groups scored by all rewards between two failures
BRIGHTNESS = 0.2


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FickleServer]]:
    folder = tmp_path_factory.mktemp("servers")
    started = {name: FickleServer(name, folder) for name in REWARDS}
    yield started
    for server in started.values():
        server.kill()


@dataclass
class Traffic:
    """Counts of the requests and of their outcomes."""

    questions: int = 0
    complete: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    held_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


@contextmanager
def traffic_through(guard: RewardGuard, threads: int = 2) -> Iterator[Traffic]:
    """Groups of two images scored by every reward, one after another, in some threads."""
    traffic, stop, lock = Traffic(), threading.Event(), threading.Lock()
    images = np.full((2, 16, 16, 3), round(255 * BRIGHTNESS), np.uint8)

    def ask() -> None:
        while not stop.is_set():
            answers = guard.score(images, ["a", "b"], [], REWARDS)
            with lock:
                traffic.questions += len(REWARDS)
                traffic.held_s += answers.held_s
                traffic.complete += len(answers.values) == len(REWARDS)
                if answers.failure is not None:
                    traffic.dropped[answers.failure.reward] += 1
                traffic.left_out.update(list(answers.left_out))
                for name, scores in answers.values.items():
                    if not np.array_equal(scores, np.full(2, BRIGHTNESS, np.float32)):
                        traffic.wrong.append(f"{name}: {scores}")
            # A worker samples between two groups; with a reward out it would otherwise only spin.
            stop.wait(0.02)

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in asking:
        thread.start()
    try:
        yield traffic
    finally:
        stop.set()
        for thread in asking:
            thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in asking)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that left the client, by reward; refused connections included."""
    counted: Counter[str] = Counter()
    post = RewardHttp.post

    def counting(self: RewardHttp, exchange: object, *rest: object) -> object:
        counted[exchange.name] += 1
        return post(self, exchange, *rest)

    monkeypatch.setattr(RewardHttp, "post", counting)
    return counted


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize(
    "policy",
    [
        OutagePolicy.PAUSE,
        pytest.param(OutagePolicy.DROP_GROUP, marks=pytest.mark.slow),
        pytest.param(OutagePolicy.RENORMALISE, marks=pytest.mark.slow),
    ],
)
def test_a_brownout(policy: OutagePolicy, seconds: float, servers: dict[str, FickleServer], sent: Counter[str]) -> None:
    endpoints = [RewardEndpoint(name, server.url) for name, server in servers.items()]
    with ExitStack() as stack:
        client = stack.enter_context(RewardClient(endpoints, TIMEOUT_S, attempts=3))
        for name in REWARDS:
            client.verify(name)
        policies = dict.fromkeys(REWARDS, OutagePolicy.PAUSE) | {FAILING: policy}
        outages = {name: Outage(chosen, limit_s=4 * DEADLINE) for name, chosen in policies.items()}
        traffic = stack.enter_context(traffic_through(RewardGuard(client, outages)))

        def opened() -> bool:
            return client.states(FAILING)[servers[FAILING].url] is not BreakerState.CLOSED

        wait_until(lambda: traffic.complete >= GROUPS, "all rewards answer")
        for failure in ("down", "slow", "shape", "nan"):
            before = (sum(traffic.dropped.values()), sum(traffic.left_out.values()), traffic.held_s)
            servers[FAILING].fail(failure)
            wait_until(opened, f"{failure}: the breaker opens", OPENS_WITHIN_S)
            failing_until = time.monotonic() + seconds
            wait_until(
                lambda until=failing_until: time.monotonic() >= until, "the failure has lasted long enough", 2 * seconds
            )
            servers[FAILING].recover()
            wait_until(lambda: not opened(), f"{failure}: the breaker closes", RECOVERS_WITHIN_S)
            healthy = traffic.complete + GROUPS
            wait_until(lambda healthy=healthy: traffic.complete >= healthy, "all rewards answer again")
            after = (sum(traffic.dropped.values()), sum(traffic.left_out.values()), traffic.held_s)
            felt = {OutagePolicy.DROP_GROUP: 0, OutagePolicy.RENORMALISE: 1, OutagePolicy.PAUSE: 2}[policy]
            assert after[felt] > before[felt], failure
    assert traffic.wrong == []
    assert set(traffic.dropped) <= ({FAILING} if policy is OutagePolicy.DROP_GROUP else set())
    assert set(traffic.left_out) <= ({FAILING} if policy is OutagePolicy.RENORMALISE else set())
    assert sum(sent.values()) <= traffic.questions * (1 + EXTRA_REQUESTS), (sent, traffic)

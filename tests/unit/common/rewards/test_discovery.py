"""Looking for registered servers: whatever is found or not found, the next look comes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from common.errors import StoreError
from common.rewards.client import RewardClient
from common.rewards.discovery import Discovery
from common.rewards.registry import ServerRegistry
from tests.helpers.fake_reward_server import FakeServer, client_at, fake_server


class Registry(ServerRegistry):
    """Says what it is told to say, or raises it."""

    signs = False

    def __init__(self, *answers: tuple[str, ...] | Exception) -> None:
        self.answers = list(answers)

    def urls(self, reward: str) -> tuple[str, ...]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


@pytest.fixture
def client() -> Iterator[RewardClient]:
    with client_at(discovered=["fake"]) as opened:
        yield opened


def test_servers_are_known_as_soon_as_it_is_entered(client: RewardClient, server: FakeServer) -> None:
    with Discovery(client, Registry((server.url,)), ["fake"]):
        assert list(client.states("fake")) == [server.url]


def test_whatever_goes_wrong_is_said_once_and_survived(
    client: RewardClient, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    wrong = [ValueError("garbage"), ValueError("garbage"), StoreError("away"), ValueError("other")]
    discovery = Discovery(client, Registry(*wrong, (server.url,)), ["fake"])
    for _ in range(len(wrong) + 1):
        discovery.look()
    assert list(client.states("fake")) == [server.url]
    assert [record.exc_info[1].args[0] for record in caplog.records] == ["garbage", "other"]


def test_rewards_and_servers_are_looked_at_all_at_once(server: FakeServer) -> None:
    """Each server answers only when all of them have been asked."""
    names, urls = ("fake", "other"), ("/one", "/two", "/three")
    everybody = threading.Barrier(len(names) * len(urls))

    original = type(server.info).to_json

    def meet(info: object) -> bytes:
        everybody.wait(timeout=30)
        return original(info)

    with pytest.MonkeyPatch.context() as patch, client_at(discovered=names) as client:
        patch.setattr(type(server.info), "to_json", meet)
        Discovery(client, Registry(tuple(server.url + path for path in urls)), names).look()
        assert [len(client.states(name)) for name in names] == [3, 3]

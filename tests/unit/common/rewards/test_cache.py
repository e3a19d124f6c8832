"""The score cache: its keys, and requests that it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from common.errors import StoreError
from common.rewards.api import ScoreResponse, ServerInfo
from common.rewards.cache import ScoreCache, score_keys
from tests.helpers.fake_reward_server import IMAGES, INFO, PROMPTS, SCORES, FakeServer, client_at, fake_server


class Cache(ScoreCache):
    """In memory; `broken` stands for a Redis that is away."""

    def __init__(self) -> None:
        self.entries: dict[str, np.float32] = {}
        self.broken = False

    def get(self, keys: Sequence[str]) -> np.ndarray | None:
        if self.broken:
            raise StoreError("away")
        found = [self.entries[key] for key in keys if key in self.entries]
        return np.array(found, np.float32) if keys and len(found) == len(keys) else None

    def put(self, keys: Sequence[str], scores_B: np.ndarray) -> None:
        if self.broken:
            raise StoreError("away")
        self.entries |= dict(zip(keys, scores_B, strict=True))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


def test_images_that_are_all_known_are_not_asked_again_in_whatever_company(server: FakeServer) -> None:
    cache = Cache()
    with client_at(server.url, cache=cache) as client:
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS[::-1])["fake"], SCORES[::-1])
        np.testing.assert_array_equal(client.score(IMAGES[:1], PROMPTS[1:])["fake"], SCORES[1:])
        assert (len(server.bodies), len(cache.entries)) == (1, 2)


def test_a_group_is_asked_whole_when_one_image_is_unknown(server: FakeServer) -> None:
    cache = Cache()
    with client_at(server.url, cache=cache) as client:
        client.score(IMAGES, PROMPTS)
        for entries, (images, prompts, metadata) in (
            (3, (IMAGES, ["a", "c"], None)),
            (4, (IMAGES, PROMPTS, [{"x": 1}, {}])),
            (6, (IMAGES + 1, PROMPTS, None)),
        ):
            asked = len(server.bodies)
            client.score(images, prompts, metadata)
            assert len(server.bodies) == asked + 1
            assert len(cache.entries) == entries


def test_without_redis_the_server_is_asked(server: FakeServer) -> None:
    cache = Cache()
    with client_at(server.url, cache=cache) as client:
        client.score(IMAGES, PROMPTS)
        cache.broken = True
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("damaged", [2.0, np.nan])
def test_a_damaged_entry_is_no_score(server: FakeServer, damaged: float) -> None:
    cache = Cache()
    with client_at(server.url, cache=cache) as client:
        client.score(IMAGES, PROMPTS)
        cache.entries = dict.fromkeys(cache.entries, np.float32(damaged))
        np.testing.assert_array_equal(client.score(IMAGES, PROMPTS)["fake"], SCORES)
    assert len(server.bodies) == 2


def test_weights_without_identity_are_never_remembered(server: FakeServer) -> None:
    """Two of them could not be told apart."""
    server.info = ServerInfo(**(vars(INFO) | {"weights_hash": ""}))
    server.replies = [(200, ScoreResponse("fake", "", SCORES).to_bytes())]
    cache = Cache()
    with client_at(server.url, cache=cache) as client:
        for _ in range(2):
            client.score(IMAGES, PROMPTS)
    assert len(server.bodies) == 2
    assert cache.entries == {}


def test_a_key_stands_for_the_image_and_all_that_its_score_depends_on() -> None:
    """`geneval` and `geneval_parts` share their weights, and more: what differs is the recipe."""
    keys = {*score_keys([b"image", b"other"], INFO)}
    for field, value in vars(INFO).items():
        change = {field: not value} if isinstance(value, bool) else {field: type(value)(7)}
        keys |= {*score_keys([b"image"], ServerInfo(**(vars(INFO) | change)))}
    assert len(keys) == 2 + len(vars(INFO))
    assert score_keys([b"image"], INFO)[0] in keys

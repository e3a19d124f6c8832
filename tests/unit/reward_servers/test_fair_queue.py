"""The order in which waiting requests are taken, and what is kept of runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from common.rewards.api import ScoreRequest
from reward_servers.fair_queue import ANONYMOUS, MOST_RUNS, FairQueue, Job


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def job(loop: asyncio.AbstractEventLoop, run: bytes, images: int = 1) -> Job:
    request = ScoreRequest(np.zeros((images, 2, 2, 3), np.uint8), ["a"] * images)
    return Job(request, loop.create_future(), arrived=0.0, found_busy=False, run=run)


def test_the_order_is_one_request_of_each_run_in_turns(loop: asyncio.AbstractEventLoop) -> None:
    queue = FairQueue()
    first, second, third, other = (job(loop, run) for run in (b"a", b"a", b"a", b"b"))
    for one in (first, second, third, other):
        queue.add(one)
    assert list(queue) == [first, other, second, third]
    queue.end_turn(b"a")
    assert list(queue) == [other, first, second, third]
    queue.remove(second)
    assert list(queue) == [other, first, third]
    assert (len(queue), queue.images, second in queue) == (3, 3, False)


def test_nothing_is_kept_of_a_run_whose_requests_are_gone(loop: asyncio.AbstractEventLoop) -> None:
    queue = FairQueue()
    taken, withdrawn = job(loop, b"a", 3), job(loop, b"b", 2)
    queue.add(taken)
    queue.add(withdrawn)
    queue.took(taken, 2)
    assert (taken.waiting, queue.images) == (1, 3)
    queue.took(taken, 1)
    queue.remove(withdrawn)
    queue.end_turn(b"a")
    assert (list(queue), queue.images) == ([], 0)
    assert (queue._runs, queue._images) == ({}, {})


def test_further_names_count_as_anonymous(loop: asyncio.AbstractEventLoop) -> None:
    queue = FairQueue()
    for number in range(MOST_RUNS + 5):
        queue.add(job(loop, str(number).encode()))
    known = job(loop, b"0")
    queue.add(known)
    assert len(queue._runs) == MOST_RUNS + 1
    assert len(queue._runs[ANONYMOUS]) == 5
    assert known.run == b"0"


@pytest.mark.parametrize(
    ("run", "images", "room"),
    [(b"a", 3, True), (b"a", 4, False), (b"b", 7, True), (b"b", 8, False), (ANONYMOUS, 7, True), (ANONYMOUS, 8, False)],
)
def test_a_named_run_may_fill_three_quarters(
    loop: asyncio.AbstractEventLoop, run: bytes, images: int, room: bool
) -> None:
    queue = FairQueue()
    queue.add(job(loop, b"a", 9))
    assert queue.has_room(run, images, 16) is room

"""What a request holds, and how long its reading may take."""

from __future__ import annotations

import asyncio
import threading

import pytest

from common.errors import RewardOverloaded, RewardRejected, RewardUnavailable
from reward_servers.limits import ByteBudget, Holding, Patience, Readers
from reward_servers.metrics import ServerMetrics

TIMEOUT = 10.0


def budget(limit: int) -> ByteBudget:
    return ByteBudget("a", limit, ServerMetrics().of_scorer("a", 0.0, 1.0))


def test_room_is_taken_by_what_arrived_and_not_by_what_was_declared() -> None:
    shared = budget(10)
    first, second = Holding(shared), Holding(shared)
    first.require_room(10)
    second.require_room(10)
    first.grow_to(6)
    first.grow_to(5)  # it never shrinks before its end
    second.grow_to(4)
    with pytest.raises(RewardOverloaded, match="10 bytes wait, 1 more exceed 10: try later"):
        second.grow_to(5)
    with pytest.raises(RewardRejected, match="the request takes 11 bytes"):
        second.require_room(11)
    first.release()
    second.grow_to(10)


def test_bytes_stay_held_while_a_thread_reads_them() -> None:
    async def run() -> None:
        shared, readers, gate = budget(10), Readers(), threading.Event()
        holding = Holding(shared)
        holding.grow_to(10)
        work = readers.submit(lambda: gate.wait(TIMEOUT))
        holding.read_by(work)
        holding.release()
        with pytest.raises(RewardOverloaded):
            Holding(shared).grow_to(1)
        gate.set()
        await asyncio.wrap_future(work)
        async with asyncio.timeout(TIMEOUT):
            while readers.busy:
                await asyncio.sleep(0)
        await asyncio.sleep(0)
        Holding(shared).grow_to(10)
        readers.close()

    asyncio.run(run())


def test_patience_ends_with_its_deadline_or_its_client() -> None:
    now = [0.0]
    patience = Patience(2.0, clock=lambda: now[0])
    now[0] = 2.0
    patience.check()
    now[0] = 2.1
    with pytest.raises(RewardUnavailable, match="not read within its deadline"):
        patience.check()
    left = Patience(100.0, clock=lambda: now[0])
    left.end()
    with pytest.raises(RewardUnavailable):
        left.check()


def test_the_oldest_work_of_the_readers_counts() -> None:
    now, gate, begun = [0.0], threading.Event(), threading.Semaphore(0)
    readers = Readers(clock=lambda: now[0])

    def wait() -> bool:
        begun.release()
        return gate.wait(TIMEOUT)

    assert (readers.call_seconds, readers.busy) == (0.0, False)
    first = readers.submit(wait)
    assert begun.acquire(timeout=TIMEOUT)
    now[0] = 3.0
    second = readers.submit(wait)
    assert begun.acquire(timeout=TIMEOUT)
    now[0] = 5.0
    assert (readers.call_seconds, readers.busy) == (5.0, True)
    gate.set()
    assert first.result(TIMEOUT)
    assert second.result(TIMEOUT)
    readers.close()

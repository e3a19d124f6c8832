"""Messages between a server and its model process, over a real pair of sockets."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from common.errors import WireError
from common.wire import AnyArray
from reward_servers.model_process.channel import Channel

ANSWER_SECONDS = 60.0


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), Channel(theirs)


def passed_on(ends: tuple[Channel, Channel], message: dict[str, object], arrays: list[AnyArray]) -> object:
    sending = threading.Thread(target=ends[0].send, args=(message, arrays))
    sending.start()
    received = ends[1].receive()
    sending.join()
    return received


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
        np.random.default_rng(0).random((1, 3, 700, 900), dtype=np.float32),  # more than the kernel holds
        np.random.default_rng(0).random((2, 5, 6, 3), dtype=np.float32).transpose(0, 3, 1, 2),
        np.array([math.nan, math.inf], dtype=np.float32),
        np.empty((0, 3), dtype=np.float32),
        np.float32(7).reshape(()),
    ],
)
def test_an_array_arrives_as_it_was_and_can_be_written(ends: tuple[Channel, Channel], array: AnyArray) -> None:
    message, (received, second) = passed_on(ends, {"call": "score"}, [array, np.ones(1)])
    assert message == {"call": "score"}
    assert (received.dtype, received.shape, received.flags.writeable) == (array.dtype, array.shape, True)
    assert received.tobytes() == array.tobytes()
    assert second.tolist() == [1.0]


def test_metadata_arrives_with_its_bytes_arrays_and_any_length(ends: tuple[Channel, Channel]) -> None:
    """A call has the metadata of several requests, so the limits of one message do not hold for it."""
    metadata = [{"key": b"\0", "nested": {"array": np.arange(3)}, "text": "x" * 2**21, "many": [math.inf] * 70_000}]
    message, _ = passed_on(ends, {"metadata": metadata}, [])
    (item,) = message["metadata"]
    assert item["nested"].pop("array").tolist() == [0, 1, 2]
    assert item == {"key": b"\0", "nested": {}, "text": "x" * 2**21, "many": [math.inf] * 70_000}


def test_what_cannot_travel_leaves_the_channel_as_it_was(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(WireError, match="cannot"):
        ends[0].send({"metadata": [{"number": 10**30}]}, [np.ones(2)])
    ends[0].send({"call": "next"})
    assert ends[1].receive() == ({"call": "next"}, [])


def test_a_silent_end_is_waited_for_until_its_time(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[0].receive(time.monotonic() + 0.01)
    with pytest.raises(TimeoutError):
        ends[0].send({}, [np.zeros(2**26, np.uint8)], time.monotonic() + 0.01)
    with pytest.raises(TimeoutError):
        ends[1].send({}, until=time.monotonic() - 1)


def test_a_closed_end_is_an_end(ends: tuple[Channel, Channel]) -> None:
    ends[1].shut()
    with pytest.raises(EOFError):
        ends[0].receive()
    with pytest.raises(EOFError):
        ends[0].send({}, [np.zeros(2**20, np.uint8)])
    ends[0].close()
    ends[0].close()
    with pytest.raises(EOFError):
        ends[0].receive()


def test_a_thread_that_waits_is_released_by_its_own_end(ends: tuple[Channel, Channel]) -> None:
    released: list[type[BaseException]] = []

    def wait() -> None:
        with pytest.raises(EOFError) as caught:
            ends[0].receive()
        released.append(caught.type)

    waiting = threading.Thread(target=wait)
    waiting.start()
    ends[0].close()
    waiting.join(ANSWER_SECONDS)
    assert released == [EOFError]

"""Messages between a server and its model process, over a pair of sockets: a msgpack map, then raw arrays.

    length of the map, 4 bytes ─► map, with dtype and shape of each array ─► each array's own memory

Both ends are processes of ours. So a message has no bounds, but it is never pickled either.
"""

from __future__ import annotations

import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from common.wire import AnyArray, pack_map, unpack_map

Message = Mapping[str, Any]

LENGTH = struct.Struct(">I")
ARRAYS = "arrays"
"""The map's entry for dtype and shape of each array."""
BUFFER_BYTES = 2**22
"""Wanted room in the kernel for what is under way. The kernel may allow less."""

Result = TypeVar("Result")


class Channel:
    """One end of the pair.

    Every method raises EOFError when the other end is closed, and TimeoutError at `until`, a time of the monotonic
    clock. After either the channel is of no more use.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._in_use = threading.Lock()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)

    def send(self, message: Message, arrays: Sequence[AnyArray] = (), until: float = math.inf) -> None:
        """WireError, and nothing is sent, if a value of the message cannot travel."""
        whole = [np.require(array, requirements="C") for array in arrays]
        text = pack_map({**message, ARRAYS: [[array.dtype.str, array.shape] for array in whole]})
        pieces: list[bytes | memoryview] = [LENGTH.pack(len(text)) + text, *map(_bytes_of, whole)]
        with self._in_use:
            for piece in pieces:
                self._within(until, partial(self._socket.sendall, piece))

    def receive(self, until: float = math.inf) -> tuple[dict[str, Any], list[AnyArray]]:
        """The next message and its arrays, which are writable."""
        with self._in_use:
            (length,) = LENGTH.unpack(self._take(bytearray(LENGTH.size), until))
            message = unpack_map(self._take(bytearray(length), until))
            arrays = [np.empty(shape, dtype) for dtype, shape in message.pop(ARRAYS)]
            for array in arrays:
                self._take(_bytes_of(array), until)
        return message, arrays

    def shut(self) -> None:
        """End what a thread at either end waits for, with EOFError."""
        with suppress(OSError):  # the other end was closed first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, once no other thread uses it."""
        self.shut()
        with self._in_use:
            self._socket.close()

    def _take(self, buffer: Any, until: float) -> Any:
        """Fill the buffer and return it."""
        view = memoryview(buffer)
        while view:
            count = self._within(until, partial(self._socket.recv_into, view))
            if count == 0:
                raise EOFError("the other end is closed")
            view = view[count:]
        return buffer

    def _within(self, until: float, step: Callable[[], Result]) -> Result:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            self._socket.settimeout(left if left < math.inf else None)
            return step()
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError(f"the other end is closed: {error}") from error


def _bytes_of(array: AnyArray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data

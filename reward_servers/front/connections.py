"""The connections of a process: how many there are, which is closed for a newcomer, and which are too slow.

A connection is a stranger until one of its requests was allowed to use a scorer. When all places are taken, a newcomer
takes the place of the stranger that has been silent for longest, or else of the idlest connection without a request,
or else of the one that has not sent of its request for longest. If every connection has a whole request in work,
newcomers wait in the system's queue until one is answered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

MAX_CONNECTIONS = 512
"""This is enough for hundreds of workers and safely below the 1024 open files that a shell allows."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a connection.

    Attributes:
        most: connections of the process.
        head_bytes: bytes of a request's head, and of anything that becomes no part of a request.
        head_s: seconds for a head, and for the rest of a body that was refused.
        stranger_s: seconds that a connection may be idle before a token was shown.
        idle_s: seconds that any other may be idle: longer than clients keep theirs, so that they close first.
        window_s, window_bytes: a body, and an answer that the client reads, moves at least so many bytes in each
            window of so many seconds: 64 KiB per second.
        linger_s: seconds for the client to read the answer to a request that was no HTTP.
        sweep_s: the limits above are looked at so often.
    """

    most: int = MAX_CONNECTIONS
    head_bytes: int = 2**16
    head_s: float = 10.0
    stranger_s: float = 5.0
    idle_s: float = 75.0
    window_s: float = 5.0
    window_bytes: int = 5 * 2**16
    linger_s: float = 2.0
    sweep_s: float = 0.25


class Member(Protocol):
    """A connection, as the table of connections sees it."""

    @property
    def busy(self) -> bool:
        """Whether a request is being read, computed or answered."""
        ...

    @property
    def works(self) -> bool:
        """Whether a whole request has been read and is not answered."""
        ...

    def abort(self) -> None: ...

    def drain(self) -> None: ...

    def sweep(self, now: float, late: float) -> None: ...


class Connections:
    """All open connections, the idlest first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._strangers: dict[Member, None] = {}
        self._known: dict[Member, None] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._strangers) + len(self._known)

    def enter(self, newcomer: Member) -> None:
        """Add a connection; another one is closed if there are too many."""
        self._strangers[newcomer] = None
        if len(self) > self.limits.most and (chosen := self._idlest(newcomer)):
            self.leave(chosen)
            chosen.abort()

    def leave(self, member: Member) -> None:
        self._strangers.pop(member, None)
        self._known.pop(member, None)
        self._changed.set()

    def active(self, member: Member) -> None:
        """Bytes came from it: it is the least idle now."""
        group = self._known if member in self._known else self._strangers
        if group.pop(member, member) is None:
            group[member] = None

    def trust(self, member: Member) -> None:
        if self._strangers.pop(member, member) is None:
            self._known[member] = None

    def at_rest(self) -> None:
        """A connection has answered all its requests: it could be closed for a newcomer."""
        self._changed.set()

    async def room(self) -> None:
        """Return when a newcomer can have a place."""
        while len(self) >= self.limits.most and self._idlest() is None:
            self._changed.clear()
            await self._changed.wait()

    async def quiet(self) -> None:
        """Return when no connection has a request in work."""
        while any(member.busy for member in self._all()):
            self._changed.clear()
            await self._changed.wait()

    def each(self) -> list[Member]:
        return self._all()

    async def sweep(self) -> None:
        """Close what is too slow, until cancelled. Time in which this process itself stood still counts for nobody."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += self.limits.sweep_s
            await asyncio.sleep(due - loop.time())
            now = loop.time()
            late = now - due
            due = now
            for member in self._all():
                member.sweep(now, late)

    def _all(self) -> list[Member]:
        return [*self._strangers, *self._known]

    def _idlest(self, newcomer: Member | None = None) -> Member | None:
        for member in self._strangers:
            if member is not newcomer:
                return member
        unbusy = (member for member in self._known if not member.busy)
        slow = (member for member in self._known if not member.works and member is not newcomer)
        return next(unbusy, None) or next(slow, None)

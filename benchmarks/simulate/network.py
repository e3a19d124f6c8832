"""Links between machines, and objects that machines pull over them.

Every machine has one link, with the same speed in both directions; transfers share a link equally. An object is pulled
once per machine. Under `PullRule.ANY_HOLDER`, the rule of Ray's object store, a machine asks one of those that hold the
object at that moment, by chance. If all ask at once, all ask the first holder. Under `PullRule.TREE` a holder sends to
`FANOUT` machines at a time, and the others wait for a holder: what a broadcast that is planned would do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from random import Random

from benchmarks.simulate.timeline import Timeline

FANOUT = 1
"""A holder sends to so many machines at a time: with one, every round doubles the number of holders."""
Then = Callable[[], None]


class PullRule(StrEnum):
    """Whom a machine asks for an object."""

    ANY_HOLDER = "any_holder"
    TREE = "tree"


@dataclass(eq=False)
class _Transfer:
    source: int
    target: int
    left_bytes: float
    then: Then
    bytes_per_s: float = 0.0


class Network:
    """The links of all machines, which are numbered. `sent_bytes`: by machine."""

    def __init__(self, timeline: Timeline, bytes_per_s: float, latency_s: float) -> None:
        self.timeline, self.latency_s = timeline, latency_s
        self.sent_bytes: Counter[int] = Counter()
        self._bytes_per_s = bytes_per_s
        self._active: list[_Transfer] = []
        self._since = 0.0
        self._generation = 0

    def send(self, source: int, target: int, size: int, then: Then) -> None:
        """Transfer so many bytes; call `then` when they have arrived. It never is, if a machine is cut off before."""
        self._progress()
        self._active.append(_Transfer(source, target, size, then))
        self.sent_bytes[source] += size
        self._share()

    def cut_off(self, machine: int) -> None:
        """End the transfers of a machine that is lost."""
        self._progress()
        self._active = [one for one in self._active if machine not in (one.source, one.target)]
        self._share()

    def _progress(self) -> None:
        seconds = self.timeline.now - self._since
        for one in self._active:
            one.left_bytes -= one.bytes_per_s * seconds
        self._since = self.timeline.now

    def _share(self) -> None:
        """Divide the links among the transfers, and wait for the first that ends."""
        up, down = Counter(one.source for one in self._active), Counter(one.target for one in self._active)
        for one in self._active:
            one.bytes_per_s = self._bytes_per_s / max(up[one.source], down[one.target])
        self._generation += 1
        if self._active:
            generation = self._generation
            seconds = min(one.left_bytes / one.bytes_per_s for one in self._active)
            self.timeline.after(max(0.0, seconds), lambda: self._ended(generation))

    def _ended(self, generation: int) -> None:
        if generation != self._generation:
            return  # the links were divided anew
        self._progress()
        ended = [one for one in self._active if one.left_bytes < 1.0]
        self._active = [one for one in self._active if one.left_bytes >= 1.0]
        self._share()
        for one in ended:
            self.timeline.after(self.latency_s, one.then)


class SharedObject:
    """An object in the store of one machine, which others pull.

    Attributes:
        ready_at: when it appeared; None before.
        pulls_s: of every pull that has ended, seconds since it was asked for, and could be.
        sent: machine -> number of copies that it sent.
    """

    def __init__(self, network: Network, home: int, size: int, rule: PullRule, random: Random) -> None:
        self._network, self._home, self._size, self._rule, self._random = network, home, size, rule, random
        self._holders: list[int] = []
        self._wanted: dict[int, list[Then]] = {}
        self._asked_at: dict[int, float] = {}
        self._source: dict[int, int] = {}
        self._waiting: deque[int] = deque()
        self.ready_at: float | None = None
        self.pulls_s: list[float] = []
        self.sent: Counter[int] = Counter()

    def appear(self) -> None:
        """It is in the store of its home from now on."""
        self.ready_at = self._network.timeline.now
        self._holders.append(self._home)
        self._serve()

    def pull(self, machine: int, then: Then) -> None:
        """Call `then` when the machine holds the object."""
        if machine in self._holders:
            then()
        elif machine in self._wanted:
            self._wanted[machine].append(then)
        else:
            self._wanted[machine] = [then]
            self._asked_at[machine] = self._network.timeline.now
            self._waiting.append(machine)
            self._serve()

    def lose(self, machine: int) -> None:
        """A machine is lost. Those that it was sending to ask another one."""
        self._holders = [holder for holder in self._holders if holder != machine]
        for forgotten in (self._wanted, self._source):
            forgotten.pop(machine, None)
        cut_off = [target for target, source in self._source.items() if source == machine]
        for target in cut_off:
            del self._source[target]
        self._waiting = deque(target for target in (*self._waiting, *cut_off) if target != machine)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and (free := self._free_holders()):
            source, target = self._random.choice(free), self._waiting.popleft()
            self._source[target] = source
            self.sent[source] += 1
            self._network.send(source, target, self._size, partial(self._arrived, source, target))

    def _free_holders(self) -> list[int]:
        if self._rule is PullRule.ANY_HOLDER:
            return self._holders
        busy = Counter(self._source.values())
        return [holder for holder in self._holders if busy[holder] < FANOUT]

    def _arrived(self, source: int, target: int) -> None:
        if self._source.get(target) != source or self.ready_at is None:
            return  # one of the two was lost meanwhile
        del self._source[target]
        self._holders.append(target)
        self.pulls_s.append(self._network.timeline.now - max(self.ready_at, self._asked_at[target]))
        for then in self._wanted.pop(target):
            then()
        self._serve()

"""Reads and writes pickles of plain containers, opcode by opcode, without Python's own unpickler.

Flow-GRPO's and verl-omni's clients send `pickle.dumps` of dicts, lists, texts, bytes and numbers. Reading such a body
needs 34 of the opcodes of protocols 2 to 5 (Python's `Lib/pickletools.py` describes each). None of the 34 imports,
calls or builds an object. Any other opcode is refused by its name.

A small pickle can stand for a large value, because it may refer to a part of itself many times. So every reference
counts as a copy: the limits hold for the value written out. A container that was stored or referred to cannot be
changed any more, so that no value contains itself.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from common.errors import WireError
from common.strict_json import MAX_INTEGER, MIN_INTEGER
from reward_servers.picture_files import Check, unhurried

PROTOCOLS = range(2, 6)
MAX_ITEMS = 100_000
"""Values of one pickle, those in nested containers included."""
MAX_LEVELS = 16
"""Containers inside each other."""
MAX_OPCODES = 4 * MAX_ITEMS
"""Opcodes that make no value, such as frames, are counted as well."""
INTEGER_BYTES = 9
"""An integer of 64 bits without a sign has nine bytes, the first of them its sign."""
CHECK_EVERY = 1024
"""Opcodes between two calls of the check."""
PROTO, STOP = 0x80, ord(".")
REMEDY = "send dicts, lists, str, bytes and numbers alone (array.tolist() of a numpy array)"
_REFUSED_CODES = b"012FILPQRSTUVbcdgilop\x80\x81\x82\x83\x84\x8b\x8f\x90\x91\x92\x93\x96\x97\x98"
_REFUSED_NAMES = (
    "POP POP_MARK DUP FLOAT INT LONG PERSID BINPERSID REDUCE STRING BINSTRING SHORT_BINSTRING UNICODE BUILD GLOBAL "
    "DICT GET INST LIST OBJ PUT PROTO NEWOBJ EXT1 EXT2 EXT4 LONG4 EMPTY_SET ADDITEMS FROZENSET NEWOBJ_EX "
    "STACK_GLOBAL BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER"
)
REFUSED = dict(zip(_REFUSED_CODES, _REFUSED_NAMES.split(), strict=True))
"""Names of the opcodes that are not read."""


def loads(body: bytes | bytearray, max_bytes: int, check: Check = unhurried) -> Any:
    """The value of a pickle: nested dicts with texts as keys, lists, tuples, str, bytes, int, float, bool, None.

    Args:
        max_bytes: limit of all texts and bytes of the value, each reference counted as a copy.
        check: called between opcodes; it may raise to end the reading.

    Raises:
        WireError: the body is no pickle of protocol 2 to 5, has anything beside plain containers, or exceeds a limit.
    """
    return _Reader(body, max_bytes, check).read()


def dumps(value: Mapping[str, Any]) -> bytes:
    """A pickle of protocol 2, which every Python 3 reads, of nested maps, sequences, texts and floats."""
    return bytes((PROTO, PROTOCOLS[0])) + b"".join(_opcodes(value)) + b"."


def _opcodes(value: object) -> list[bytes]:
    if isinstance(value, float):
        return [b"G", struct.pack(">d", value)]
    if isinstance(value, str):
        text = value.encode()
        return [b"X", struct.pack("<I", len(text)), text]
    if isinstance(value, Mapping):
        return [b"}(", *(part for pair in value.items() for one in pair for part in _opcodes(one)), b"u"]
    if isinstance(value, Sequence):
        return [b"](", *(part for one in value for part in _opcodes(one)), b"e"]
    raise TypeError(f"a {type(value).__name__} is not written: floats, texts, maps and sequences are")


@dataclass(slots=True)
class _Node:
    """A value being read.

    Attributes:
        items, size, levels: its values, bytes and nested containers, written out. They are final once it is sealed.
        sealed: it is in a container or was referred to: it does not change any more.
    """

    value: Any
    items: int = 1
    size: int = 0
    levels: int = 0
    sealed: bool = False


class _Reader:
    """The stack machine of a pickle, with the opcodes that make plain values alone."""

    def __init__(self, body: bytes | bytearray, max_bytes: int, check: Check) -> None:
        self._view = memoryview(body)
        self._position = 0
        self._max_bytes = max_bytes
        self._check = check
        self._stack: list[_Node] = []
        # Lengths of the stack at the marks.
        self._marks: list[int] = []
        self._memo: dict[int, _Node] = {}

    def read(self) -> Any:
        if len(self._view) < len(b"\x80\x02") or self._view[0] != PROTO or self._view[1] not in PROTOCOLS:
            raise WireError(f"the body is no pickle of protocol {PROTOCOLS[0]} to {PROTOCOLS[-1]}")
        self._position = 2
        for count in range(MAX_OPCODES):
            if count % CHECK_EVERY == 0:
                self._check()
            opcode = self._take(1)[0]
            if opcode == STOP:
                return self._end()
            action = ACTIONS.get(opcode)
            if action is None:
                _refuse_opcode(opcode)
            action(self)
        raise WireError(f"the pickle has more than {MAX_OPCODES} opcodes: send fewer images at once")

    def _end(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            raise WireError(
                f"the pickle ends with {len(self._stack)} values and {len(self._marks)} marks, not one value"
            )
        if self._position != len(self._view):
            raise WireError(f"{len(self._view) - self._position} bytes follow the end of the pickle")
        return self._stack[0].value

    def _take(self, size: int) -> memoryview:
        end = self._position + size
        if end > len(self._view):
            raise WireError("the pickle ends before its STOP: it was cut")
        piece = self._view[self._position : end]
        self._position = end
        return piece

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _pop(self) -> _Node:
        if len(self._stack) <= self._floor():
            raise WireError("the pickle takes a value from an empty stack")
        return self._stack.pop()

    def _top(self) -> _Node:
        node = self._pop()
        self._stack.append(node)
        return node

    def _floor(self) -> int:
        return self._marks[-1] if self._marks else 0

    def pop_to_mark(self) -> list[_Node]:
        if not self._marks:
            raise WireError("the pickle takes values to a mark that is not there")
        mark = self._marks.pop()
        nodes = self._stack[mark:]
        del self._stack[mark:]
        return nodes

    # One method for each kind of opcode.

    def frame(self) -> None:
        size = self.number(8)
        if size > len(self._view) - self._position:
            raise WireError(f"the pickle has a frame of {size} bytes, which is longer than the body")

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def push(self, value: Any, size: int = 0, levels: int = 0) -> None:
        self._stack.append(_Node(value, size=size, levels=levels))

    def text(self, length_bytes: int) -> None:
        piece = self._take(self.number(length_bytes))
        try:
            # As Python does: a text that was cut inside a character is refused later, with a remedy.
            self.push(str(piece, "utf-8", "surrogatepass"), len(piece))
        except UnicodeDecodeError as error:
            raise WireError(f"the pickle has a text that is not UTF-8: {error.reason}") from error

    def content(self, length_bytes: int) -> None:
        piece = self._take(self.number(length_bytes))
        self.push(bytes(piece), len(piece))

    def integer(self, size: int, *, signed: bool = False) -> None:
        self.push(self.number(size, signed=signed))

    def long_integer(self) -> None:
        size = self.number(1)
        if size > INTEGER_BYTES:
            raise WireError(f"the pickle has an integer of {size} bytes: integers have 64 bits")
        value = self.number(size, signed=True)
        if not MIN_INTEGER <= value <= MAX_INTEGER:
            raise WireError(f"the pickle has the integer {value}: integers have 64 bits")
        self.push(value)

    def real(self) -> None:
        (value,) = struct.unpack(">d", self._take(8))
        if not math.isfinite(value):
            raise WireError(f"the pickle has the number {value}: send finite ones")
        self.push(value)

    def tuple_of(self, nodes: Sequence[_Node]) -> None:
        self.push(tuple(node.value for node in nodes), levels=1)
        for node in nodes:
            self._join(self._stack[-1], node)

    def tuple_of_last(self, count: int) -> None:
        self.tuple_of([self._pop() for _ in range(count)][::-1])

    def append(self, nodes: Sequence[_Node]) -> None:
        target = self._container(list, "list")
        for node in nodes:
            self._join(target, node)
            target.value.append(node.value)

    def set_items(self, nodes: Sequence[_Node]) -> None:
        if len(nodes) % 2:
            raise WireError("the pickle has a key without a value")
        target = self._container(dict, "dict")
        for key, node in zip(nodes[::2], nodes[1::2], strict=True):
            if not isinstance(key.value, str):
                raise WireError(f"the pickle has a dict with a {type(key.value).__name__} as a key: keys are texts")
            if key.value in target.value:
                raise WireError(f"the pickle has the key {key.value[:24]!r} twice in a dict")
            self._join(target, key)
            self._join(target, node)
            target.value[key.value] = node.value

    def put(self, index: int) -> None:
        if index > MAX_OPCODES:
            raise WireError(f"the pickle stores a value under the number {index}: more than {MAX_OPCODES} are not read")
        self._memo[index] = self._top()

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        node = self._memo.get(index)
        if node is None:
            raise WireError(f"the pickle refers to value {index}, which it has not stored")
        node.sealed = True
        self._stack.append(node)

    def _container(self, kind: type, name: str) -> _Node:
        target = self._top()
        if not isinstance(target.value, kind):
            raise WireError(f"the pickle adds to a {type(target.value).__name__} as if it were a {name}")
        if target.sealed:
            raise WireError(f"the pickle adds to a {name} that is in use: a value cannot contain itself")
        return target

    def _join(self, target: _Node, node: _Node) -> None:
        """Count `node` as a part of `target`; WireError beyond a limit."""
        node.sealed = True
        target.items += node.items
        target.size += node.size
        target.levels = max(target.levels, node.levels + 1)
        if target.items > MAX_ITEMS:
            raise WireError(f"the pickle has more than {MAX_ITEMS} values: send fewer images at once")
        if target.size > self._max_bytes:
            raise WireError(
                f"the texts and bytes of the pickle exceed {self._max_bytes} bytes: send fewer images at once"
            )
        if target.levels > MAX_LEVELS:
            raise WireError(f"the pickle has more than {MAX_LEVELS} containers inside each other")

    def append_last(self) -> None:
        self.append([self._pop()])

    def set_last(self) -> None:
        node = self._pop()
        self.set_items([self._pop(), node])


def _refuse_opcode(opcode: int) -> NoReturn:
    raise WireError(f"the pickle has the opcode {REFUSED.get(opcode, f'0x{opcode:02x}')}: {REMEDY}")


ACTIONS: dict[int, Callable[[_Reader], None]] = {
    0x95: _Reader.frame,
    ord("("): _Reader.mark,
    ord("N"): lambda reader: reader.push(None),
    0x88: lambda reader: reader.push(True),
    0x89: lambda reader: reader.push(False),
    ord("K"): lambda reader: reader.integer(1),
    ord("M"): lambda reader: reader.integer(2),
    ord("J"): lambda reader: reader.integer(4, signed=True),
    0x8A: _Reader.long_integer,
    ord("G"): _Reader.real,
    0x8C: lambda reader: reader.text(1),
    ord("X"): lambda reader: reader.text(4),
    0x8D: lambda reader: reader.text(8),
    ord("C"): lambda reader: reader.content(1),
    ord("B"): lambda reader: reader.content(4),
    0x8E: lambda reader: reader.content(8),
    ord("}"): lambda reader: reader.push({}, levels=1),
    ord("]"): lambda reader: reader.push([], levels=1),
    ord(")"): lambda reader: reader.push((), levels=1),
    0x85: lambda reader: reader.tuple_of_last(1),
    0x86: lambda reader: reader.tuple_of_last(2),
    0x87: lambda reader: reader.tuple_of_last(3),
    ord("t"): lambda reader: reader.tuple_of(reader.pop_to_mark()),
    ord("a"): _Reader.append_last,
    ord("e"): lambda reader: reader.append(reader.pop_to_mark()),
    ord("s"): _Reader.set_last,
    ord("u"): lambda reader: reader.set_items(reader.pop_to_mark()),
    0x94: _Reader.memoize,
    ord("q"): lambda reader: reader.put(reader.number(1)),
    ord("r"): lambda reader: reader.put(reader.number(4)),
    ord("h"): lambda reader: reader.get(reader.number(1)),
    ord("j"): lambda reader: reader.get(reader.number(4)),
}
"""The opcodes that are read."""

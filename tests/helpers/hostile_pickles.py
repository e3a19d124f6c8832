"""Pickles with random changes."""

from __future__ import annotations

import random

from reward_servers.plain_pickle import ACTIONS, REFUSED

OPCODES = (*ACTIONS, *REFUSED)


def mutated(body: bytes, dice: random.Random) -> bytes:
    """One to four changes: bits, bytes, opcodes, pieces moved, doubled or cut."""
    changed = bytearray(body)
    for _ in range(dice.randint(1, 4)):
        place, other = sorted((dice.randrange(len(changed)), dice.randrange(len(changed))))
        kind = dice.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[place] = dice.randrange(256)
        elif kind == 2:
            changed[place:place] = bytes([dice.choice(OPCODES)])
        elif kind == 3:
            changed[place:place] = changed[place : min(other, place + 40)]
        elif kind == 4:
            del changed[place : min(other, place + 12)]
        else:
            del changed[other:]
        if not changed:
            return b"\x80"
    return bytes(changed)

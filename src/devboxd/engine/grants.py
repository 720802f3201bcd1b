"""How room that does not suffice for all disks is divided among them: a pure function from figures to grants."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

FLOOR = 256 << 20
"""What each disk may take before the server has seen that it writes, where half of the room suffices for that."""


class Turn(IntEnum):
    """Who is served first."""

    WRITES = 0
    BEGINS = 1
    RESTS = 2


@dataclass(frozen=True)
class Want:
    """Bytes that a disk may still take to have all of its size, and what it does."""

    bytes: int
    turn: Turn = Turn.RESTS


def level(wanted: Collection[int], left: int) -> int:
    """The largest share with which all that want less have what they want, and the sum is at most `left`."""
    rising = sorted(wanted)
    for number, want in enumerate(rising):
        share = max(0, left) // (len(rising) - number)
        if want > share:
            return share
        left -= want
    return max(rising, default=0)


def grants(wants: Sequence[Want], left: int) -> list[int]:
    """Bytes for each disk: no more than it wants, and in all no more than `left`.

    First each has a floor. Then those that were written lately share the rest; what they do not want is shared by those
    that have just begun, and what is left then by those at rest.
    """
    left = max(0, left)
    floor = min(FLOOR, left // 2 // max(1, len(wants)))
    given = [min(want.bytes, floor) for want in wants]
    left -= sum(given)
    for turn in Turn:
        lacking = {number: want.bytes - given[number] for number, want in enumerate(wants) if want.turn is turn}
        share = level(lacking.values(), left)
        for number, lacks in lacking.items():
            given[number] += min(lacks, share)
            left -= min(lacks, share)
    return given

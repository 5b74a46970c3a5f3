"""Owners of folds: every host folds its share of all gradients, and what is folded goes to all (docs/decisions/0022).

    each worker's part of a cell --Part--> the owner of that share --Fold, when all parts are there--> all others
    each worker's rows of a table --Rows--> all others, and each folds them

The dense parameters are cut into *cells*, and each cell into a share for every owner; a table is one cell, and its rows
go to all. Parts leave during backward, and folds as soon as all parts of a share are there: with the weights that the
last round had, which are hardly ever others. Nothing of it counts before the round is pushed as one, at home. What is
sent anew, as a gradient has changed or the weights are others, takes the place of what was sent before; messages of one
sender come in order, so who has been told *Given* by all has all parts as they are to be, and who has been told
*Folded* by all has the whole fold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated

import msgspec

from paceline.protocol.link import Number, Senseless

_GRAIN = 16  # values: shares begin at a cache line
_MOST_BACK = 2**10  # rounds: what one thread of a member says may be behind what another says, but hardly by one
Signed = Annotated[int, msgspec.Meta(gt=-(2**62), lt=2**62)]


class Said(msgspec.Struct, frozen=True, tag_field="t", array_like=True):
    """Base of all that workers of different hosts tell each other. ``exchange``, ``number``: of the round."""

    exchange: Number
    number: Number


class Part(Said, frozen=True, tag=1):
    """...the payload is my gradient, of your share of this cell."""

    cell: Number


class Fold(Said, frozen=True, tag=2):
    """...the payload is the fold of my share of this cell."""

    cell: Number


class Given(Said, frozen=True, tag=3):
    """...you have all parts of my gradient."""


class Folded(Said, frozen=True, tag=4):
    """...you have the fold of all that is my share, with the weights that home has told."""


class Off(Said, frozen=True, tag=5):
    """...I bring my own gradient to this round: it will not be pushed as one."""


class Rows(Said, frozen=True, tag=6):
    """...the payload is of the rows of my gradient, of the table that is this cell, from this byte on: so many rows,
    negative where they are not unique; their numbers and then their values. ``ends``: it is the last of them."""

    cell: Number
    count: Signed
    start: Number
    ends: bool


One = Part | Fold | Given | Folded | Off | Rows


class Enclosed(msgspec.Struct, frozen=True, array_like=True):
    """One of them, and the bytes that would be its payload."""

    said: One
    data: bytes


class Letter(Said, frozen=True, tag=7):
    """...all this, in this order: what is small goes together."""

    enclosed: list[Enclosed]

    @property
    def size_bytes(self) -> int:
        """Of what would be payloads."""
        return sum(len(one.data) for one in self.enclosed)


Any_ = One | Letter


def cut(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """The values ``[start, stop)`` as cells of at most so many, alike in size; at least one."""
    count = max(-(-(stop - start) // most), 1)
    return [(start + (stop - start) * i // count, start + (stop - start) * (i + 1) // count) for i in range(count)]


def share(start: int, stop: int, owner: int, owners: int) -> tuple[int, int]:
    """Which values of a cell the owner of this place among so many folds. May be none."""
    grains = -(-(stop - start) // _GRAIN)
    first, end = grains * owner // owners, grains * (owner + 1) // owners
    return min(start + first * _GRAIN, stop), min(start + end * _GRAIN, stop)


class Gathering:
    """What of a round has come to member ``me``, which folds something of each of ``cells``, and what it has folded.

    Shares of weights are by member, in the order of ``members``. Rounds before its own are over; of the next one parts
    may come while it is still in this one, from who has stepped already. What a member says of a round raises Senseless
    where it has spoken of one far behind: that was none, and would be waited for without end.
    """

    def __init__(self, me: int, members: Sequence[int], cells: Sequence[int]) -> None:
        self._me, self._members, self._cells = me, tuple(members), tuple(cells)
        self.number = 0
        self.shares: tuple[float, ...] = (1 / len(members),) * len(members)
        self._parts = {member: dict.fromkeys(cells, 0) for member in members}  # of which round what is there is
        self._given, self._folded = dict.fromkeys(members, 0), dict.fromkeys(members, 0)
        self._latest = dict.fromkeys(members, 0)  # of which round each has spoken
        self._off: set[int] = set()  # rounds, of which one may be the next: who has stepped already is ahead
        self._settled = 0
        self._come = dict.fromkeys(cells, 0)  # how many parts of this round
        self._changes = dict.fromkeys(cells, 0)
        self._ready: deque[int] = deque()  # all parts are there, and the fold is not made of them
        self._done: set[int] = set()  # folded as it is

    def begin(self, number: int) -> None:
        """This member is at round ``number`` now."""
        self.number = number
        self._off = {off for off in self._off if off >= number}
        self._ready.clear()
        self._done.clear()
        for cell in self._cells:
            self._come[cell] = sum(parts[cell] == number for parts in self._parts.values())
            self._look(cell)

    def part(self, member: int, number: int, cell: int) -> None:
        """A member's part has come, perhaps again; also one's own."""
        self._hear(member, number)
        parts = self._parts[member]
        if cell not in parts or number < parts[cell]:
            return
        before, parts[cell] = parts[cell], number
        if number != self.number:
            return
        self._changes[cell] += 1
        self._come[cell] += before != number
        self._done.discard(cell)
        self._look(cell)

    def _look(self, cell: int) -> None:
        if self._come[cell] == len(self._members) and cell not in self._ready:
            self._ready.append(cell)

    def _hear(self, member: int, number: int) -> None:
        latest = self._latest[member] = max(self._latest[member], number)
        if number < latest - _MOST_BACK:
            raise Senseless(f"worker {member} has spoken of round {latest}, and now speaks of round {number}")

    def given(self, member: int, number: int) -> None:
        self._hear(member, number)
        self._given[member] = max(self._given[member], number)

    def folded(self, member: int, number: int) -> None:
        self._hear(member, number)
        self._folded[member] = max(self._folded[member], number)

    def off(self, member: int, number: int) -> None:
        self._hear(member, number)
        self._off.add(number)

    def settle(self, number: int, shares: Sequence[float]) -> None:
        """With these shares the round counts, if it does. All members have given their parts, or are about to."""
        if number != self.number:
            return
        self._settled = number
        if tuple(shares) != self.shares:
            self.shares = tuple(shares)
            self._done.clear()
            for cell in self._cells:
                self._look(cell)

    @property
    def has_next(self) -> bool:
        return bool(self._ready)

    def next(self) -> tuple[int, int]:
        """A cell to fold, with a ticket for ``fold``."""
        cell = self._ready.popleft()
        return cell, self._changes[cell]

    def fold(self, number: int, cell: int, ticket: int, shares: Sequence[float]) -> None:
        """It was folded, and sent to all, as it was when the ticket was given."""
        if (number, ticket, tuple(shares)) == (self.number, self._changes[cell], self.shares):
            self._done.add(cell)

    @property
    def is_folded(self) -> bool:
        """Is this member's share as it will be, so that it is to tell so? Once for a round."""
        return (
            self._settled == self.number > self._folded[self._me]
            and len(self._done) == len(self._cells)
            and all(given >= self.number for given in self._given.values())
        )

    def is_whole(self, number: int) -> bool:
        """Is the whole fold of this round here?"""
        return number == self.number and all(folded == number for folded in self._folded.values())

    def is_off(self, number: int) -> bool:
        """Does somebody bring its own to this round, or is it over?"""
        return number in self._off or number < self.number

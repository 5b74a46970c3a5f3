"""Sparse rows of one embedding table between owners (owners.py): each sends its own to all, and each folds them all.

Few rows of one host's batches are in another's too, so that their fold is nearly as long as its parts together: in
shares most rows would travel twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.engine.elsewhere.mail import as_bytes
from paceline.params import rows
from paceline.params.fold import WIDE, Pushed
from paceline.params.rows import Rows
from paceline.params.table import Entry, vector_dtype
from paceline.protocol import owners
from paceline.protocol.link import Senseless


@dataclass(slots=True)
class _Given:
    """As ``rows.of_numbers`` takes it."""

    numbers: torch.Tensor
    values: torch.Tensor
    unique: bool


class TableParts:
    """Of table number ``param``; it is folded into ``folds``. ``members``, in rank order, one of whom is ``rank``."""

    def __init__(self, param: int, entry: Entry, rank: int, members: Sequence[int], folds: Pushed) -> None:
        self.param, self._entry, self._folds = param, entry, folds
        self._rank, self._members = rank, tuple(members)
        self._area, values = folds.rows[param], folds.gradient[entry.vector]
        self._values = values[entry.offset : entry.offset + entry.size].view(-1, entry.row)
        self._kind = torch.int32 if entry.rows < 2**31 else torch.int64  # of numbers, as they are sent
        self._given = {member: _Given(*self._places_of(member, 0), unique=True) for member in self._members}
        self._come = dict.fromkeys(self._members, (0, 0))  # of each one's: how many rows, and bytes of them
        # Pages of them that no row has come to take no memory.
        most_bytes = self._begins(entry.rows) + self._values.nbytes
        self._rooms = {member: torch.zeros(most_bytes, dtype=torch.uint8) for member in self._members}

    def give(self, own: Rows) -> tuple[int, memoryview]:
        """This member's rows: how many, negative where they are not unique, and their numbers and values as they are
        sent. What was given before must have been sent."""
        count = len(own.indices) if own.unique else -len(own.indices)
        numbers, values = self._places_of(self._rank, count)
        numbers.copy_(own.numbers)
        values[: len(own.values)].copy_(own.values)
        self._given[self._rank] = _Given(numbers, values[: len(own.values)], own.unique)
        return count, as_bytes(self._rooms[self._rank][: self._size_bytes(count, len(own.values))])

    def place(self, sender: int, count: int, start: int, size_bytes: int) -> memoryview | None:
        """Where these bytes belong of so many rows of another member; None for what cannot be."""
        if sender not in self._rooms or abs(count) > self._entry.rows:
            return None
        if not 0 <= start < start + size_bytes <= self._size_bytes(count, abs(count)):
            return None
        return as_bytes(self._rooms[sender][start : start + size_bytes])

    def take(self, sender: int, said: owners.Rows, size_bytes: int) -> None:
        """These bytes of them are there. Raises Senseless for rows that the table has not, as who steps them may not
        look, and where some of them have not come."""
        count, entry = said.count, self._entry
        if abs(count) > entry.rows:
            raise Senseless(f"{abs(count)} rows have come of a table of {entry.rows}")
        is_next, stop = said.start == 0 or self._come[sender] == (count, said.start), said.start + size_bytes
        self._come[sender] = count, stop
        if is_next and not said.ends:
            return
        numbers, values = self._places_of(sender, count)
        some = Senseless(f"of {abs(count)} rows only some have come, or in no order")
        if not is_next or stop < numbers.nbytes:
            raise some
        if (wrong := rows.stray(numbers, self._entry.rows, unique=count >= 0)) is not None:
            raise Senseless(f"row {wrong} has come of a table of {self._entry.rows}")
        size = rows.count_values(numbers)
        if stop != self._size_bytes(count, size):
            raise some
        self._given[sender] = _Given(numbers, values[:size], count >= 0)

    def fold(self, shares: Sequence[float]) -> None:
        """What all have given, by shares in the order of members, is the fold."""
        given = [self._given[member] for member in self._members]
        total, place, stop = sum(one.numbers.shape[0] for one in given), 0, 0
        if any(one.unique for one in given) or total > self._entry.rows:
            sources = [rows.of_numbers(one.numbers, one.values, one.unique) for one in given]
            lay_rows(folded_of(sources, shares, self._entry), self._folds, self.param, self._entry)
            return
        for one, share in zip(given, shares, strict=True):
            count, size = one.numbers.shape[0], one.values.shape[0]
            self._area[place + 1 : place + count + 1] = one.numbers
            torch.mul(one.values, share, out=self._values[stop : stop + size])
            place, stop = place + count, stop + size
        self._area[0] = -total

    def lay_fold(self, slot: Pushed) -> None:
        """Copy it there."""
        lay_rows(rows_of(self._folds, self.param, self._entry), slot, self.param, self._entry)

    def _places_of(self, member: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where this member's rows are, if they are so many: numbers, and values of as many (aliases)."""
        if not count:
            return torch.zeros(0, dtype=self._kind), self._values[:0]
        room, begins = self._rooms[member], self._begins(count)
        values = room[begins : self._size_bytes(count, abs(count))].view(self._values.dtype).view(-1, self._entry.row)
        return room[: abs(count) * self._kind.itemsize].view(self._kind), values

    def _begins(self, count: int) -> int:
        """At which byte values begin, behind so many numbers."""
        return -(-abs(count) * self._kind.itemsize // 16) * 16

    def _size_bytes(self, count: int, values: int) -> int:
        """With so many rows of values."""
        return self._begins(count) + values * self._entry.row * self._values.itemsize


def rows_of(pushed: Pushed, param: int, entry: Entry) -> Rows:
    """The rows of a table that were pushed (aliases)."""
    values = pushed.gradient[entry.vector][entry.offset : entry.offset + entry.size]
    return rows.read(pushed.rows[param], values, entry.row, 0, entry.rows)


def lay_rows(some: Rows, pushed: Pushed, param: int, entry: Entry) -> None:
    """Copy them there, as what is pushed of this table."""
    rows.lay(pushed.rows[param], pushed.gradient[entry.vector][entry.offset :][: entry.size], some)


def folded_of(sources: Sequence[Rows], shares: Sequence[float], entry: Entry) -> Rows:
    """The fold of rows of a table, no more than that has."""
    dtype = vector_dtype(entry.vector)
    folded = rows.fold(sources, shares, WIDE.get(dtype, dtype))
    return folded if len(folded.indices) <= entry.rows else rows.summed(folded.indices, folded.each)

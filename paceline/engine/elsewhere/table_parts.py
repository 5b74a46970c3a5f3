"""Sparse rows of one embedding table between owners (owners.py): each sends its own to all, and each folds them all.

Few rows of one host's batches are in another's too, so that their fold is nearly as long as its parts together: in
shares most rows would travel twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.engine.elsewhere.mail import as_bytes
from paceline.params import rows
from paceline.params.fold import WIDE, Pushed
from paceline.params.rows import Rows
from paceline.params.table import Entry, vector_dtype


class TableParts:
    """Of table number ``param``; it is folded into ``folds``. ``members``, in rank order, one of whom is ``rank``."""

    def __init__(self, param: int, entry: Entry, rank: int, members: Sequence[int], folds: Pushed) -> None:
        self.param, self._entry, self._folds = param, entry, folds
        self._rank, self._members, self._row = rank, tuple(members), entry.row
        self._dtype = vector_dtype(entry.vector)
        self._area, values = folds.rows[param], folds.gradient[entry.vector]
        self._values = values[entry.offset : entry.offset + entry.size].view(-1, entry.row)
        # Pages of them that no row has come to take no memory.
        others = [member for member in members if member != rank]
        self._numbers_kind = torch.int32 if entry.rows < 2**31 else torch.int64
        self._numbers = {other: torch.zeros(entry.rows, dtype=self._numbers_kind) for other in others}
        self._given = {other: torch.zeros_like(self._values) for other in others}
        self._counts = dict.fromkeys(others, 0)

    def numbers(self, own: Rows) -> memoryview:
        """As they are sent: half as long, where a table has fewer than 2^31 rows."""
        return as_bytes(own.indices.to(self._numbers_kind))

    def count(self, sender: int, count: int) -> None:
        """So many rows of this member have numbers now; negative where they are not unique."""
        self._counts[sender] = count

    def place_numbers(self, sender: int, count: int, size_bytes: int) -> memoryview | None:
        """Where they belong; None for what cannot be."""
        room = self._numbers.get(sender)
        if room is None or abs(count) > len(room) or abs(count) * room.itemsize != size_bytes:
            return None
        return as_bytes(room[: abs(count)])

    def place_values(self, sender: int, size_bytes: int) -> memoryview | None:
        """Likewise of the values of the rows whose numbers have come."""
        count = abs(self._counts.get(sender, 0))
        return as_bytes(self._given[sender][:count]) if count * self._row * self._dtype.itemsize == size_bytes else None

    def fold(self, own: Rows, shares: Sequence[float]) -> None:
        """What all have given, by shares in the order of members, is the fold."""
        sources = [own if member == self._rank else self._rows_of(member) for member in self._members]
        total, place = sum(len(source.indices) for source in sources), 0
        if any(source.unique for source in sources) or total > self._entry.rows:
            lay_rows(folded_of(sources, shares, self._entry), self._folds, self.param, self._entry)
            return
        for source, share in zip(sources, shares, strict=True):
            stop = place + len(source.indices)
            self._area[place + 1 : stop + 1] = source.indices
            torch.mul(source.values, share, out=self._values[place:stop])
            place = stop
        self._area[0] = -total

    def lay_fold(self, slot: Pushed) -> None:
        """Copy it there."""
        lay_rows(rows_of(self._folds, self.param, self._entry), slot, self.param, self._entry)

    def _rows_of(self, member: int) -> Rows:
        count = self._counts[member]
        numbers = self._numbers[member][: abs(count)].to(torch.int64)
        return Rows(numbers, self._given[member][: abs(count)], count >= 0)


def rows_of(pushed: Pushed, param: int, entry: Entry) -> Rows:
    """The rows of a table that were pushed (aliases)."""
    values = pushed.gradient[entry.vector][entry.offset : entry.offset + entry.size]
    return rows.read(pushed.rows[param], values, entry.row, 0, entry.rows)


def lay_rows(some: Rows, pushed: Pushed, param: int, entry: Entry) -> None:
    """Copy them there, as what is pushed of this table."""
    area, count = pushed.rows[param], len(some.indices)
    area[1 : count + 1] = some.indices
    pushed.gradient[entry.vector][entry.offset :][: count * entry.row] = some.values.view(-1)
    area[0] = count if some.unique else -count


def folded_of(sources: Sequence[Rows], shares: Sequence[float], entry: Entry) -> Rows:
    """The fold of rows of a table, no more than that has."""
    dtype = vector_dtype(entry.vector)
    folded = rows.fold(sources, shares, WIDE.get(dtype, dtype))
    return folded if len(folded.indices) <= entry.rows else rows.summed(folded.indices, folded.values)

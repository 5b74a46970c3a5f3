"""What stop rules go by, where one process decides for all: a few floats on the board, changed under the run's lock."""

from __future__ import annotations

import math

from paceline.transport.journal import Watched

WORDS = 8


def _cell(place: int) -> property:
    def read(self: Accounts) -> float:
        return self._cells.float_at(place)

    def write(self: Accounts, value: float) -> None:
        self._cells.put_float(place, value)

    return property(read, write)


class Accounts:
    """Names for the floats in WORDS ``cells``: sums since the last look, steps in all, what looks have found so far."""

    def __init__(self, cells: Watched) -> None:
        self._cells = cells

    loss_sum = _cell(0)
    samples = _cell(1)
    steps = _cell(2)
    looks_without_gain = _cell(3)
    looked = _cell(6)  # rounds: the last look, as passes << 32 | round
    found = _cell(7)  # 1 if that look ends training

    def words(self) -> list[int]:
        """All of them, as they lie in memory."""
        return list(self._cells)

    def restore(self, words: list[int]) -> None:
        """As ``words`` told them."""
        for place, word in enumerate(words):
            self._cells[place] = word

    @property
    def best(self) -> float:
        """The best loss that a look has found."""
        return self._cells.float_at(4) if self._cells[5] else math.inf

    @best.setter
    def best(self, value: float) -> None:
        if value < math.inf:
            self._cells.put_float(4, value)
            self._cells[5] = 1

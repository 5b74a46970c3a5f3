"""What is done under the run's lock is done whole or not at all, whoever is killed in its midst.

Before a word is changed its old value is written to the journal; letting go of the lock empties it. The kernel releases
the lock of a process that dies, so whoever takes it next and finds the journal not empty puts the old values back, last
first. Single words that are right by themselves (each has one writer, or only ever rises) need no journal.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, MutableSequence

ENTRIES = 1 << 14
WORDS = 1 + 2 * ENTRIES  # how many are written, then (where, what it was) each
_PLACE_BITS = 40
_DOUBLE, _WORD = struct.Struct("d"), struct.Struct("Q")


class Journal:
    """Over ``words``, zeros at first."""

    def __init__(self, words: memoryview[int]) -> None:
        self._words = words
        self._segments: dict[int, memoryview[int]] = {}
        self.publish: list[Callable[[], None]] = []  # what shows others, who do not take the lock, that it was done

    def map(self, segment: int, words: memoryview[int]) -> None:
        """``words`` is all of a segment, which has the same number in every process."""
        self._segments[segment] = words

    def watch(self, segment: int, start: int, stop: int) -> Watched:
        """Words ``[start, stop)`` of a segment, to be changed under the lock only."""
        return Watched(self, segment << _PLACE_BITS | start, self._segments[segment][start:stop])

    def save(self, place: int, old: int) -> None:
        words = self._words
        count = words[0]
        assert count < ENTRIES, "more is changed under the lock at once than the journal has room for"
        words[1 + 2 * count], words[2 + 2 * count] = place, old
        words[0] = count + 1  # last: from here on it is saved

    @property
    def is_clean(self) -> bool:
        """Is nothing half done?"""
        return not self._words[0]

    @property
    def is_known(self) -> bool:
        """Is all that is half done in memory that this process maps?"""
        words = self._words
        return all(words[1 + 2 * place] >> _PLACE_BITS in self._segments for place in range(words[0]))

    def roll_back(self) -> None:
        """Undo what the last holder of the lock has left unfinished."""
        words = self._words
        while words[0]:
            last = words[0] - 1
            place = words[1 + 2 * last]
            memory = self._segments.get(place >> _PLACE_BITS)
            assert memory is not None, "the journal tells of memory that this process does not map"
            memory[place & (1 << _PLACE_BITS) - 1] = words[2 + 2 * last]
            words[0] = last
        for publish in self.publish:
            publish()

    def commit(self) -> None:
        """What was done stays."""
        self._words[0] = 0
        for publish in self.publish:
            publish()


class Watched(MutableSequence[int]):
    """Words whose old values go to the journal before they are changed."""

    def __init__(self, journal: Journal, first: int, memory: memoryview[int]) -> None:
        self._journal, self._first, self._memory = journal, first, memory

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, place: int) -> int:  # type: ignore[override]  # nobody slices them
        return self._memory[place]

    def __setitem__(self, place: int, value: int) -> None:  # type: ignore[override]
        old = self._memory[place]
        if old != value:
            self._journal.save(self._first + place, old)
            self._memory[place] = value

    def __delitem__(self, place: object) -> None:
        raise TypeError("memory cannot shrink")

    def insert(self, index: int, value: int) -> None:
        raise TypeError("memory cannot grow")

    def float_at(self, place: int) -> float:
        """A word that holds a float64."""
        value: float = _DOUBLE.unpack(_WORD.pack(self._memory[place]))[0]
        return value

    def put_float(self, place: int, value: float) -> None:
        self[place] = _WORD.unpack(_DOUBLE.pack(value))[0]

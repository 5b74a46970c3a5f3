"""The log of an exchange: what is done to its parameters at the paces quorum, bounded and async, in one order.

The laws
  1. An entry is appended under the run's lock and gets the next number, 1, 2, ...
  2. The parameters are cut into parts, and every part applies all entries in the order of their numbers: entry t is
     applied to a part when ``applied[part]`` is t-1, by one process, which then stores t. So nobody else is at a
     part while it is being written or copied, and all parts go through the same versions.
  3. A worker waits until its entry is applied to all parts before it does anything else. So at most one entry a
     worker is unapplied, and a ring of RING entries never loses one that is needed.

An entry is a STEP (fold the gradients of its members, step the parameters, copy them to the members), a COPY (only
copy them), a LOAD (the worker puts its own parameters and state in their place), or a SAVE (it copies all of them for a
checkpoint). ``version`` counts STEPs. Where servers apply entries, each entry says which do: its *crew*.

The words are anything indexable: memory shared by processes, or a list in a test.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from paceline.config import MAX_WORKERS
from paceline.protocol.crew import crew_size, crew_word

Words: TypeAlias = "MutableSequence[int] | memoryview[int]"

STEP, COPY, LOAD, SAVE = 1, 2, 3, 4
RING = 2 * MAX_WORKERS
_SETS = MAX_WORKERS // 64  # words of a set of workers
_HEADER = 16
_ENTRY = 8
_FATE = 4  # words a worker: what became of its last offer
_APPENDED, _VERSION, _LOADED, _SEEN, _OFFERED = 0, 1, 2, 3, 4
_CREW = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry ``number``, appended ``by`` a worker; ``version`` is the parameters' once it is applied. ``staleness``
    is how many STEPs lie between what the members' gradients were computed on and what they are applied to. ``crew``:
    which servers apply it (protocol/crew.py)."""

    number: int
    kind: int
    by: int
    version: int
    staleness: int
    members: tuple[int, ...]
    crew: int = 0


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a worker's last offer: entry ``number``, appended ``by`` a worker, with so many members."""

    number: int
    version: int
    by: int
    members: int


def words_needed(workers: int) -> int:
    return _HEADER + RING * _ENTRY + workers * _FATE


class Log:
    """The log over ``words``, zeros at first. What writes must be called under the run's lock."""

    def __init__(self, words: Words, workers: int, kept: Words | None = None) -> None:
        self.words, self._workers = words, workers
        # The same words, through the lock's journal where there is one. The ring needs none: what lies behind the last
        # entry means nothing.
        self._kept = words if kept is None else kept
        self._fates = _HEADER + RING * _ENTRY

    @property
    def appended(self) -> int:
        """The number of the last entry; under the lock."""
        return self.words[_APPENDED]

    @property
    def seen(self) -> int:
        """The number of the last entry that may be applied: for readers without the lock."""
        return self.words[_SEEN]

    @property
    def version(self) -> int:
        """STEPs so far, applied or not."""
        return self.words[_VERSION]

    @property
    def loaded(self) -> int:
        """The number of the last LOAD."""
        return self.words[_LOADED]

    @property
    def crew(self) -> tuple[int, int]:
        """The first entry with a crew as large as the last one's, and how many that is. Read without the lock, behind
        ``seen``, it tells the crew of all entries from there up to that one, if there are any."""
        word = self.words[_CREW]
        return word >> 16, crew_size(word)

    def append(self, kind: int, by: int, members: Sequence[int], staleness: int = 0, crew: int = 0) -> Entry:
        """Append an entry, and tell each member of it."""
        words, kept = self.words, self._kept
        number = words[_APPENDED] + 1
        version = words[_VERSION] + (kind == STEP)
        start = _place(number)
        words[start], words[start + 1], words[start + 2], words[start + 3] = kind | crew << 8, by, version, staleness
        self._write_set(words, start + 4, members)
        for member in members:
            fate = self._fates + member * _FATE
            kept[fate + 1], kept[fate + 2], kept[fate + 3] = version, by, len(members)
            kept[fate] = number
        kept[_VERSION] = version
        if crew_size(crew) != crew_size(words[_CREW]):
            kept[_CREW] = crew_word(number, crew_size(crew))
        if kind == LOAD:
            kept[_LOADED] = number
        kept[_APPENDED] = number  # last: from here on it is in the log
        return Entry(number, kind, by, version, staleness, tuple(members), crew)

    def go_on_from(self, version: int) -> None:
        """Before anything is appended: so many STEPs lie behind the parameters."""
        self._kept[_VERSION] = version

    def entry(self, number: int) -> Entry:
        """Entry ``number``, one of the last RING."""
        words, start = self.words, _place(number)
        kind, by, version, staleness = words[start], words[start + 1], words[start + 2], words[start + 3]
        return Entry(number, kind & 0xFF, by, version, staleness, self._read_set(start + 4), kind >> 8)

    def fate(self, worker: int) -> Fate:
        """What became of its last offer: final if the entry's number is not above ``seen``."""
        start = self._fates + worker * _FATE
        words = self.words
        return Fate(words[start], words[start + 1], words[start + 2], words[start + 3])

    @property
    def offered(self) -> tuple[int, ...]:
        """The workers whose gradients are there for the open round (quorum), lowest rank first."""
        return self._read_set(_OFFERED)

    def offer(self, worker: int) -> None:
        self._kept[_OFFERED + worker // 64] |= 1 << worker % 64

    def withdraw(self, worker: int) -> None:
        """The worker has died: what it has offered counts for nothing."""
        self._kept[_OFFERED + worker // 64] &= ~(1 << worker % 64)

    def clear_offers(self) -> None:
        self._write_set(self._kept, _OFFERED, ())

    def publish(self) -> bool:
        """Show others what was appended, if anything; called when the lock's holder has done all that it does."""
        fresh = self.words[_SEEN] != self.words[_APPENDED]
        self.words[_SEEN] = self.words[_APPENDED]
        return fresh

    def _write_set(self, words: Words, start: int, members: Sequence[int]) -> None:
        masks = [0] * _SETS
        for member in members:
            masks[member // 64] |= 1 << member % 64
        for place, mask in enumerate(masks):
            words[start + place] = mask

    def _read_set(self, start: int) -> tuple[int, ...]:
        members = []
        for place in range(min(_SETS, -(-self._workers // 64))):
            mask = self.words[start + place]
            while mask:
                lowest = mask & -mask
                members.append(place * 64 + lowest.bit_length() - 1)
                mask ^= lowest
        return tuple(members)


def _place(number: int) -> int:
    return _HEADER + number % RING * _ENTRY

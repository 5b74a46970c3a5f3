"""The journal: an interrupted sequence of changes leaves nothing behind, wherever it was interrupted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.transport.journal import WORDS, Journal

SIZE = 8
Change = tuple[int, int, int]  # segment, place, value

changes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, SIZE - 1), st.integers(0, 2**64 - 1)), max_size=12)


class Killed(BaseException):
    pass


class Memory:
    """Two segments and the journal's own words; a process is killed at its ``left``-th store."""

    def __init__(self) -> None:
        self.left = -1
        self.journal_words = self._words(WORDS)
        self.segments = [self._words(SIZE), self._words(SIZE)]

    def _words(self, count: int) -> memoryview[int]:
        return memoryview(bytearray(8 * count)).cast("Q")

    def process(self) -> Journal:
        journal = Journal(Counting(self.journal_words, self.tick))  # type: ignore[arg-type]
        for number, words in enumerate(self.segments):
            journal.map(number, Counting(words, self.tick))  # type: ignore[arg-type]
        return journal

    def tick(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise Killed

    def contents(self) -> list[list[int]]:
        return [list(words) for words in self.segments]


class Counting:
    """Words of which each store is counted, before it is made."""

    def __init__(self, words: memoryview[int], tick: Callable[[], None]) -> None:
        self._words, self._tick = words, tick

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        return Counting(self._words[place], self._tick) if isinstance(place, slice) else self._words[place]

    def __setitem__(self, place: int, value: int) -> None:
        self._tick()
        self._words[place] = value


def apply(journal: Journal, wanted: list[Change]) -> None:
    watched = [journal.watch(segment, 0, SIZE) for segment in range(2)]
    for segment, place, value in wanted:
        watched[segment][place] = value


@given(changes, changes)
def test_a_process_killed_at_any_store_has_changed_all_or_nothing(first: list[Change], second: list[Change]) -> None:
    whole = Memory()
    journal = whole.process()
    apply(journal, first)
    journal.commit()
    before = whole.contents()
    apply(journal, second)
    after = whole.contents()
    moment, died = 0, True
    while died:
        memory = Memory()
        journal = memory.process()
        apply(journal, first)
        journal.commit()
        memory.left = moment
        try:
            apply(journal, second)
            journal.commit()
            died = False
        except Killed:
            pass
        memory.left = -1
        memory.process().roll_back()
        assert memory.contents() == (before if died else after)
        moment += 1


@given(changes, st.integers(0, 30))
def test_who_puts_things_back_may_be_killed_too(wanted: list[Change], moment: int) -> None:
    memory = Memory()
    apply(memory.process(), wanted)
    memory.left = moment
    try:
        memory.process().roll_back()
    except Killed:
        memory.left = -1
        memory.process().roll_back()
    assert memory.contents() == [[0] * SIZE] * 2


def test_what_was_done_is_shown_when_all_is_done_or_undone() -> None:
    journal = Memory().process()
    shown: list[int] = []
    cells = journal.watch(0, 0, SIZE)
    journal.publish.append(lambda: shown.append(cells[3]))
    cells[3] = 7
    assert shown == []
    journal.commit()
    cells[3] = 8
    journal.roll_back()
    assert shown == [7, 7]


def test_floats_are_kept_to_the_bit() -> None:
    journal = Memory().process()
    cells = journal.watch(1, 2, 4)
    for value in (0.1, -0.0, float("inf"), 5e-324):
        cells.put_float(1, value)
        assert str(cells.float_at(1)) == str(value)


def test_a_segment_that_nobody_mapped_is_our_own_fault() -> None:
    memory = Memory()
    apply(memory.process(), [(1, 0, 5)])
    with pytest.raises(AssertionError, match="does not map"):
        Journal(memory.journal_words).roll_back()

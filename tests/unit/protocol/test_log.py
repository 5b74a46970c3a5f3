"""The log against a plain list: what is appended is read back until it is RING entries old, and members are told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.config import MAX_WORKERS
from paceline.protocol.crew import crew_size, crew_word
from paceline.protocol.log import COPY, LOAD, RING, STEP, Entry, Fate, Log, words_needed


class Words(list[int]):
    """Words of 64 bits without a sign, as memory has them; nothing outside of them."""

    def __setitem__(self, index, value):  # type: ignore[no-untyped-def, override]  # words are never sliced
        assert 0 <= index < len(self)
        assert 0 <= value < 2**64
        super().__setitem__(index, int(value))

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]
        assert 0 <= index < len(self)
        return super().__getitem__(index)


def make_log(workers: int) -> tuple[Log, Words]:
    words = Words([0] * words_needed(workers))
    return Log(words, workers), words


def test_a_new_log_is_empty() -> None:
    log, _ = make_log(3)
    assert (log.appended, log.version, log.loaded, log.offered) == (0, 0, 0, ())
    assert log.fate(2) == Fate(0, 0, 0, 0)


def some_members(workers: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, workers - 1), min_size=1).map(lambda members: tuple(sorted(members)))


@st.composite
def appended(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, tuple[int, ...], int]]]:
    workers = draw(st.sampled_from([1, 2, 63, 64, 65, 128, 200, MAX_WORKERS]))
    one = st.tuples(
        st.sampled_from([STEP, COPY, LOAD]), st.integers(0, workers - 1), some_members(workers), st.integers(0, 2**40)
    )
    return workers, draw(st.lists(one, max_size=30))


@given(appended())
def test_it_is_a_list_of_entries_with_a_count_of_steps_and_of_loads(
    case: tuple[int, list[tuple[int, int, tuple[int, ...], int]]],
) -> None:
    workers, given_ = case
    log, words = make_log(workers)
    its = Log(words, workers)  # another process's view
    entries: list[Entry] = []
    fates = {worker: Fate(0, 0, 0, 0) for worker in range(workers)}
    for number, (kind, by, members, staleness) in enumerate(given_, start=1):
        version = sum(entry.kind == STEP for entry in entries) + (kind == STEP)
        expected = Entry(number, kind, by, version, staleness, members)
        assert log.append(kind, by, members, staleness) == expected
        entries.append(expected)
        fates |= {member: Fate(number, version, by, len(members)) for member in members}
        assert (its.appended, its.version) == (number, version)
        assert its.loaded == max((entry.number for entry in entries if entry.kind == LOAD), default=0)
    assert [its.entry(number) for number in range(1, len(entries) + 1)] == entries
    assert {worker: its.fate(worker) for worker in range(workers)} == fates


@given(st.lists(st.tuples(st.integers(0, 2**39), st.integers(0, 64)), max_size=2 * RING), st.data())
def test_an_entry_has_its_crew_and_the_log_tells_since_when_crews_are_as_large(
    crews: list[tuple[int, int]], data: st.DataObject
) -> None:
    log, words = make_log(2)
    its = Log(words, 2)
    given_ = [crew_word(*crew) for crew in sorted(crews)]
    for crew in given_:
        assert log.append(STEP, 0, (0,), 3, crew).crew == crew
    newest = range(max(1, len(given_) - RING + 1), len(given_) + 1)
    assert [its.entry(number).crew for number in newest] == [given_[number - 1] for number in newest]
    assert all(its.entry(number).kind == STEP for number in newest)
    since, size = its.crew
    assert {crew_size(crew) for crew in given_[max(since, 1) - 1 :]} <= {size}
    assert since <= 1 or crew_size(given_[since - 2]) != size


def test_the_ring_keeps_the_newest_entries_only() -> None:
    log, _ = make_log(2)
    entries = [log.append(STEP, number % 2, (number % 2,), number) for number in range(3 * RING + 5)]
    assert [log.entry(entry.number) for entry in entries[-RING:]] == entries[-RING:]
    assert log.entry(entries[-RING - 1].number) != entries[-RING - 1]
    assert RING > MAX_WORKERS  # one entry a worker may be unapplied


def test_an_entry_is_in_the_log_only_once_it_is_written() -> None:
    """Who reads without the lock must never find half an entry under a number that is said to be there."""
    seen: list[tuple[int, int]] = []

    class Watched(Words):
        def __setitem__(self, index, value):  # type: ignore[no-untyped-def, override]
            super().__setitem__(index, value)
            its = Log(Words(self), 2)
            seen.append((its.appended, its.entry(1).by if its.appended else -1))
            if its.appended:
                assert its.entry(1) == Entry(1, STEP, 1, 1, 7, (0, 1))
                assert its.fate(0) == its.fate(1) == Fate(1, 1, 1, 2)
                assert its.version == 1

    Log(Watched([0] * words_needed(2)), 2).append(STEP, 1, (0, 1), 7)
    assert seen[-1] == (1, 1)
    assert len([appended for appended, _ in seen if appended]) == 1


@settings(max_examples=60)
@given(st.sampled_from([1, 64, 65, 130, MAX_WORKERS]).flatmap(lambda n: st.tuples(st.just(n), some_members(n))))
def test_offers_are_a_set_until_they_are_cleared(case: tuple[int, Sequence[int]]) -> None:
    workers, members = case
    log, words = make_log(workers)
    for member in reversed(members):
        log.offer(member)
        log.offer(member)
    assert log.offered == Log(words, workers).offered == tuple(members)
    assert log.appended == log.version == 0
    log.append(STEP, 0, (0,))
    assert log.offered == tuple(members)
    log.clear_offers()
    assert log.offered == ()


@pytest.mark.parametrize("workers", [1, 2, 64, 65, MAX_WORKERS])
def test_every_worker_may_be_a_member_and_has_a_fate_of_its_own(workers: int) -> None:
    log, _ = make_log(workers)
    log.append(STEP, workers - 1, range(workers))
    assert log.entry(1).members == tuple(range(workers))
    for worker in range(workers):
        log.append(COPY, worker, (worker,))
    assert [log.fate(worker).number for worker in range(workers)] == list(range(2, workers + 2))
    assert {log.fate(worker).version for worker in range(workers)} == {1}


def test_what_the_dead_have_offered_is_withdrawn() -> None:
    log, _ = make_log(70)
    for worker in (0, 5, 66):
        log.offer(worker)
    log.withdraw(66)
    log.withdraw(1)
    assert log.offered == (0, 5)


def test_an_entry_is_seen_once_it_is_published() -> None:
    log, words = make_log(2)
    reader = Log(words, 2)
    assert not log.publish()
    log.append(STEP, 0, (0,))
    assert (log.appended, reader.seen) == (1, 0)
    assert log.publish()
    assert reader.seen == 1

"""The ledger: every batch of an epoch counts once, whatever the workers do and in whatever order."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.ledger import RING, Ledger, words_needed


def make(workers: int) -> Ledger:
    return Ledger([0] * words_needed(workers), workers)


class Worker:
    """A loader that draws up to ``ahead`` batches before it gives them to a script, which pushes now and then."""

    def __init__(self, ledger: Ledger, rank: int, ahead: int, total: int) -> None:
        self.ledger, self.rank, self.ahead, self.total = ledger, rank, ahead, total
        self.drawn: list[int] = []
        self.begun: list[int] = []
        self.counted: list[int] = []
        self.empty = False

    @property
    def done(self) -> bool:
        return self.empty and not self.drawn

    def act(self, random_: random.Random) -> None:
        if not self.empty and len(self.drawn) <= self.ahead:
            lease = self.ledger.draw(self.rank, self.total)
            if lease is None:
                self.empty = True
            else:
                self.drawn.append(lease)
        elif self.drawn:
            lease = self.drawn.pop(0)
            if self.ledger.begin(self.rank):
                self.begun.append(lease)
        if self.begun and random_.random() < 0.5:
            self.push()

    def push(self) -> None:
        self.ledger.commit(self.rank)
        self.counted += self.begun
        self.begun = []


@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 4), st.integers(0, 2**32))
def test_every_batch_counts_once_an_epoch(workers: int, total: int, ahead: int, seed: int) -> None:
    random_, ledger = random.Random(seed), make(workers)
    for epoch in range(3):
        present = list(range(workers))
        those = [Worker(ledger, rank, random_.randint(0, ahead), total) for rank in present]
        for one in random_.sample(those, workers):
            ledger.open(epoch, one.rank, present)
        while not all(one.done for one in those):
            random_.choice(those).act(random_)
        for one in those:
            one.push()
        assert Counter(lease for one in those for lease in one.counted) == Counter(range(total))
        assert ledger.committed == total


@given(st.integers(1, 6), st.integers(6, 30), st.integers(0, 2**32))
def test_everyone_gets_a_batch_where_there_are_enough(workers: int, total: int, seed: int) -> None:
    ledger, present = make(workers), list(range(workers))
    for rank in present:
        ledger.open(0, rank, present)
    random_ = random.Random(seed)
    greedy = random_.randrange(workers)
    while ledger.draw(greedy, total) is not None:
        pass
    assert all(ledger.draw(rank, total) is not None for rank in present if rank != greedy)


def test_nothing_is_kept_for_those_who_have_left() -> None:
    ledger = make(3)
    ledger.open(0, 0, [0, 2])
    ledger.open(0, 2, [0, 2])
    assert sorted(lease for _ in range(3) if (lease := ledger.draw(0, 4)) is not None) == [0, 2, 3]
    assert ledger.draw(0, 4) is None
    assert ledger.draw(2, 4) == 1


def test_what_is_given_back_is_there_for_others_in_order() -> None:
    ledger = make(2)
    for rank in (0, 1):
        ledger.open(0, rank, [0, 1])
    assert [ledger.draw(0, 10) for _ in range(4)] == [0, 2, 3, 4]
    assert ledger.begin(0)
    ledger.give_back(0, begun=False)
    assert [ledger.draw(1, 10) for _ in range(5)] == [1, 2, 3, 4, 5]
    ledger.give_back(0, begun=True)
    assert ledger.draw(1, 10) == 0


def test_what_is_kept_for_a_worker_that_leaves_goes_to_the_others() -> None:
    ledger = make(2)
    for rank in (0, 1):
        ledger.open(0, rank, [0, 1])
    ledger.give_back(1, begun=False)
    assert {ledger.draw(0, 3) for _ in range(3)} == {0, 1, 2}


def test_at_the_tail_what_is_not_begun_is_taken_from_the_end_and_once() -> None:
    ledger = make(3)
    for rank in (0, 1, 2):
        ledger.open(0, rank, [0, 1, 2])
    assert [ledger.draw(0, 6) for _ in range(4)] == [0, 3, 4, 5]
    assert ledger.begin(0)
    assert [ledger.draw(1, 6) for _ in range(3)] == [1, 5, 4]
    assert ledger.begin(1)
    assert [ledger.draw(2, 6) for _ in range(3)] == [2, 3, None]
    assert [ledger.begin(2), ledger.begin(2)] == [True, True]
    assert [ledger.begin(0) for _ in range(3)] == [False, False, False]
    assert ledger.draw(0, 6) is None  # what was taken once stays where it is


def test_a_batch_that_is_secured_is_taken_by_nobody() -> None:
    ledger = make(2)
    ledger.open(0, 0, [0, 1])
    ledger.open(0, 1, [0, 1])
    assert [ledger.draw(0, 5), ledger.draw(0, 5), ledger.draw(0, 5)] == [0, 2, 3]
    assert ledger.begin(0)
    assert ledger.secure(0, 5) == (True, None)  # the second
    assert [ledger.draw(1, 5) for _ in range(4)] == [1, 4, 3, None]
    assert [ledger.begin(1) for _ in range(3)] == [True] * 3
    assert [ledger.begin(0), ledger.begin(0)] == [True, False]
    assert ledger.secure(0, 5) == (False, None)  # what the other has taken is not taken back


def test_who_has_drawn_none_draws_to_have_one_secured() -> None:
    ledger = make(2)
    ledger.open(0, 0, [0])
    assert ledger.draw(0, 3) == 0
    assert ledger.begin(0)
    assert ledger.secure(0, None) == (False, None)
    assert ledger.secure(0, 3) == (True, 1)
    assert ledger.secure(0, 3) == (True, None)
    assert [ledger.draw(1, 3), ledger.draw(1, 3)] == [2, None]
    assert ledger.begin(0)
    assert ledger.secure(0, 3) == (True, 2)  # the other has not begun it
    assert not ledger.begin(1)


def test_a_stream_gets_no_batch_that_it_has_passed() -> None:
    ledger = make(2)
    for rank in (0, 1):
        ledger.open(0, rank, [0, 1])
    assert [ledger.draw(1, None, 0), ledger.draw(1, None, 2)] == [1, 2]
    ledger.give_back(1, begun=False)
    assert ledger.draw(0, None, 0) == 0
    assert ledger.draw(0, None, 2) == 2
    assert ledger.draw(0, None, 3) == 3


def test_what_lies_behind_the_end_of_a_stream_is_not_taken_for_what_is_begun_next() -> None:
    ledger = make(1)
    ledger.open(0, 0, [0])
    assert [ledger.draw(0, None, 0), ledger.draw(0, None, 1)] == [0, 1]
    assert ledger.begin(0)
    ledger.drop(0)
    assert ledger.draw(0, None, 2) == 2
    assert ledger.begin(0)
    ledger.give_back(0, begun=False)
    assert ledger.returned == 0


def test_a_pass_without_end_does_not_fill_the_ledger() -> None:
    ledger = make(1)
    ledger.open(0, 0, [0])
    for ordinal in range(3 * RING):
        assert ledger.draw(0, None, ordinal) == ordinal
        assert ledger.begin(0)
    ledger.commit(0)
    assert ledger.committed == 3 * RING


def test_to_draw_more_ahead_than_there_is_room_for_is_our_own_fault() -> None:
    ledger = make(1)
    ledger.open(0, 0, [0])
    for ordinal in range(RING):
        ledger.draw(0, None, ordinal)
    with pytest.raises(AssertionError, match="ahead"):
        ledger.draw(0, None, RING)


def test_what_a_dead_worker_had_is_there_for_others_but_what_counts() -> None:
    ledger = make(2)
    ledger.open(0, 0, [0, 1])
    assert [ledger.draw(0, 8) for _ in range(4)] == [0, 2, 3, 4]
    assert ledger.begin(0)
    assert ledger.begin(0)
    place = ledger.begun(0)
    assert ledger.begin(0)
    ledger.commit(0, place)  # its last push came after two of the three
    assert ledger.committed == 2
    ledger.commit(0, place)
    assert ledger.committed == 2
    ledger.give_back(0, begun=True)
    assert ledger.returned == 2
    ledger.open(0, 0, [0, 1])
    assert [ledger.draw(0, 8) for _ in range(3)] == [3, 4, 5]


@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 40))
def test_what_is_left_can_be_dealt_to_others(workers: int, total: int, ahead: int, seed: int, turns: int) -> None:
    """A ledger stopped in the middle, and another for more workers filled with what it had left."""
    random_ = random.Random(seed)
    ledger = make(workers)
    everybody = [Worker(ledger, rank, ahead, total) for rank in range(workers)]
    for rank in range(workers):
        ledger.open(0, rank, range(workers))
    for _ in range(turns):
        random_.choice(everybody).act(random_)
    counted = [ordinal for worker in everybody for ordinal in worker.counted]
    epoch, first, before, committed = ledger.left()
    other = make(workers + 1)
    assert other.is_new
    other.refill(epoch, first, before, committed)
    assert not other.is_new
    assert other.committed == len(counted)
    assert other.left() == (epoch, first, before, committed)
    found = []
    for rank in range(workers + 1):
        other.open(0, rank, range(workers + 1))
    while (ordinal := other.draw(0, total)) is not None:
        found.append(ordinal)
    assert sorted([*counted, *found]) == list(range(total))


def test_when_the_ring_is_full_one_makes_room_for_one() -> None:
    ledger = make(1)
    ledger.open(0, 0, [])
    for ordinal in range(RING):
        ledger.draw(0, None, ordinal)
    assert [ledger.begin(0) for _ in range(3)] == [True] * 3
    ledger.draw(0, None, RING)
    assert ledger.committed == 1


def test_what_another_has_taken_is_not_counted_when_the_ring_is_full() -> None:
    ledger = make(2)
    ledger.open(0, 0, [])
    for _ in range(RING):
        ledger.draw(0, RING)
    assert ledger.draw(1, RING) == RING - 1
    assert [ledger.begin(0) for _ in range(RING)] == [True] * (RING - 1) + [False]
    for ordinal in range(RING, 2 * RING):
        ledger.draw(0, None, ordinal)
    assert ledger.committed == RING - 1


def test_as_many_can_come_back_as_the_rings_hold() -> None:
    ledger = make(1)
    ledger.open(0, 0, [])
    for ordinal in range(RING):
        ledger.draw(0, None, ordinal)
    ledger.give_back(0, begun=False)
    assert ledger.returned == RING
    assert ledger.draw(0, None, RING) == RING  # a stream that is past what came back
    with pytest.raises(AssertionError, match="room"):
        ledger.give_back(0, begun=False)


def test_as_many_are_taken_from_another_run_as_there_is_room_for() -> None:
    ledger = make(1)
    ledger.refill(0, RING, range(RING), 0)
    assert ledger.returned == RING
    with pytest.raises(ValueError, match="1025 batches were out, 1024 can be taken back"):
        make(1).refill(0, RING + 1, range(RING + 1), 0)


def test_a_pass_begins_with_nothing_of_another() -> None:
    """A script that goes through its loader twice at once: what the first pass had in hand is not the second's."""
    ledger = make(1)
    ledger.open(0, 0, [0])
    assert [ledger.draw(0, 3), ledger.draw(0, 3)] == [0, 1]
    assert ledger.begin(0)
    ledger.open(1, 0, [0])
    assert ledger.draw(0, 3) == 0
    assert ledger.begin(0)
    ledger.commit(0)
    assert ledger.committed == 1

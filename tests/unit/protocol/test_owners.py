"""Claims about owners of folds, in protocol/owners.py: how values are shared out, and what is folded when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.link import Senseless
from paceline.protocol.owners import Gathering, cut, share

CELLS = (0, 2, 3)  # cell 1 is so small that this owner has no share of it


@given(start=st.integers(0, 1000), size=st.integers(0, 5000), most=st.integers(1, 700), owners=st.integers(1, 9))
def test_every_value_is_in_one_share_of_one_cell(start: int, size: int, most: int, owners: int) -> None:
    cells = cut(start, start + size, most)
    assert all(stop - first <= most for first, stop in cells)
    shares = [share(*cell, owner, owners) for cell in cells for owner in range(owners)]
    assert [place for first, stop in shares for place in range(first, stop)] == list(range(start, start + size))


@given(size=st.integers(0, 10**6), owners=st.integers(1, 9))
def test_shares_of_a_cell_are_alike(size: int, owners: int) -> None:
    sizes = [stop - first for first, stop in (share(0, size, owner, owners) for owner in range(owners))]
    assert max(sizes) - min(sizes) <= 32


class World:
    """Of one round: what each of three members has sent last, and what member 1 has folded it to."""

    def __init__(self, number: int) -> None:
        self.gathering = Gathering(1, range(3), CELLS)
        self.number = number
        self.sent = {(member, cell): 0 for member in range(3) for cell in CELLS}  # its editions
        self.folded: dict[int, tuple[list[int], tuple[float, ...]]] = {}

    def send(self, member: int, cell: int) -> None:
        self.sent[member, cell] += 1
        self.gathering.part(member, self.number, cell)

    def now(self, cell: int) -> tuple[list[int], tuple[float, ...]]:
        return [self.sent[member, cell] for member in range(3)], self.gathering.shares

    def fold(self, between: list[tuple[int, int]] = []) -> None:  # noqa: B006
        """The next cell, while other parts come."""
        cell, ticket = self.gathering.next()
        made = self.now(cell)
        assert 0 not in made[0]
        for member, other in between:
            self.send(member, other)
        self.folded[cell] = made
        self.gathering.fold(self.number, cell, ticket, made[1])

    def fold_all(self) -> None:
        while self.gathering.has_next:
            self.fold()


parts = st.tuples(st.integers(0, 2), st.sampled_from(CELLS))


@given(
    steps=st.lists(st.one_of(parts, st.just("fold"), st.lists(parts, max_size=2)), max_size=40),
    shares=st.sampled_from([(1 / 3,) * 3, (0.5, 0.25, 0.25)]),
    early=st.booleans(),
)
def test_whoever_is_told_that_all_is_folded_has_it_of_the_last_parts_with_the_last_weights(
    steps: list[object], shares: tuple[float, ...], early: bool
) -> None:
    world = World(4)
    gathering = world.gathering
    gathering.begin(4)
    for step in steps:
        if isinstance(step, tuple):
            world.send(*step)
        elif gathering.has_next:
            world.fold(step if isinstance(step, list) else [])
        assert not gathering.is_folded
    for member in range(3):
        for cell in CELLS:
            if not world.sent[member, cell]:
                world.send(member, cell)
    if early:
        gathering.settle(4, shares)
    for member in range(3):
        world.fold_all()
        assert not gathering.is_folded
        gathering.given(member, 4)
    gathering.settle(4, shares)
    world.fold_all()
    assert gathering.is_folded
    assert world.folded == {cell: ([world.sent[member, cell] for member in range(3)], shares) for cell in CELLS}
    gathering.folded(1, 4)
    assert not gathering.is_folded  # it is told once


def test_the_fold_is_whole_when_all_have_told_so_of_this_round() -> None:
    gathering = Gathering(0, range(2), (0,))
    gathering.begin(7)
    gathering.folded(0, 7)
    gathering.folded(1, 6)
    assert not gathering.is_whole(7)
    gathering.folded(1, 7)
    assert gathering.is_whole(7)
    assert not gathering.is_whole(8)


def test_parts_of_the_next_round_may_come_before_one_is_there_and_those_of_the_last_one_late() -> None:
    gathering = Gathering(0, range(2), (0,))
    gathering.begin(7)
    gathering.part(1, 8, 0)
    gathering.part(0, 7, 0)
    assert not gathering.has_next  # the other has done with round 7
    gathering.begin(8)
    gathering.part(0, 8, 0)
    assert gathering.has_next
    cell, ticket = gathering.next()
    gathering.fold(7, cell, ticket, gathering.shares)  # begun before, with what was there then
    gathering.given(0, 8)
    gathering.given(1, 8)
    gathering.settle(7, (0.5, 0.5))
    gathering.settle(8, (0.5, 0.5))
    assert not gathering.is_folded
    gathering.part(1, 7, 0)  # it was on the way
    gathering.fold(8, cell, ticket, gathering.shares)
    assert gathering.is_folded


def test_a_round_is_off_when_one_brings_its_own_or_when_it_is_over() -> None:
    gathering = Gathering(0, range(2), (0,))
    gathering.begin(7)
    assert not gathering.is_off(7)
    gathering.off(1, 7)
    assert gathering.is_off(7)
    assert not gathering.is_off(8)
    gathering.begin(8)
    assert gathering.is_off(7)


def test_who_is_ahead_and_brings_its_own_to_the_next_round_takes_nothing_from_this_one() -> None:
    gathering = Gathering(1, (0, 1, 2), CELLS)
    gathering.begin(7)
    for member in range(3):
        gathering.folded(member, 7)
    gathering.off(2, 8)
    assert gathering.is_whole(7)
    assert not gathering.is_off(7)
    gathering.begin(8)
    assert gathering.is_off(8)
    gathering.begin(9)
    assert not gathering.is_off(9)


def test_a_round_that_was_none_is_told_by_what_comes_behind_it() -> None:
    """What it says is kept for that round, so that without it all would wait for its parts of this one."""
    for say in (
        lambda gathering, number: gathering.part(1, number, 0),
        lambda gathering, number: gathering.given(1, number),
        lambda gathering, number: gathering.folded(1, number),
        lambda gathering, number: gathering.off(1, number),
    ):
        gathering = Gathering(0, range(2), (0,))
        gathering.begin(4)
        for number in (4, 5, 4, 700):  # a round or a pass ahead
            say(gathering, number)
        say(gathering, 2**61)
        with pytest.raises(Senseless, match=f"worker 1 has spoken of round {2**61}, and now speaks of round 5"):
            say(gathering, 5)

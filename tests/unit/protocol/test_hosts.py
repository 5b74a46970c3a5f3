"""Claims about the push of a host's workers as one, in protocol/hosts.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from paceline.protocol.hosts import (
    LEAVES,
    alone,
    are_together,
    arrived,
    asked_for,
    awaits,
    comes_to,
    has_version,
    is_one,
    is_pushed,
    is_there,
    offer,
    pushed_for,
    sent,
    version,
)
from paceline.protocol.rounds import NORMS, Waiting
from tests.unit.protocol.test_rounds import board

MEMBERS, ROUND = (2, 3), 7
NOBODY = [0, 0, 0, 0]


@dataclass
class Words:
    """Of an exchange, by worker; the round before is over."""

    pushed: list[int]
    asked: list[int]
    answered: list[int]
    since: list[int]
    offered: list[int]


@dataclass
class Header:
    """Of a slot: the round it is of, and where its gradient lies."""

    number: int = 0
    place: int | None = None

    def lies_in(self, number: int) -> int | None:
        return self.place if number == self.number else None


def ask(third: int, fourth: int, *, parked: str = "0000", gone: str = "0000", deaths: list[int] = NOBODY) -> object:
    answer = are_together(ROUND, MEMBERS, [0, 0, third, fourth], deaths, board(gone, parked, loader0="0001"))
    return answer.on if isinstance(answer, Waiting) else answer


def test_a_host_pushes_as_one_when_all_of_it_have_offered() -> None:
    assert ask(offer(ROUND), offer(ROUND)) is True
    assert ask(offer(ROUND), offer(ROUND - 1)) == 3
    assert ask(0, offer(ROUND)) == 2


@pytest.mark.parametrize("other", [alone(ROUND), LEAVES])
def test_not_when_one_brings_its_own_or_has_left(other: int) -> None:
    assert ask(offer(ROUND), other) is False
    assert ask(0, other) is False  # nor is the rest waited for


def test_not_when_one_is_parked_or_gone_or_has_ever_died() -> None:
    assert ask(offer(ROUND), 0, parked="0001") is False
    assert ask(offer(ROUND), 0, gone="0001") is False
    assert ask(offer(ROUND), offer(ROUND), deaths=[0, 0, 0, 1]) is False
    assert ask(offer(ROUND), offer(ROUND), deaths=[1, 0, 0, 0]) is True  # that is another host's
    assert not is_one(MEMBERS, NOBODY, [0, 0, 1, 0])
    assert not is_one(MEMBERS, [0, 0, 0, LEAVES], NOBODY)
    assert is_one(MEMBERS, [LEAVES, 0, offer(3), alone(4)], [1, 1, 0, 0])


def test_the_leads_store_is_the_push_of_all_of_them() -> None:
    before, after = [ROUND, ROUND, ROUND - 1, ROUND - 1], [ROUND, ROUND, ROUND, ROUND - 1]
    slots = [Header(ROUND), Header(ROUND), Header(ROUND, 2), Header(ROUND, 2)]
    offered = [0, 0, offer(ROUND), offer(ROUND)]
    assert not is_pushed(3, ROUND, before, slots)
    assert is_pushed(3, ROUND, after, slots)
    assert [pushed_for(3, offered, pushed, slots) for pushed in (before, after)] == [ROUND - 1, ROUND]
    assert pushed_for(0, offered, after, slots) == ROUND


def test_what_a_lead_said_that_died_before_its_push_is_not_taken_for_one() -> None:
    # The next process in its place has pushed the round, with a gradient of its own.
    slots = [Header(ROUND), Header(ROUND), Header(ROUND, None), Header(ROUND, 2)]
    assert not is_pushed(3, ROUND, [ROUND, ROUND, ROUND, 0], slots)
    # Nor is an offer that was taken back, or one of a round before.
    slots[2] = Header(ROUND, 2)
    assert pushed_for(3, [0, 0, 0, alone(ROUND)], [ROUND, ROUND, ROUND, ROUND - 1], slots) == ROUND - 1
    assert pushed_for(3, [0, 0, 0, LEAVES], [ROUND, ROUND, ROUND, ROUND - 1], slots) == ROUND - 1
    assert pushed_for(3, [0, 0, 0, offer(ROUND - 2)], [ROUND, ROUND, ROUND, ROUND - 1], slots) == ROUND - 1


def test_norms_of_a_round_are_offered_before_its_push() -> None:
    first, second = ROUND * NORMS + 1, ROUND * NORMS + 2
    words = [offer(ROUND - 1), offer(ROUND, first), offer(ROUND, second), offer(ROUND), offer(ROUND + 1, first + NORMS)]
    assert words == sorted(set(words))
    own = [0, 0, offer(ROUND, first), offer(ROUND, second)]
    answer = are_together(ROUND, MEMBERS, own, NOBODY, board("0000", "0000", loader0="0001"), first)
    assert isinstance(answer, Waiting)
    assert answer.on == 3
    own[3] = offer(ROUND, first)
    assert are_together(ROUND, MEMBERS, own, NOBODY, board("0000", "0000", loader0="0001"), first) is True
    own[2] = alone(ROUND, first)
    assert are_together(ROUND, MEMBERS, own, NOBODY, board("0000", "0000", loader0="0001"), first) is False
    assert [comes_to(ROUND, 3, [0, 0, 0, word]) for word in (own[3], offer(ROUND), alone(ROUND))] == [False, True, True]


def test_a_norm_that_was_asked_as_one_is_no_push() -> None:
    norm = ROUND * NORMS + 1
    slots = [Header(ROUND), Header(ROUND), Header(ROUND, 2), Header(ROUND, 2)]
    asked = [0, 0, norm, 0]
    assert is_pushed(3, ROUND, asked, slots, norm)
    assert not is_pushed(3, ROUND, asked, slots, norm + 1)
    assert pushed_for(3, [0, 0, 0, offer(ROUND, norm)], [ROUND - 1] * 4, slots) == ROUND - 1


def test_a_norm_that_a_host_asks_as_one_is_asked_by_all_of_its_workers() -> None:
    """Also by worker 3, which dies before it says so itself."""
    norm, before = ROUND * NORMS + 1, (ROUND - 1) * NORMS + 1
    slots = [Header(ROUND), Header(ROUND), Header(ROUND, 2), Header(ROUND, 2)]
    asked = [0, 0, norm, before]
    assert asked_for(3, [0, 0, 0, offer(ROUND, norm)], asked, slots) == norm
    assert asked_for(3, [0, 0, 0, offer(ROUND, norm + 1)], asked, slots) == before
    assert asked_for(3, [0, 0, 0, alone(ROUND, norm)], asked, slots) == before
    assert asked_for(3, [0, 0, 0, offer(ROUND)], asked, slots) == before
    assert asked_for(3, [0, 0, 0, LEAVES], asked, slots) == before


def test_no_offer_reads_as_what_one_brings_alone() -> None:
    words = [word(0, number) for number in range(1, 9) for word in (alone, offer)]
    assert len(set(words)) == len(words)


def test_versions_rise_with_rounds_and_with_what_is_loaded() -> None:
    assert 0 < version(0, 0) < version(1, 0) < version(1, 1) < version(2, 1)


def test_nothing_is_sent_before_what_was_sent_over_another_link_is_there() -> None:
    before, newest = version(4, 0), version(5, 0)
    assert is_there(0) is True  # nothing was sent yet
    for over in (0, 3):
        answer = is_there(sent(newest, over))
        assert isinstance(answer, Waiting)
        assert answer.on == over
    assert is_there(arrived(newest)) is True
    assert [has_version(word, newest) for word in (0, arrived(before), sent(before, 3))] == [False] * 3
    assert [has_version(word, newest) for word in (sent(newest, 0), arrived(newest))] == [True] * 2


BEFORE, FIRST = (ROUND - 1) * NORMS + 1, ROUND * NORMS + 1  # norms


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"pushed": [ROUND - 1, ROUND]}, True),
        ({"offered": [0, offer(ROUND)]}, True),  # its host is to push it
        ({"offered": [0, alone(ROUND)]}, True),
        ({"offered": [LEAVES, LEAVES]}, False),
        ({"offered": [0, offer(ROUND - 1)]}, False),
        ({"asked": [BEFORE, FIRST]}, True),
        ({"offered": [0, offer(ROUND, FIRST)]}, True),
        ({"asked": [FIRST, FIRST]}, False),  # this one has come there too
        ({"asked": [BEFORE, FIRST], "offered": [offer(ROUND, FIRST), 0]}, False),
        ({"asked": [BEFORE, FIRST], "answered": [BEFORE, FIRST]}, False),  # it has gone on
        ({"asked": [BEFORE, FIRST], "since": [0, ROUND + 1]}, False),  # it was another process that did
    ],
    ids=str,
)
def test_who_stands_where_another_has_not_come_awaits_it(changes: dict[str, list[int]], expected: bool) -> None:
    words = {"pushed": [ROUND - 1] * 2, "asked": [BEFORE] * 2, "answered": [BEFORE] * 2, "since": [0, 0]}
    assert awaits(1, 0, ROUND, Words(**({"offered": [0, 0]} | words | changes))) is expected

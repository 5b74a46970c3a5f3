"""Law 8: who stands at the tail of a deal goes on when all stand, to another deal if somebody was given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.deals import ALL, Deal, Dealt, deal_over, may_settle, more_of_pass, place_at_tail
from paceline.protocol.rounds import AWAY, EMPTY, LEFT, Closed, Waiting, close_round, next_to_act, parked_at
from tests.unit.protocol.test_rounds import Lists, board


def at_tail(gone: str = "000", *, empty: bool = False, deal: int = 0) -> Lists:
    """Worker 1 is at the tail of a deal of its first pass over loader 0, the others are in that pass."""
    where = board(gone, "000", loader0="000")
    where.deals[0] = deal
    where.parked[1] = place_at_tail(0, deal, is_empty=empty)
    return where


@pytest.mark.parametrize("deal", [0, 3])
@pytest.mark.parametrize("empty", [False, True])
def test_who_is_at_a_tail_waits_for_all_who_are_not_gone_for_good(deal: int, empty: bool) -> None:
    where = at_tail(deal=deal, empty=empty)
    assert parked_at(where.parked[1]) == 0
    assert more_of_pass(1, where) == Waiting(9 if empty else 0, "worker 0 has not finished its part of the data")
    where.gone[0], where.parked[2] = AWAY, place_at_tail(0, deal, is_empty=False)
    assert isinstance(more_of_pass(1, where), Waiting)
    where.gone[0] = LEFT
    assert more_of_pass(1, where) is False
    where.lost[0] = 1
    assert more_of_pass(1, where) is True


def test_who_arrives_counts_as_standing() -> None:
    where = at_tail("001")
    assert deal_over(0, 1, 0, where) is False
    assert deal_over(0, 1, None, where) == Waiting(0, "worker 0 has not finished its part of the data")


def test_who_is_about_to_leave_holds_nobody_up() -> None:
    where = at_tail("001")
    assert deal_over(0, 1, None, where, leaving=[0]) is False
    where.lost[0] = 1
    assert deal_over(0, 1, None, where, leaving=[0]) is True


def test_a_tail_of_an_older_deal_is_not_one_of_the_newest() -> None:
    where = at_tail("001")
    where.parked[0], where.deals[0] = place_at_tail(0, 1, is_empty=False), 1
    assert more_of_pass(1, where) is True
    assert isinstance(more_of_pass(0, where), Waiting)


def test_who_is_at_a_tail_of_the_pass_before_is_still_in_that() -> None:
    # Worker 1 was let go on by law 4, and has come to the tail of the next pass, whose deal has the same number.
    where = at_tail("001")
    where.parked[0], where.finished[0] = place_at_tail(0, 0, is_empty=False), [0, 1, 0]
    assert deal_over(0, 2, None, where) == Waiting(0, "worker 0 has not finished its part of the data")
    assert deal_over(0, 1, None, where) is False


def test_what_is_lost_of_one_pass_is_not_of_another() -> None:
    where = at_tail("001")
    where.finished[0] = [1, 0, 0]
    where.parked[0], where.parked[1] = place_at_tail(0, 2, is_empty=False), place_at_tail(0, 5, is_empty=False)
    where.deals, where.lost = [5, 2, 0, 0], [0, 1, 1, 1]
    assert deal_over(0, 1, None, where) is False
    where.finished[0] = [1, 1, 0]
    where.parked[1] = place_at_tail(0, 2, is_empty=False)
    assert deal_over(0, 2, None, where) is True
    where.deals[0] = 6
    assert more_of_pass(1, where) is True  # as it is due
    where.lost[1] = 0
    assert more_of_pass(1, where) is False
    where.deals[1] = 3
    assert more_of_pass(1, where) is True


def test_a_pass_is_settled_when_the_one_two_before_it_is_over() -> None:
    where = board("001", "000", loader0="021")
    assert [may_settle(0, number, where) for number in range(4)] == [True, True, False, False]
    where.finished[0] = [1, 2, 0]
    assert [may_settle(0, number, where) for number in range(4)] == [True, True, True, False]
    where.gone[0] = AWAY
    assert not may_settle(0, 3, where)
    where.gone[0] = LEFT
    assert may_settle(0, 3, where)


def test_who_stands_at_a_tail_goes_on_when_its_pass_is_said_to_be_drained() -> None:
    where = at_tail("001")  # worker 0 may have joined since
    where.drained[0] = 1
    assert more_of_pass(1, where) is False


def test_who_has_left_the_pass_must_be_parked_before_another_deal_is_made() -> None:
    where = at_tail("001")
    where.finished[0] = [1, 0, 0]
    assert more_of_pass(1, where) is False
    where.lost[0] = 1
    assert more_of_pass(1, where) == Waiting(0, "worker 0 has left the pass, and may be about to step")
    where.parked[0] = 1
    assert more_of_pass(1, where) is True


def test_rounds_excuse_who_is_at_a_tail_until_there_is_another_deal() -> None:
    where = at_tail("001")
    assert close_round(3, [3, 2, 2], where, [1, 1, 1], [0, 0, 0]) == Closed((0,))
    where.deals[0] = 1
    assert close_round(3, [3, 2, 2], where, [1, 1, 1], [0, 0, 0]) == Waiting(1, "worker 1 has not pushed round 3")
    where.deals[0], where.drained[0] = 0, 1
    assert isinstance(close_round(3, [3, 2, 2], where, [1, 1, 1], [0, 0, 0]), Waiting)


def test_servers_wait_for_who_is_to_go_on_with_another_deal() -> None:
    where = at_tail("101")
    assert next_to_act(where) == where.common
    where.deals[0] = 1
    assert next_to_act(where) == 1


def test_who_had_nothing_goes_on_when_another_evaluates_there() -> None:
    where = at_tail(empty=True)
    where.evaluated[0] = 1
    assert more_of_pass(1, where) is False
    where.parked[1] -= EMPTY
    assert isinstance(more_of_pass(1, where), Waiting)


def test_another_deal_is_made_also_for_who_had_nothing() -> None:
    where = at_tail("101", empty=True)
    where.lost[0] = 1
    assert more_of_pass(1, where) is True


def test_the_deals_of_a_pass_follow_from_who_was_out_where() -> None:
    # Deals 4 to 6. Worker 3 was lost in the first after two batches, worker 0 in the second after one; worker 5 had
    # left the pass by then.
    dealt = Dealt(4, 6, (0, 1, 3, 5), {3: (4, 2), 5: (4, ALL), 0: (5, 1)})
    assert dealt.sharers_of(4) == (0, 1, 3, 5)
    assert dealt.sharers_of(5) == (0, 1)
    assert dealt.sharers_of(6) == (1,)
    assert dealt.part(1, 4) == Deal(1, 4)
    assert dealt.part(1, 5) == Deal(1, 2, ((ALL, ALL, 2, ALL),))
    assert dealt.part(1, 6) == Deal(0, 1, ((ALL, ALL, 2, ALL), (1, ALL)))
    assert [dealt.is_in(worker) for worker in range(6)] == [False, True, False, False, False, False]
    assert dealt.part(2, 6).rank == dealt.part(3, 6).rank == -1


@given(st.integers(0, 1023), st.integers(0, 1 << 20), st.booleans())
def test_a_place_at_a_tail_tells_loader_and_deal(loader: int, deal: int, empty: bool) -> None:
    where = board("0", "0")
    where.deals, where.lost, where.drained = [deal] * 2048, [0] * 2048, [0] * 1024
    where.parked[0] = place_at_tail(loader, deal, is_empty=empty)
    assert parked_at(where.parked[0]) == loader
    assert deal_over(loader, 1, None, where) is False

"""Examples of when a round closes and when the end of a pass opens; tests/simulation has the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.rounds import (
    AWAY,
    EMPTY,
    NEVER,
    NORMS,
    TAIL,
    Abandoned,
    Closed,
    Rescue,
    Waiting,
    all_stepped,
    at_work,
    barrier_open,
    close_round,
    held_at_end,
    holding,
    is_drained,
    is_over,
    more_at_tail,
    next_to_act,
    quorum_met,
    reached,
    within_bound,
)

NONE = [0] * 4  # nobody has come later than the first round, or asked for a norm


@dataclass
class Lists:
    """A board of plain lists, for two loaders."""

    gone: list[int]
    parked: list[int]
    finished: dict[int, list[int]] = field(default_factory=dict)
    evaluated: list[int] = field(default_factory=lambda: [0, 0])
    returned: list[int] = field(default_factory=lambda: [0, 0])
    drained: list[int] = field(default_factory=lambda: [0, 0])
    deals: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    lost: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    common: int = 9
    joins: int = 0

    @property
    def width(self) -> int:
        return len(self.gone)

    def passes(self, loader: int) -> list[int]:
        return self.finished.get(loader, [0] * len(self.gone))


def board(gone: str, parked: str, **finished: str) -> Lists:
    """Columns as digits, one a worker; ``loader0="110"`` are the passes over loader 0."""
    columns = {int(name.removeprefix("loader")): [int(d) for d in digits] for name, digits in finished.items()}
    return Lists([int(d) for d in gone], [int(d) for d in parked], columns)


@pytest.mark.parametrize(
    ("pushed", "where", "contributors"),
    [
        pytest.param("3", board("0", "0"), (0,), id="alone"),
        pytest.param("333", board("000", "000"), (0, 1, 2), id="all have pushed"),
        pytest.param("323", board("010", "000"), (0, 2), id="one is gone"),
        pytest.param("303", board("010", "010", loader0="000"), (0, 2), id="one is gone while parked"),
        pytest.param("323", board("000", "010", loader0="010"), (0, 2), id="one is parked, held by the others"),
        pytest.param("322", board("000", "011", loader0="011"), (0,), id="two are parked, held by the one that pushed"),
        pytest.param("322", board("000", "012", loader0="010", loader1="001"), (0,), id="parked at different loaders"),
        pytest.param("232", board("001", "100", loader0="100"), (1,), id="one gone, one parked"),
        pytest.param("343", board("000", "000"), (0, 1, 2), id="a push is never taken back"),
    ],
)
def test_a_round_closes_with_those_who_pushed_it(pushed: str, where: Lists, contributors: tuple[int, ...]) -> None:
    assert close_round(3, [int(d) for d in pushed], where, NONE, NONE) == Closed(contributors)


@pytest.mark.parametrize(
    ("pushed", "where", "on"),
    [
        pytest.param("323", board("000", "000"), 1, id="one computes"),
        pytest.param("322", board("000", "000"), 1, id="two compute: the first is named"),
        pytest.param("322", board("010", "000"), 2, id="one is gone, one computes"),
        pytest.param("323", board("000", "010", loader0="111"), 1, id="parked where all have finished: it comes back"),
        pytest.param("323", board("100", "010", loader0="011"), 1, id="the one that held it has left"),
        pytest.param("322", board("000", "012", loader0="010", loader1="111"), 2, id="only one of two is held"),
    ],
)
def test_a_round_waits_for_whoever_can_still_push_it(pushed: str, where: Lists, on: int) -> None:
    answer = close_round(3, [int(d) for d in pushed], where, NONE, NONE)
    assert answer == Waiting(on, f"worker {on} has not pushed round 3")


@pytest.mark.parametrize(
    ("number", "where", "on"),
    [
        pytest.param(1, board("000", "000", loader0="111"), None, id="all have finished"),
        pytest.param(1, board("000", "000", loader0="211"), None, id="one is further"),
        pytest.param(1, board("010", "000", loader0="101"), None, id="the only one that has not is gone"),
        pytest.param(2, board("000", "000", loader0="212"), 1, id="one has not"),
        pytest.param(2, board("100", "000", loader0="011"), 1, id="one is gone, one has not"),
        pytest.param(0, board("000", "000"), None, id="nothing to wait for"),
    ],
)
def test_the_end_of_a_pass_opens_when_all_that_are_left_finished_it(number: int, where: Lists, on: int | None) -> None:
    answer = holding(0, number, where)
    assert (answer.on if answer else None) == on
    assert barrier_open(0, number, where) is (on is None)


def test_passes_over_other_loaders_do_not_count() -> None:
    where = board("00", "00", loader0="11", loader1="10")
    assert barrier_open(0, 1, where)
    assert not barrier_open(1, 1, where)


@pytest.mark.parametrize(
    ("members", "answer"),
    [
        ((0, 2), Closed((0, 2))),
        ((0, 1, 2), Waiting(1, "member 1 is not done with round 5")),
        ((3,), Waiting(3, "member 3 is not done with round 5")),
        ((), Closed(())),
    ],
)
def test_reached_looks_at_the_members_alone(members: tuple[int, ...], answer: Closed | Waiting) -> None:
    assert reached(5, [5, 4, 6, 0], members) == answer


class WhileRead(list[int]):
    """A column of which cell ``at`` changes others behind the reader's back, just after it was read."""

    def __init__(self, values: list[int], at: int, then: Callable[[], None]) -> None:
        super().__init__(values)
        self._at, self._then = at, then

    def __getitem__(self, index):  # type: ignore[no-untyped-def, override]  # a column is never sliced
        value = super().__getitem__(index)
        if index == self._at:
            self._then()
        return value


def test_a_worker_that_leaves_its_next_pass_while_it_is_looked_at_can_still_push() -> None:
    """Worker 1 has pushed round 3 and asks. Worker 0 is seen parked at the end of pass 2, which is open; between two
    reads it goes on, leaves pass 3 by a ``break`` at its first batch and is about to step outside of the loader. Its
    new number of passes must not be taken together with its old parking."""
    where = board("00", "10", loader0="22")

    def go_on() -> None:
        where.parked = [0, 0]
        where.finished[0][0] = 3

    where.parked = WhileRead(where.parked, at=0, then=go_on)
    assert close_round(3, [2, 3], where, NONE, NONE) == Waiting(0, "worker 0 has not pushed round 3")


def test_it_is_not_out_of_data_either() -> None:
    """As before, and worker 0 is asked for alone: its place is read once."""
    where = board("00", "10", loader0="22")

    def go_on() -> None:
        where.parked = [0, 0]
        where.finished[0][0] = 3

    where.parked = WhileRead(where.parked, at=0, then=go_on)
    assert isinstance(quorum_met(2, [1], where), Waiting)


def test_who_goes_on_while_another_is_looked_at_can_still_push() -> None:
    """Worker 0 is seen at the tail; then worker 2 gives a batch back, worker 0 goes on with it, and worker 2 parks."""
    where = board("000", "000")
    where.parked[0] = 1 + TAIL
    looks = iter(range(9))

    def give_back_and_park() -> None:
        if next(looks) == 1:  # the first is at the places of all
            where.parked = [0, 0, 1 + TAIL]

    where.gone = WhileRead(where.gone, at=2, then=give_back_and_park)
    assert close_round(3, [2, 3, 2], where, NONE, NONE) == Waiting(0, "worker 0 has not pushed round 3")


def test_who_had_nothing_to_read_is_excused_until_somebody_evaluates_there() -> None:
    where = board("000", "010", loader0="010")
    where.parked[1] += EMPTY
    assert close_round(3, [3, 2, 3], where, NONE, NONE) == Closed((0, 2))
    assert held_at_end(1, where) == Waiting(where.common, "worker 0 has not finished its part of the data")
    where.evaluated = [0, 1]
    assert close_round(3, [3, 2, 3], where, NONE, NONE) == Closed((0, 2))
    where.evaluated = [1, 0]
    assert close_round(3, [3, 2, 3], where, NONE, NONE) == Waiting(1, "worker 1 has not pushed round 3")
    assert held_at_end(1, where) is None


def test_who_had_nothing_to_read_goes_on_when_all_stand_and_nobody_else_can() -> None:
    where = board("000", "012", loader0="010", loader1="001")
    where.parked[1] += EMPTY
    assert isinstance(held_at_end(1, where), Waiting)
    where.gone[0] = 1
    assert held_at_end(1, where) is None
    assert isinstance(held_at_end(2, where), Waiting)


def test_all_stand_at_one_moment_or_not_at_all() -> None:
    """Worker 1 asks. Worker 0 is seen held, and is on its way when worker 2 is looked at."""
    where = board("000", "122", loader0="100", loader1="011")
    where.parked[1] += EMPTY
    assert held_at_end(1, where) is None

    def go_on() -> None:
        where.parked[0] = 0

    where.gone = WhileRead(where.gone, at=2, then=go_on)
    assert isinstance(held_at_end(1, where), Waiting)


def test_an_evaluation_seen_while_a_round_is_looked_at_excuses_nobody() -> None:
    """Worker 0 is parked empty; worker 2 evaluates and parks elsewhere just after worker 0 was looked at."""
    where = board("000", "100", loader0="100", loader1="001")
    where.parked[0] += EMPTY

    def evaluate_and_park() -> None:
        where.evaluated[0] = 1
        where.parked[2] = 2

    where.finished[0] = WhileRead(where.finished[0], at=1, then=evaluate_and_park)
    assert close_round(3, [2, 3, 2], where, NONE, NONE) == Waiting(0, "worker 0 has not pushed round 3")


def test_a_worker_that_finishes_and_leaves_while_it_is_looked_at_counts_as_done() -> None:
    where = board("00", "00", loader0="01")

    def finish_and_leave() -> None:
        where.gone[0] = 1

    where.finished[0] = WhileRead(where.finished[0], at=0, then=finish_and_leave)
    assert holding(0, 1, where) is None


@pytest.mark.parametrize(
    ("where", "worker"),
    [
        pytest.param(board("000", "000"), 0, id="all compute"),
        pytest.param(board("100", "000"), 1, id="the first is gone"),
        pytest.param(board("000", "100", loader0="100"), 1, id="the first is parked and held"),
        pytest.param(board("000", "100", loader0="111"), 0, id="the first is parked, but free to go"),
        pytest.param(board("100", "011", loader0="011"), 1, id="all that are left are parked, and free to go"),
        pytest.param(board("111", "000"), None, id="all are gone"),
    ],
)
def test_a_server_with_nothing_to_do_looks_to_one_that_can_act(where: Lists, worker: int | None) -> None:
    assert next_to_act(where) == worker


# --- deaths ---


def since(digits: str) -> list[int]:
    return [NEVER if digit == "-" else int(digit) for digit in digits]


@pytest.mark.parametrize(
    ("pushed", "begun", "answer"),
    [
        pytest.param("32", "0-", Closed((0,)), id="who has died is not waited for"),
        pytest.param("33", "0-", Closed((0, 1)), id="its push counts"),
        pytest.param("32", "04", Closed((0,)), id="a newcomer counts from a later round"),
        pytest.param("32", "03", Waiting(1, "worker 1 has not pushed round 3"), id="a newcomer counts from this one"),
    ],
)
def test_a_round_and_the_dead(pushed: str, begun: str, answer: Closed | Waiting) -> None:
    where = board("02" if begun == "0-" else "00", "00")
    assert close_round(3, [int(d) for d in pushed], where, since(begun), NONE) == answer


def test_who_is_dying_holds_the_round_until_the_consequences_are_drawn() -> None:
    where = board("00", "00")
    assert close_round(3, [3, 2], where, since("0-"), NONE) == Waiting(1, "worker 1 has not pushed round 3")
    where.gone[1] = AWAY
    assert close_round(3, [3, 2], where, since("0-"), NONE) == Closed((0,))


def test_who_dies_in_a_round_before_it_has_pushed_does_not_hold_it() -> None:
    """It has asked for a norm there: the consequences of its death free nobody before that round is over. The next
    round it holds open."""
    where, asked = board("00", "00"), [3 * NORMS + 1, 3 * NORMS + 1]
    assert close_round(3, [3, 2], where, since("0-"), asked) == Closed((0,))
    assert close_round(4, [4, 2], where, since("0-"), asked) == Waiting(1, "worker 1 has not pushed round 4")
    another = [3 * NORMS + 2, 3 * NORMS + 1]
    assert close_round(another[0], another, where, since("0-"), another, 3) == Closed((0,))
    later = [4 * NORMS + 1, 3 * NORMS + 1]
    assert isinstance(close_round(later[0], later, where, since("0-"), later, 4), Waiting)


def test_a_round_that_only_the_dead_have_asked_a_norm_in_is_over_before_their_batches_go_back() -> None:
    """Worker 0 waits at the tail of its pass; worker 1 has its norm of round 3, alone, and dies."""
    where, asked = board("00", "00", loader0="00"), [0, 3 * NORMS + 1]
    where.parked[0] = 1 + TAIL
    assert is_over(3, [2, 2], [2, 2], (), since("0-"), asked, where) == Abandoned(())
    assert isinstance(is_over(3, [2, 2], [2, 2], (), since("0-"), NONE, where), Waiting)


def test_who_pushes_and_dies_while_it_is_looked_at_is_in_the_round() -> None:
    """Worker 0 asks. Worker 1 is seen not to have pushed; before it is seen gone it pushes and dies."""
    where, pushed = board("00", "00"), [3, 2]

    def push_and_die() -> None:
        pushed[1] = 3
        list.__setitem__(where.gone, 1, AWAY)

    where.gone = WhileRead([0, AWAY], at=1, then=push_and_die)
    assert close_round(3, pushed, where, since("0-"), NONE) == Closed((0, 1))


@pytest.mark.parametrize(
    ("stepped", "begun", "me", "answer"),
    [
        pytest.param("333", "000", 0, Closed((0, 1, 2)), id="all are done"),
        pytest.param("323", "000", 0, Waiting(1, "worker 1 has not stepped its share of round 3"), id="one is not"),
        pytest.param("323", "0-0", 0, Rescue(1), id="the first alive does it"),
        pytest.param("323", "0-0", 2, Waiting(0, "the share of worker 1, which died, is not stepped"), id="not others"),
        pytest.param("223", "--0", 2, Rescue(0), id="the last that is left does it"),
        pytest.param("333", "-00", 1, Closed((0, 1, 2)), id="dead, but done"),
        pytest.param("323", "040", 0, Rescue(1), id="a newcomer in its place does not"),
    ],
)
def test_the_share_of_the_dead_is_stepped_by_one(
    stepped: str, begun: str, me: int, answer: Closed | Waiting | Rescue
) -> None:
    assert all_stepped(3, [int(d) for d in stepped], (0, 1, 2), since(begun), me) == answer


@pytest.mark.parametrize(
    ("pushed", "stepped", "begun", "where", "answer"),
    [
        pytest.param("00", "00", "0-", board("02", "00"), True, id="none has begun"),
        pytest.param("30", "30", "0-", board("02", "00"), True, id="stepped by all that are in it"),
        pytest.param("43", "33", "0-", board("02", "00"), True, id="the next has begun"),
        pytest.param("33", "23", "0-", board("02", "00"), Waiting(0, "member 0 is not done with round 3"), id="alive"),
        pytest.param(
            "33", "32", "0-", board("02", "00"), Waiting(0, "member 1 is not done with round 3"), id="rescued"
        ),
        pytest.param("23", "22", "0-", board("02", "00"), Waiting(0, "worker 0 has not pushed round 3"), id="awaited"),
        pytest.param("23", "22", "0-", board("02", "10", loader0="10"), Abandoned((1,)), id="the other is parked"),
        pytest.param("23", "22", "0-", board("12", "00"), Abandoned((1,)), id="the other has left"),
        pytest.param("33", "32", "--", board("22", "00"), Abandoned((0, 1)), id="all are dead"),
        pytest.param("22", "22", "--", board("22", "00"), Abandoned(()), id="all are dead before they pushed"),
        pytest.param("22", "33", "--", board("22", "00"), True, id="and that was closed"),
        pytest.param(
            "23", "22", "03", board("10", "00"), Waiting(1, "member 1 is not done with round 3"), id="another's first"
        ),
    ],
)
def test_a_newcomer_waits_until_the_last_round_is_over(
    pushed: str, stepped: str, begun: str, where: Lists, answer: bool | Abandoned | Waiting
) -> None:
    number = 0 if pushed == "00" else 3
    columns = [int(d) for d in pushed], [int(d) for d in stepped]
    assert is_over(number, *columns, (), since(begun), NONE, where) == answer


def test_a_round_that_another_pushes_while_it_is_looked_at_is_not_over() -> None:
    """Worker 1 has pushed round 3 and stepped its share; worker 0 pushes it only while that is looked at."""
    where, pushed = board("002", "00"), [2, 3, 2]

    def push() -> None:
        pushed[0] = 3

    stepped = WhileRead([2, 3, 2], at=1, then=push)
    assert is_over(3, pushed, stepped, (), since("00-"), NONE, where) == Waiting(0, "member 0 is not done with round 3")


def test_a_round_that_one_alive_pushes_while_it_is_looked_at_is_not_abandoned() -> None:
    """Worker 1 has pushed round 3 and died. Worker 0 pushes it, and parks, while it is looked for who may."""
    where, pushed = board("02", "00", loader0="10"), [2, 3]

    def push_and_park() -> None:
        pushed[0], where.parked[0] = 3, 1

    where.gone = WhileRead(where.gone, at=0, then=push_and_park)
    assert is_over(3, pushed, [2, 2], (), since("0-"), NONE, where) == Waiting(0, "member 0 is not done with round 3")


def test_what_servers_step_is_never_abandoned_once_it_is_pushed() -> None:
    where = board("22", "00")
    waiting = Waiting(2, "member 2 is not done with round 3")
    assert is_over(3, [3, 2], [0, 0, 2], (2,), since("--"), NONE, where) == waiting
    assert is_over(3, [3, 2], [0, 0, 3], (2,), since("--"), NONE, where) is True


def test_the_first_server_tells_how_many_step_a_round_when_it_has_stepped_it() -> None:
    servers = (2, 3, 4)
    assert at_work(5, [0, 0, 4, 4, 0], servers, [3]) == (2,)
    assert at_work(5, [0, 0, 5, 4, 0], servers, [2]) == (2, 3)
    assert at_work(5, [0, 0, 5, 4, 0], servers, [1]) == (2,)
    assert at_work(5, [5, 5], (), [0]) == ()


def test_the_end_of_a_pass_waits_for_a_newcomer_and_nobody_stands_before_it() -> None:
    where = board("20", "01", loader0="01")
    assert holding(0, 1, where) == Waiting(0, "worker 0 has not finished its part of the data")
    where.parked[1] += EMPTY
    assert where.gone[0] == AWAY
    assert isinstance(held_at_end(1, where), Waiting)
    where.gone[0] = 1
    assert held_at_end(1, where) is None


# --- quorum ---


@pytest.mark.parametrize(
    ("count", "offered", "where"),
    [
        pytest.param(1, (2,), board("000", "000"), id="one is enough"),
        pytest.param(2, (0, 2), board("000", "000"), id="as many as asked for"),
        pytest.param(3, (0, 1, 2), board("000", "000"), id="all"),
        pytest.param(3, (0, 2), board("010", "000"), id="the one that is missing is gone"),
        pytest.param(3, (0, 2), board("000", "010", loader0="010"), id="the one that is missing is parked"),
        pytest.param(2, (0,), board("001", "010", loader0="010"), id="one has data left"),
        pytest.param(2, (1,), board("101", "000"), id="one is left"),
    ],
)
def test_a_quorum_is_met_with_as_many_as_asked_for_or_as_have_data(
    count: int, offered: tuple[int, ...], where: Lists
) -> None:
    assert quorum_met(count, offered, where) == Closed(offered)


@pytest.mark.parametrize(
    ("count", "offered", "where", "on"),
    [
        pytest.param(2, (1,), board("000", "000"), 0, id="the first that is missing is named"),
        pytest.param(2, (0,), board("010", "000"), 2, id="one is gone, one may come"),
        pytest.param(3, (0, 1), board("000", "001", loader0="111"), 2, id="parked, but free to go"),
        pytest.param(3, (0, 1), board("000", "001", loader0="001", loader1="000"), None, id="parked and held"),
        pytest.param(1, (), board("00", "00"), 0, id="nobody has offered"),
    ],
)
def test_a_quorum_waits_for_who_may_still_come(
    count: int, offered: tuple[int, ...], where: Lists, on: int | None
) -> None:
    answer = quorum_met(count, offered, where)
    if on is None:
        assert answer == Closed(offered)
    else:
        assert answer == Waiting(on, f"{len(offered)} of {count} pushes are there, worker {on}'s is not")


# --- the bound ---


@pytest.mark.parametrize(
    ("worker", "staleness", "clocks", "where", "on"),
    [
        pytest.param(0, 0, "55", board("00", "00"), None, id="equal"),
        pytest.param(0, 0, "65", board("00", "00"), 1, id="a bound of nothing"),
        pytest.param(0, 3, "85", board("00", "00"), None, id="at the bound"),
        pytest.param(0, 3, "95", board("00", "00"), 1, id="one too far"),
        pytest.param(1, 3, "95", board("00", "00"), None, id="the slowest"),
        pytest.param(2, 1, "7590", board("0001", "0000"), 0, id="the first that is behind is named"),
        pytest.param(2, 1, "7590", board("1001", "0000"), 1, id="those that are gone do not count"),
        pytest.param(2, 1, "7590", board("1101", "0000"), None, id="all others are gone"),
        pytest.param(0, 1, "90", board("00", "01", loader0="01"), None, id="parked, held by the one that asks"),
        pytest.param(0, 1, "90", board("00", "01", loader0="11"), 1, id="parked, but free to go"),
        pytest.param(0, 0, "9", board("0", "0"), None, id="alone"),
    ],
)
def test_a_step_begins_within_the_bound_of_the_slowest_with_data(
    worker: int, staleness: int, clocks: str, where: Lists, on: int | None
) -> None:
    column = [int(digit) for digit in clocks]
    answer = within_bound(worker, staleness, column, where)
    behind = None if on is None else Waiting(on, f"worker {on} is {column[worker] - column[on]} steps behind")
    assert answer == behind


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 4))
def test_the_slowest_never_waits_and_the_others_as_arithmetic_says(clocks: list[int], staleness: int) -> None:
    where = Lists([0] * len(clocks), [0] * len(clocks))
    for worker, clock in enumerate(clocks):
        admitted = within_bound(worker, staleness, clocks, where) is None
        assert admitted == (clock - min(clocks) <= staleness)
    assert within_bound(clocks.index(min(clocks)), staleness, clocks, where) is None


def at_tail(empty: bool) -> Lists:
    """Worker 1 is at the tail of its first pass over loader 0, worker 0 is in that pass."""
    where = board("00", "01", loader0="00")
    where.parked[1] += TAIL + (EMPTY if empty else 0)
    return where


@pytest.mark.parametrize("empty", [False, True])
def test_who_is_at_the_tail_goes_on_with_what_comes_back_or_when_the_pass_is_drained(empty: bool) -> None:
    where = at_tail(empty)
    assert more_at_tail(1, where) == Waiting(9, "others may give back batches that they have drawn")
    where.returned[0] = 1
    assert more_at_tail(1, where) is True
    where.returned[0] = 0
    assert not is_drained(0, 1, None, where)
    assert is_drained(0, 1, 0, where)
    assert is_drained(0, 1, None, where, leaving=[0])
    assert not is_drained(0, 1, None, where, leaving=[0, 1])
    where.drained[0] = 1
    assert more_at_tail(1, where) is False


def test_who_had_nothing_goes_on_from_the_tail_when_another_evaluates_there() -> None:
    where = at_tail(empty=True)
    where.evaluated[0] = 1
    assert more_at_tail(1, where) is False
    assert isinstance(close_round(3, [3, 2], where, [1, 1], NONE), Waiting)
    where = at_tail(empty=False)
    where.evaluated[0] = 1
    assert isinstance(more_at_tail(1, where), Waiting)
    assert close_round(3, [3, 2], where, [1, 1], NONE) == Closed((0,))


def test_who_had_nothing_goes_on_from_the_tail_as_the_first_where_all_stand() -> None:
    where = at_tail(empty=True)
    where.parked[0], where.finished[1] = 2, [1, 0]
    assert more_at_tail(1, where) is False
    where.gone[0] = AWAY
    assert isinstance(more_at_tail(1, where), Waiting)


def test_what_came_back_is_taken_also_where_another_evaluates() -> None:
    where = at_tail(empty=True)
    where.evaluated[0] = where.returned[0] = 1
    assert more_at_tail(1, where) is True

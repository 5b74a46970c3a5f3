"""The board: cells apart from each other, sleepers that wake, and an abort that reaches everyone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.rounds import AWAY, Closed, Waiting, close_round, is_out
from paceline.transport import segment
from paceline.transport.board import AWAITS_ITS_WORKER, COLLECTIVES, MAX_LOADERS, Aborted, Board

PATIENCE_S = 30.0  # never taken: how long a test that hangs does so


def make(workers: int, servers: int, views: int = 1) -> list[Board]:
    fd = Board.create(workers, servers)
    boards = [Board(segment.attach(fd)) for _ in range(views)]
    os.close(fd)
    return boards


def columns(board: Board) -> list[Any]:
    """Every column of cells that is written through the board."""
    some = (0, 1, MAX_LOADERS // 2, MAX_LOADERS - 1)
    looks = [board.look(loader, number, 0) for loader in some for number in (0, 1)]
    return [board.gone, board.parked, board.ended, *map(board.passes, some), *looks]


@given(st.integers(1, 40), st.integers(0, 12))
def test_no_cell_is_another(workers: int, servers: int) -> None:
    board, other = make(workers, servers, views=2)
    for column in columns(board):
        for rank in range(len(column)):
            column[rank] = 0
    value = 0
    for column in columns(board):
        for rank in range(len(column)):
            value += 1
            column[rank] = value
    for member in range(workers + servers):
        board.ring(member)
    board.publish(3)
    found = [cell for column in columns(other) for cell in column]
    assert found == list(range(1, value + 1))
    assert other.published == 3
    assert not other.abort
    assert not other.interrupt


def test_who_is_given_up_excuses_nobody_who_waits_in_a_collective() -> None:
    """Worker 0 is through it, and has pushed; worker 1 has still to be woken; worker 2 dies before it comes there."""
    (board,) = make(3, 0)
    board.passes(COLLECTIVES)[0] = board.passes(COLLECTIVES)[1] = 1
    board.parked[1] = COLLECTIVES + 1
    board.tell_death(2, for_good=False)
    board.presence[2] = AWAY
    board.journal.commit()
    assert close_round(1, [1, 0, 0], board, [0, 0, 0], [0] * 3) == Closed((0,))  # nobody is through it
    board.tell_death(2, for_good=True)
    assert close_round(1, [1, 0, 0], board, [0, 0, 0], [0] * 3) == Waiting(1, "worker 1 has not pushed round 1")


def test_who_is_given_up_in_a_collective_is_not_excused_before_it_is_buried() -> None:
    (board,) = make(2, 0)
    board.passes(COLLECTIVES)[1], board.parked[1] = 1, COLLECTIVES + 1
    assert is_out(1, board)  # worker 0 has not come there
    board.tell_death(1, for_good=True)
    assert not is_out(1, board)


def test_who_waits_for_its_worker_elsewhere_waits_for_nobody_here() -> None:
    boards = make(3, 0, views=3)
    for member, board in enumerate(boards):
        board.belongs_to(member)
    with boards[1].waiting(AWAITS_ITS_WORKER):
        assert not any(boards[0].is_awaited(member) for member in range(3))
        with boards[2].waiting():
            assert [boards[0].is_awaited(member) for member in range(3)] == [True, True, False]
    assert not boards[0].is_awaited(0)


@pytest.mark.parametrize(("workers", "servers"), [(1, 0), (2, 3), (256, 64)])
def test_a_new_board_is_empty_and_knows_its_members(workers: int, servers: int) -> None:
    (board,) = make(workers, servers)
    assert (board.workers, board.servers, board.members) == (workers, servers, workers + servers)
    assert not any(any(column) for column in columns(board))
    assert (board.abort, board.interrupt, board.published) == (False, False, 0)


def test_what_one_writes_all_see() -> None:
    one, other = make(3, 1, views=2)
    one.gone[2] = 1
    one.passes(7)[1] = 2**63
    one.look(3, 4, 1)[0] = -0.5
    one.set_interrupt()
    assert (other.gone[2], other.passes(7)[1], other.look(3, 2, 1)[0]) == (1, 2**63, -0.5)
    assert other.interrupt
    assert not other.abort


def test_other_memory_is_no_board() -> None:
    fd = segment.create("test", 100_000)
    with pytest.raises(AssertionError, match="not a board"):
        Board(segment.attach(fd))
    os.close(fd)


def test_an_answer_that_is_there_is_not_waited_for() -> None:
    (board,) = make(1, 0)
    assert board.wait(lambda: "now") == "now"
    board.set_abort()
    assert board.wait(lambda: "now") == "now"  # a round that is over is over, also in a run that is being stopped


@pytest.fixture
def threads() -> Iterator[Callable[[Callable[[], Any]], threading.Thread]]:
    """Starts threads, and sees to it that they have ended when the test has."""
    started = []

    def start(body: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=body, daemon=True)
        started.append(thread)
        thread.start()
        return thread

    yield start
    for thread in started:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "somebody sleeps on"


@pytest.mark.parametrize("spins", [0, 40])
def test_turns_taken_by_ringing_all_come(threads: Any, spins: int) -> None:
    """Two members pass a number back and forth; a wake-up that is lost would show as a stall of half a second."""
    boards = make(2, 0, views=2)
    turns = 400
    for board in boards:
        board._cores = spins  # with none nobody has one of its own

    def play(me: int) -> None:
        board = boards[me]
        for turn in range(me, turns, 2):
            board.wait(lambda turn=turn: Waiting(1 - me, "not my turn") if sum(board.gone) < turn else turn)
            board.gone[me] += 1
            board.ring(me)

    for me in (0, 1):
        threads(lambda me=me: play(me))
    boards[0].wait(lambda: Waiting(1, "the game goes on") if sum(boards[0].gone) < turns else True)


def test_many_sleepers_on_one_member_all_wake(threads: Any) -> None:
    boards = make(8, 1, views=8)
    awake: list[int] = []

    def sleep(me: int) -> None:
        board = boards[me]
        board.wait(lambda: Waiting(8, "the server has not begun") if not board.passes(0)[0] else True)
        awake.append(me)
        board.gone[me] = 1
        board.ring(me)

    for me in range(1, 8):
        threads(lambda me=me: sleep(me))
    boards[0].passes(0)[0] = 1
    boards[0].ring(8)

    def all_awake() -> Waiting | bool:
        missing = [me for me in range(1, 8) if not boards[0].gone[me]]
        return Waiting(missing[0], "it sleeps") if missing else True

    assert boards[0].wait(all_awake)
    assert sorted(awake) == list(range(1, 8))


def test_a_sleeper_follows_from_one_member_to_the_next(threads: Any) -> None:
    """It waits on 1, then on 2, then on 3: each is named by the answer, and each rings for itself alone."""
    one, other = make(4, 0, views=2)
    order: list[int] = []

    def ask() -> Waiting | bool:
        for member in (1, 2, 3):
            if not one.gone[member]:
                return Waiting(member, "not yet")
        return True

    def ringer() -> None:
        for member in (1, 2, 3):
            order.append(member)
            other.gone[member] = 1
            other.ring(member)

    threads(ringer)
    assert one.wait(ask)
    assert order == [1, 2, 3]


def test_an_abort_wakes_all_who_sleep_with_the_reason_they_slept_for(threads: Any) -> None:
    boards = make(4, 1, views=6)
    reasons: dict[int, str] = {}
    asleep = threading.Barrier(6)

    def sleep(me: int) -> None:
        asleep.wait(PATIENCE_S)
        try:
            boards[me].wait(lambda: Waiting((me + 1) % 5, f"{me} waits for good"))
        except Aborted as aborted:
            reasons[me] = str(aborted)

    sleepers = [threads(lambda me=me: sleep(me)) for me in range(5)]
    asleep.wait(PATIENCE_S)
    boards[5].set_abort()
    for thread in sleepers:
        thread.join(PATIENCE_S)
    assert reasons == {me: f"{me} waits for good" for me in range(5)}


def test_an_abort_is_no_exception_that_a_script_would_catch() -> None:
    assert issubclass(Aborted, BaseException)
    assert not issubclass(Aborted, Exception)


def test_what_the_question_raises_comes_through() -> None:
    (board,) = make(1, 0)

    def ask() -> Waiting:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        board.wait(ask)


ANSWER = """
import sys
from paceline.protocol.rounds import AWAY, Closed, Waiting, close_round
from paceline.transport import segment
from paceline.transport.board import Board
board = Board(segment.attach(int(sys.argv[1])))
board.wait(lambda: Waiting(0, "not told") if not board.gone[0] else True)
board.gone[1] = 7
board.ring(1)
"""


def test_processes_wake_each_other() -> None:
    fd = Board.create(2, 0)
    board = Board(segment.attach(fd))
    root = str(Path(__file__).parents[3])
    other = subprocess.Popen([sys.executable, "-c", ANSWER, str(fd)], pass_fds=(fd,), cwd=root)
    os.close(fd)
    board.gone[0] = 1
    board.ring(0)
    assert board.wait(lambda: Waiting(1, "no answer") if not board.gone[1] else board.gone[1]) == 7
    assert other.wait(PATIENCE_S) == 0

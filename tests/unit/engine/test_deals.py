"""Who shares a pass is settled once, whoever is ahead of whom by law 4."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.config import Job
from paceline.engine.context import Context
from paceline.engine.worker.deals import Deals
from paceline.protocol.deals import Deal
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel
from paceline.transport.lock import Lock

WORKERS = 3


@pytest.fixture
def host() -> Iterator[tuple[Board, list[Deals]]]:
    """A board, and the deals of the workers of a job."""
    board_fd = Board.create(WORKERS, 0)
    job = Job("test", WORKERS, assign="round_robin")
    mine, its = Channel.pair()
    contexts = []
    for rank in range(WORKERS):
        board = Board(segment.attach(board_fd))
        contexts.append(Context(job, "worker", rank, Path(), its, board, Lock(board_fd, board.journal)))
    yield contexts[0].board, [Deals(context, ()) for context in contexts]
    mine.close()
    its.close()
    os.close(board_fd)


def test_the_pass_of_one_that_is_ahead_is_shared_as_it_was_settled(host: tuple[Board, list[Deals]]) -> None:
    """Worker 2 had nothing to read of a pass, and is let go on to the next; then worker 1 is given up."""
    board, deals = host
    deals[2].settle(0, 0, trains=True)
    board.passes(0)[2] = 1
    deals[2].settle(0, 1, trains=True)
    board.tell_death(1, for_good=True)
    deals[0].settle(0, 0, trains=True)
    assert deals[0].of(0) == Deal(0, 3)  # as worker 2 had settled it
    board.passes(0)[0] = 1
    deals[0].settle(0, 1, trains=True)
    assert (deals[0].of(0), deals[2].of(0)) == (Deal(0, 3), Deal(2, 3))


def test_what_is_lost_of_the_pass_before_is_dealt_anew_in_that_alone(host: tuple[Board, list[Deals]]) -> None:
    board, deals = host
    for number in (0, 1):
        deals[2].settle(0, number, trains=True)
    with deals[0]._lock:
        board.shares.lose(0, 0)
        board.shares.take_out(0, 0, 1, 5)
        board.shares.deal_anew(0, 0)
    before, ahead = board.shares.dealt(0, 0), board.shares.dealt(0, 1)
    assert before is not None
    assert ahead is not None
    assert (before.newest, dict(before.outs)) == (1, {1: (0, 5)})
    assert (ahead.newest, dict(ahead.outs)) == (0, {})
    assert board.shares.passes() == [(0, 0), (0, 1)]


def test_who_is_two_ahead_takes_its_part_as_of_an_evaluation(host: tuple[Board, list[Deals]]) -> None:
    board, deals = host
    for number in range(3):
        board.passes(0)[2] = number
        assert deals[2].settle(0, number, trains=True)
    assert deals[2].of(0) == Deal(2, 3)
    assert deals[2].number(0) is None
    assert board.shares.dealt(0, 2) is None
    board.tell_death(1, for_good=True)
    deals[0].settle(0, 0, trains=True)
    assert deals[0].of(0) == Deal(0, 3)
    for worker in range(WORKERS):
        board.passes(0)[worker] = 2
    deals[0].settle(0, 2, trains=True)
    assert deals[0].of(0) == Deal(0, 2)  # of workers 0 and 2

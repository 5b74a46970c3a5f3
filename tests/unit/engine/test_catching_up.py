"""Claims about which passes a newcomer catches up with, and in which it joins (engine/worker/catching_up.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.config import Job
from paceline.engine.context import Context
from paceline.engine.worker.catching_up import CatchingUp
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.channel import Channel
from paceline.transport.lock import Lock

TRAIN, EVALUATE = 0, 1
NEWCOMER = 1


@pytest.fixture
def context() -> Iterator[Context]:
    fd = Board.create(2, 0)
    board = Board(segment.attach(fd))
    mine, its = Channel.pair()
    yield Context(Job("script.py", workers=2), "worker", NEWCOMER, Path(), mine, board, Lock(fd, board.journal))
    mine.close()
    its.close()
    os.close(fd)


def has_finished(board: Board, loader: int, passes: int, *, trained: bool) -> None:
    """The worker that died had, and the other has."""
    for worker in range(2):
        board.passes(loader)[worker] = passes
        board.look(loader, passes, worker)[2] = trained
    board.trained[loader] = trained


def catch_up(one: CatchingUp, loader: int) -> None:
    one.begin(loader, True)
    one.end(loader)


@pytest.mark.parametrize("is_read_by_others", [False, True])
def test_it_joins_in_the_pass_that_is_trained_on_whatever_was_evaluated_within_it(
    context: Context, is_read_by_others: bool
) -> None:
    """Three evaluations within the second pass, of which the dead had nothing to read, and died at the end of the
    third."""
    board = context.board
    has_finished(board, TRAIN, 1, trained=True)
    board.passes(EVALUATE)[NEWCOMER] = 3
    board.evaluated[EVALUATE] = is_read_by_others
    one = CatchingUp(context, [], is_newcomer=True)
    assert one.is_behind
    assert one.look_again(TRAIN)
    one.begin(TRAIN, True)
    assert one.look_again(EVALUATE)  # its script evaluates within the ghost of the first pass
    catch_up(one, EVALUATE)
    one.end(TRAIN)
    assert not one.look_again(TRAIN)


def test_it_does_not_join_at_an_evaluation_while_passes_that_were_trained_on_lie_behind_it(context: Context) -> None:
    board = context.board
    has_finished(board, TRAIN, 2, trained=True)
    for evaluated in (1, 0):  # or nobody has, since scripts evaluate at other times than it did
        board.evaluated[EVALUATE] = evaluated
        one = CatchingUp(context, [], is_newcomer=True)
        catch_up(one, TRAIN)
        assert one.look_again(EVALUATE)
        catch_up(one, EVALUATE)
        assert one.look_again(TRAIN)
        catch_up(one, TRAIN)
        assert not one.look_again(EVALUATE)


def test_passes_of_which_nobody_knows_yet_what_they_are_are_caught_up_with(context: Context) -> None:
    """The first pass was empty for all; and the dead had begun the next, in which nobody has stepped."""
    has_finished(context.board, TRAIN, 1, trained=False)
    one = CatchingUp(context, [], is_newcomer=True)
    assert one.look_again(TRAIN)
    catch_up(one, TRAIN)
    assert not one.look_again(TRAIN)


def test_evaluations_alone_hold_no_newcomer(context: Context) -> None:
    context.board.passes(EVALUATE)[NEWCOMER] = 2
    one = CatchingUp(context, [], is_newcomer=True)
    assert one.is_behind
    context.board.evaluated[EVALUATE] = 1
    assert not one.is_behind


def test_what_is_left_when_it_has_joined_is_nobody_s_business(context: Context) -> None:
    context.board.passes(EVALUATE)[NEWCOMER] = 2
    one = CatchingUp(context, [], is_newcomer=True)
    one.joined = True
    assert not one.is_behind

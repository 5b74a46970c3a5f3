"""Turns: one at a time, in order, and nobody is waited for too long."""

from __future__ import annotations

import threading

import pytest

from paceline.transport.turns import Turns

WAIT_S = 30.0
NEVER_S = 1e6


def test_one_at_a_time_each_as_often_as_it_comes() -> None:
    turns, inside, most, taken = Turns(NEVER_S), [], [0], [0] * 8

    def come(number: int) -> None:
        for _ in range(200):
            with turns.taken():
                inside.append(number)
                most[0] = max(most[0], len(inside))
                taken[number] += 1
                inside.remove(number)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert (most[0], taken) == (1, [200] * 8)


def test_whose_turn_is_over_comes_behind_those_who_wait() -> None:
    turns, order = Turns(NEVER_S), []
    waits = threading.Event()

    def come() -> None:
        waits.set()
        with turns.taken():
            order.append("other")

    thread = threading.Thread(target=come)
    with turns.taken():
        thread.start()
        waits.wait(WAIT_S)
        while len(turns._queue) < 2:
            pass
        order.append("first")
    with turns.taken():
        order.append("again")
    thread.join(WAIT_S)
    assert order == ["first", "other", "again"]


def test_an_error_ends_a_turn() -> None:
    turns = Turns(NEVER_S)
    with pytest.raises(BrokenPipeError), turns.taken():
        raise BrokenPipeError
    with turns.taken():
        pass


def test_who_takes_too_long_is_not_waited_for_and_ends_nobody_elses_turn() -> None:
    turns, order = Turns(0.0), []
    goes_on, is_in = threading.Event(), threading.Event()

    def stuck() -> None:
        with turns.taken():
            is_in.set()
            goes_on.wait(WAIT_S)

    thread = threading.Thread(target=stuck)
    thread.start()
    is_in.wait(WAIT_S)
    with turns.taken():
        order.append("past it")
        goes_on.set()
        thread.join(WAIT_S)
        assert len(turns._queue) == 1
    with turns.taken():
        order.append("again")
    assert order == ["past it", "again"]

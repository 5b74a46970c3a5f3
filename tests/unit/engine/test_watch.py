"""Who is stuck, by what the kernel tells."""

from __future__ import annotations

import pytest

from paceline.engine.watch import Watch

WORKER = ("worker", 1)


def stat(state: str, ticks: int) -> str:
    return f"7 (a name) with ) {state} 1 1 1 0 -1 4194304 100 0 0 0 {ticks} 2 0 0 20 0 1 0 100 1 1"


def played(looks: list[tuple[float, str, int]], *, hangs: bool) -> list[tuple[float, str]]:
    """When a process that shows these states at these times is told to be stuck, with a limit of 5 s."""
    now: list[str] = []
    watch = Watch(5.0, read=lambda pid: now[-1])
    found = []
    for time_s, state, ticks in looks:
        now.append(stat(state, ticks))
        found += [(time_s, what) for whose, what in watch.look({WORKER: 7}, time_s, lambda *_: hangs)]
    return found


def test_who_is_stopped_for_a_second_is_stuck() -> None:
    looks = [(0.0, "R", 1), (0.5, "T", 1), (1.0, "T", 1), (1.5, "T", 1)]
    assert played(looks, hangs=False) == [(1.5, "has been stopped for 1.0 s")]


def test_who_goes_on_before_that_is_not() -> None:
    assert played([(0.0, "T", 1), (0.9, "T", 1), (1.0, "S", 1), (1.5, "T", 1), (2.4, "T", 1)], hangs=True) == []


def test_who_does_nothing_while_others_wait_is_stuck() -> None:
    looks = [(0.0, "S", 1), (4.0, "S", 1), (5.0, "S", 1)]
    assert played(looks, hangs=True) == [(5.0, "has done nothing for 5 s while others wait for it")]
    assert played(looks, hangs=False) == []


@pytest.mark.parametrize("looks", [[(0.0, "S", 1), (4.0, "S", 2), (8.0, "S", 3)], [(0.0, "R", 1), (9.0, "R", 1)]])
def test_who_computes_is_not(looks: list[tuple[float, str, int]]) -> None:
    assert played(looks, hangs=True) == []


def test_another_process_in_its_place_begins_anew() -> None:
    watch = Watch(5.0, read=lambda pid: stat("T", 1))
    assert list(watch.look({WORKER: 7}, 0.0, lambda *_: False)) == []
    assert list(watch.look({WORKER: 8}, 1.5, lambda *_: False)) == []


def test_a_process_that_is_gone_is_passed_over() -> None:
    assert list(Watch(5.0, read=lambda pid: None).look({WORKER: 7}, 9.0, lambda *_: True)) == []
